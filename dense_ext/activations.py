"""The elementwise functions that may follow a norm, by name.

The kernels compute ReLU. The others run through PyTorch's operators (:mod:`dense_ext.backends.general`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An elementwise function, and its backward: the gradient of its input from that of its output."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of the output, input)


_aten: Any = torch.ops.aten
_FUNCTIONS: dict[str, Callable[[str], Activation]] = {
    # Where the input is NaN the gradient passes, as in PyTorch.
    "relu": lambda _: Activation(F.relu, lambda g, x: g.masked_fill(x <= 0, 0)),
    "identity": lambda _: Activation(lambda x: x, lambda g, x: g),
    "leaky_relu": lambda slope: Activation(
        lambda x: F.leaky_relu(x, float(slope)),
        lambda g, x: _aten.leaky_relu_backward(g, x, float(slope), False),
    ),
    "elu": lambda alpha: Activation(
        lambda x: F.elu(x, float(alpha)), lambda g, x: _aten.elu_backward(g, float(alpha), 1, 1, False, x)
    ),
    "gelu": lambda approximate: Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda g, x: _aten.gelu_backward(g, x, approximate=approximate),
    ),
    "silu": lambda _: Activation(F.silu, _aten.silu_backward),
}


@functools.cache
def activation(name: str) -> Activation:
    """The function of a name such as ``"relu"`` or ``"leaky_relu(0.1)"``."""
    kind, _, argument = name.rstrip(")").partition("(")
    return _FUNCTIONS[kind](argument)


def named(kind: str, argument: Any = None) -> str:
    """The name of a function and its argument."""
    return kind if argument is None else f"{kind}({argument})"


def name_of(module: nn.Module) -> str | None:
    """The name of what a module of torch.nn computes, None if it is not one of these functions."""
    return _NAMES[type(module)](module) if type(module) in _NAMES else None


_NAMES: dict[type, Callable[[Any], str]] = {
    nn.ReLU: lambda m: "relu",
    nn.LeakyReLU: lambda m: named("leaky_relu", m.negative_slope),
    nn.ELU: lambda m: named("elu", m.alpha),
    nn.GELU: lambda m: named("gelu", m.approximate),
    nn.SiLU: lambda m: "silu",
    nn.Identity: lambda m: "identity",
}
