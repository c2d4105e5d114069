"""Every form of layer and transition that the operators compute is fused and equal to eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dense_ext
from dense_ext import schedule

from ..helpers import Calls, assert_equal, assert_trains_alike, randomize, twin

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
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


class Network(nn.Module):
    """Two blocks with a transition between them."""

    def __init__(self, of: Form) -> None:
        super().__init__()
        conv: Any = CONVS[of.dims]
        channels = 5
        self.block1, channels = self.block(of, channels)
        self.transition = nn.Sequential(
            NORMS[of.dims](channels), copy.deepcopy(of.activation), conv(channels, 6, 1, bias=of.bias),
            *of.dropout(of.transition_drops), POOLS[of.dims, of.pool](2),
        )  # fmt: skip
        self.block2, channels = self.block(of, 6)
        self.last = conv(channels, 2, 1)
        self.last.weight.data /= 10

    @staticmethod
    def block(of: Form, channels: int) -> tuple[nn.Module, int]:
        layers = []
        for width, growth in zip(of.widths, of.growth, strict=True):
            layers.append(Layer(of, channels, width, growth))
            channels += growth
        return nn.Sequential(*layers), channels

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


def pair(form: Form, recompute: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = randomize(Network(form)).double()
    return twin(model, lambda m: dense_ext.swap(m, recompute=recompute, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_trains_as_eager(name: str, recompute: str) -> None:
    form = FORMS[name]
    ours, eager = pair(form, recompute)
    with Calls() as calls:
        assert_trains_alike(ours, eager, form.images(), steps=2)
    assert {"dense_block", "transition"} <= set(calls.names)
    ours.eval()
    eager.eval()
    assert_trains_alike(ours, eager, form.images(), steps=1)
    assert [row.runs for row in dense_ext.report(ours).rows] == ["fused"] * 3


@contextmanager
def same_masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make dropout's masks in eager and in the operators follow from the tensors' shapes alone."""

    def mask(shape: Sequence[int], rate: float, channels: bool) -> Tensor:
        size = (*shape[:2], *[1] * (len(shape) - 2)) if channels else shape
        generator = torch.Generator().manual_seed(sum(shape))
        return (torch.rand(size, generator=generator, dtype=torch.float64) > rate) / (1 - rate)

    class Dropout(schedule.Dropout):
        def mask(self, y: Tensor) -> Tensor:
            shape = torch.Size([len(y), y.shape[-1], *y.shape[1:-1]])
            signals = y.dim() == 4 and shape[2] == 1
            found = mask(shape[:2] + shape[3:] if signals else shape, self.rate, self.channels)
            return (found.unsqueeze(2) if signals else found).movedim(1, -1)

    class InEager(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            kinds = {F.dropout: False, F.dropout1d: True, F.dropout2d: True, F.dropout3d: True}
            if func not in kinds:
                return func(*args, **kwargs)
            (x, *rest) = args
            rate, training = (*rest, *[kwargs.get(name) for name in ("p", "training")][len(rest) :])[:2]
            return x * mask(x.shape, rate, kinds[func]) if training else x

    monkeypatch.setattr(dense_ext.ops, "Dropout", Dropout)
    with InEager():
        yield


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_in_its_place(name: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = DROPOUTS[name]
    ours, eager = pair(form, recompute)
    with same_masks(monkeypatch), Calls() as calls:
        assert_trains_alike(ours, eager, form.images(), steps=1)
        ours.eval()
        eager.eval()
        assert_trains_alike(ours, eager, form.images(), steps=1)
    assert {"dense_block", "transition"} <= set(calls.names)


@pytest.mark.parametrize("name", ["dropout everywhere", "dropout of channels everywhere, volumes"])
def test_dropout_drops_at_its_rate(name: str) -> None:
    """What a layer adds is dropped as often as its rate says, single elements or whole channels."""
    form = replace(DROPOUTS[name], drops=(0.0, 0.4), growth=(40, 2), widths=(8, 2))
    ours, _ = pair(form, "bottleneck")
    x = torch.randn(40, 5, *form.images().shape[2:], dtype=torch.float64)
    added = ours.block1(x)[:, 5:45]  # type: ignore[operator]
    dropped = (added == 0).flatten(2)
    assert abs(dropped.double().mean() - 0.4) < 0.05
    whole = dropped.all(2) | ~dropped.any(2)
    assert bool(whole.all()) == form.drops_channels


@pytest.mark.parametrize("channels", [False, True])
def test_dropout_after_dropout_is_one_at_the_joint_rate(channels: bool) -> None:
    torch.manual_seed(0)
    model = Network(Form(drops=(0.0, 0.4), drops_channels=channels, growth=(200, 2), widths=(8, 2)))
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.append(nn.Dropout2d(0.5) if channels else nn.Dropout(0.5))
    dense_ext.swap(model.double(), strict=True)
    assert [row.runs for row in dense_ext.report(model).rows] == ["fused"] * 3
    added = model.block1(torch.randn(20, 5, 4, 4, dtype=torch.float64))[:, 5:205]
    dropped = (added == 0).flatten(2)
    assert abs(dropped.double().mean() - 0.7) < 0.03
    assert bool((dropped.all(2) | ~dropped.any(2)).all()) == channels
    model.eval()
    assert (model.block1(torch.randn(2, 5, 4, 4, dtype=torch.float64)) != 0).all()


@pytest.mark.parametrize(
    "name", ["everything", "biases", "signals", "dropout everywhere", "growth that varies"]
)
def test_second_derivatives(name: str) -> None:
    form = {**FORMS, **DROPOUTS}[name]
    form = replace(form, drops=(0.0, 0.0), transition_drops=0.0)
    found = []
    x = form.images()
    for model in pair(form, "bottleneck"):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in model.parameters())])
    for ours, eager in zip(*found, strict=True):
        if eager is not None:
            scale = max(float(t.abs().max()) for t in found[1] if t is not None)
            torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["everything", "biases", "signals", "leaky ReLU", "maximum pool"])
