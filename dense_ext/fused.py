"""Which modules a fused call stands for, and whether they are now what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_POOLS: dict[type[nn.Module], dict[str, Any]] = {
    nn.AvgPool2d: {
        "kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False, "divisor_override": None,
    },
    nn.MaxPool2d: {
        "kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False,
        "return_indices": False,
    },
}  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody listens to ``module`` itself being called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Fused:
    """A module, or a mixin for one, that stands for its inner modules where they are what it expects.

    They are looked at when a network is swapped and again at every call, since anybody may exchange
    them at any time.
    """

    # Their classes by name, in the order they run; behind them what a norm has of its own.
    parts: ClassVar[Mapping[str, type[nn.Module]]]
    backend: str
    _modules: dict[str, Any]

    @classmethod
    def reason(cls, modules: Mapping[str, Any]) -> str | None:
        """Why modules by these names have to be called one by one, or None."""
        for name, module in modules.items():
            expected = cls.parts.get(name)
            if expected is not None:
                if type(module) is not expected:
                    return f"{name} is {type(module).__name__}, not {expected.__name__}"
                if expected is nn.Conv2d:
                    of_three = name == "conv2" or (name == "conv1" and "conv2" not in modules)
                    if wrong := _conv_reason(module, 3 if of_three else 1):
                        return f"{name} has {wrong}"
                elif expected in _POOLS and (wrong := _pool_reason(module)):
                    return f"{name} has {wrong}"
            elif module is None:
                continue
            elif not module._modules:
                return f"{name} ({type(module).__name__}) is not among {', '.join(cls.parts)}"
            if has_hooks(module):
                return f"{name} carries a hook, which a fused call would pass over"
            if module._modules and (inner := cls.reason(module._modules)):
                return f"{name}: {inner}"
        return None


def _conv_reason(conv: Any, size: int) -> str | None:
    """What is other than in a plain convolution: stride 1, same size, no bias, one group."""
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    plain = ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")
    if settings != plain:
        pairs = zip(_CONV, settings, plain, strict=True)
        return next(f"{name} {got}, expected {right}" for name, got, right in pairs if got != right)
    return None if conv._parameters.get("bias") is None else "a bias, expected none"


def _pool_reason(pool: nn.Module) -> str | None:
    for name, right in _POOLS[type(pool)].items():
        got = getattr(pool, name)
        if got not in (right, (right, right)):
            return f"{name} {got}, expected {right}"
    return None
