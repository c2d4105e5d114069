"""Small densely connected networks in every form of layer and transition that the operators compute."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS: dict[tuple[int, str], Any] = {
    (1, "average"): nn.AvgPool1d, (2, "average"): nn.AvgPool2d, (3, "average"): nn.AvgPool3d,
    (1, "max"): nn.MaxPool1d, (2, "max"): nn.MaxPool2d, (3, "max"): nn.MaxPool3d,
}  # fmt: skip
CHANNEL_DROPOUTS = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}


@dataclass(frozen=True)
class Form:
    """The form of a small network of two blocks with a transition between them."""

    dims: int = 2
    bottleneck: bool = True
    bias: bool = False
    window: Any = 3
    dilation: int = 1
    activation: nn.Module = field(default_factory=lambda: nn.ReLU(inplace=True))
    growth: tuple[int, ...] = (4, 4, 4)
    widths: tuple[int, ...] = (8, 8, 8)  # of the bottlenecks
    drops: tuple[float, float] = (0.0, 0.0)  # after the first and the last convolution
    drops_channels: bool = False
    pool: str = "average"
    transition_drops: float = 0.0
    varies: bool = False  # whether a test is to draw widths that vary

    def dropout(self, rate: float) -> list[nn.Module]:
        """Dropout as a module, if there is any."""
        kind: Any = CHANNEL_DROPOUTS[self.dims] if self.drops_channels else nn.Dropout
        return [kind(rate)] if rate else []

    def images(self) -> Tensor:
        """A batch for the network."""
        sizes = {1: (12,), 2: (8, 7), 3: (4, 6, 5)}[self.dims]
        return torch.randn(3, 5, *sizes, dtype=torch.float64)


class Layer(nn.Sequential):
    """One dense layer."""

    def __init__(self, of: Form, inputs: int, width: int, growth: int) -> None:
        conv: Any = CONVS[of.dims]
        window = of.window if isinstance(of.window, tuple) else (of.window,) * of.dims
        padding = tuple(of.dilation * (length // 2) for length in window)
        parts: list[nn.Module] = []
        if of.bottleneck:
            parts += [
                NORMS[of.dims](inputs),
                copy.deepcopy(of.activation),
                conv(inputs, width, 1, bias=of.bias),
            ]
            parts += of.dropout(of.drops[0])
        inputs = width if of.bottleneck else inputs
        last = conv(inputs, growth, window, padding=padding, dilation=of.dilation, bias=of.bias)
        parts += [NORMS[of.dims](inputs), copy.deepcopy(of.activation), last, *of.dropout(of.drops[1])]
        super().__init__(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def block_of(of: Form, channels: int) -> tuple[nn.Module, int]:
    """A block that reads this many channels, and the number that it returns."""
    layers = []
    for width, growth in zip(of.widths, of.growth, strict=True):
        layers.append(Layer(of, channels, width, growth))
        channels += growth
    return nn.Sequential(*layers), channels


def transition_of(of: Form, channels: int, outputs: int) -> nn.Module:
    """A transition."""
    conv = CONVS[of.dims]
    return nn.Sequential(
        NORMS[of.dims](channels), copy.deepcopy(of.activation), conv(channels, outputs, 1, bias=of.bias),
        *of.dropout(of.transition_drops), POOLS[of.dims, of.pool](2),
    )  # fmt: skip


class Network(nn.Module):
    """Two blocks with a transition between them."""

    def __init__(self, of: Form) -> None:
        super().__init__()
        conv: Any = CONVS[of.dims]
        self.block1, channels = block_of(of, 5)
        self.transition = transition_of(of, channels, 6)
        self.block2, channels = block_of(of, 6)
        self.last = conv(channels, 2, 1)
        self.last.weight.data /= 10

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block2(self.transition(self.block1(x))))


FORMS = {
    "biases": Form(bias=True),
    "biases, plain": Form(bias=True, bottleneck=False),
    "5x5": Form(window=5),
    "1x1, plain": Form(window=1, bottleneck=False),
    "1x1": Form(window=1),
    "3x5": Form(window=(3, 5)),
    "dilation": Form(dilation=2),
    "dilation, plain, volumes": Form(dims=3, dilation=2, bottleneck=False),
    "leaky ReLU": Form(activation=nn.LeakyReLU(0.2)),
    "ELU": Form(activation=nn.ELU(0.7)),
    "GELU": Form(activation=nn.GELU()),
    "GELU by tanh, volumes": Form(dims=3, activation=nn.GELU("tanh")),
    "SiLU, plain": Form(activation=nn.SiLU(), bottleneck=False),
    "no activation": Form(activation=nn.Identity()),
    "growth that varies": Form(growth=(3, 5, 2), widths=(8, 4, 9)),
    "growth that varies, plain, biases": Form(growth=(3, 5, 2), bottleneck=False, bias=True),
    "maximum pool": Form(pool="max"),
    "maximum pool, biases, volumes": Form(dims=3, pool="max", bias=True),
    "signals": Form(dims=1),
    "signals, plain, 5": Form(dims=1, window=5, bottleneck=False, pool="max"),
    "signals, ELU, biases": Form(dims=1, activation=nn.ELU(), bias=True),
    "everything": Form(
        3, bias=True, window=(1, 3, 5), dilation=2, activation=nn.LeakyReLU(), growth=(2, 5, 3),
        widths=(7, 3, 6), pool="max",
    ),
}  # fmt: skip
DROPOUTS = {
    "dropout inside": Form(drops=(0.4, 0.0)),
    "dropout everywhere": Form(drops=(0.4, 0.3), transition_drops=0.5, bias=True),
    "dropout of channels": Form(drops=(0.0, 0.4), drops_channels=True),
    "dropout of channels everywhere, volumes": Form(
        3, drops=(0.3, 0.4), drops_channels=True, transition_drops=0.4, pool="max"
    ),
    "dropout in signals": Form(1, drops=(0.3, 0.4), drops_channels=True, transition_drops=0.4),
    "dropout in a transition": Form(transition_drops=0.4, bottleneck=False),
}