def test_under_autocast_errors_are_those_of_eager(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    torch.manual_seed(0)
    exact = randomize(Network(form)).double()
    x = form.images()
    reference = exact(x)
    errors = []
    for swap in (True, False):
        model = copy.deepcopy(exact).float()
        if swap:
            dense_ext.swap(model, strict=True)
        with torch.autocast("cpu", dtype):
            y = model(x.float())
        assert y.dtype == dtype
        errors.append(float((y.double() - reference).norm() / reference.norm()))
    assert errors[0] <= 1.5 * errors[1] + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("name", "block", "transition"),
    [
        ("biases", "reference", "reference"),
        ("5x5", "reference; PyTorch (5x5)", "reference"),
        ("1x1", "reference; PyTorch (1x1)", "reference"),
        ("dilation", "reference; PyTorch (3x3)", "reference"),
        ("GELU", *["reference; PyTorch (1x1, 3x3, pools)"] * 2),
        ("signals", "reference; PyTorch (1x3, pools)", "reference; PyTorch (pools)"),
        ("dilation, plain, volumes", *["reference; PyTorch (3x3x3, pools)"] * 2),
    ],
)
def test_report_says_what_pytorch_runs(name: str, block: str, transition: str) -> None:
    model = dense_ext.swap(Network(FORMS[name]), backend="reference")
    assert [row.detail for row in dense_ext.report(model).rows] == [block, transition, block]


def test_signals_of_another_rank_are_refused() -> None:
    ours, _ = pair(FORMS["signals"], "none")
    with pytest.raises(ValueError, match=r"input must be 3-D \[N, 5, L\], got shape \(2, 5, 1, 8\)"):
        ours.block1(torch.randn(2, 5, 1, 8, dtype=torch.float64))  # type: ignore[operator]


def test_compiles_without_a_graph_break() -> None:
    form = FORMS["everything"]
    ours, eager = pair(form, "bottleneck")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = form.images()
    assert_equal(compiled(x), eager(x), "output")
