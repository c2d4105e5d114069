"""Proxies that also record writes into tensors; those of ``torch.fx`` lose some.

Python computes ``y += 1`` as ``y = y + 1`` if ``y`` has no ``__iadd__``. So a graph would show a sum where
eager writes into memory that other values may share.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

# The names of the functions of Python's operator module that write into their first argument.
IN_PLACE = {
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
    "itruediv", "ixor", "setitem",
}  # fmt: skip
# The attributes that torch.fx sets on its proxies.
_OF_PROXIES = {"__dict__", "_node", "attr", "node", "root", "tracer"}


class WritableProxy(fx.Proxy):
    """A proxy with the operators that work in place, and with assignment to items."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what a graph cannot show, such as ``y.data = x``."""
        if name not in _OF_PROXIES:
            raise TypeError(f"it sets {name} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(WritableProxy, fx.proxy.Attribute):  # its methods are those of an Attribute
    """An attribute of a proxy, such as ``y.data``, which shares the memory of ``y``."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in IN_PLACE - {"setitem"}:
    setattr(WritableProxy, f"__{_name}__", _in_place(getattr(operator, _name)))
