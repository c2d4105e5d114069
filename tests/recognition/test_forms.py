"""Every form of layer and transition that the operators compute is fused and equal to eager PyTorch."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dense_ext
from dense_ext import schedule
from dense_ext.swap.report import swapped_rows

from ..helpers import Calls, assert_equal, assert_trains_alike, randomize, second_derivative, twin
from .forms import DROPOUTS, FORMS, Form, Layer, Network

Pair = tuple[nn.Module, nn.Module]
PairOf = Callable[..., Pair]


def pair(form: Form) -> Pair:
    torch.manual_seed(0)
    return twin(randomize(Network(form)).double(), lambda m: dense_ext.swap(m, strict=True))


@pytest.fixture(scope="module")
def pair_of() -> PairOf:
    """Makes a swapped network and its original; to recognise takes long, so it is done once for each form."""
    once = functools.cache(pair)

    def copies(form: Form, recompute: str = "bottleneck") -> Pair:
        ours, eager = copy.deepcopy(once(form))
        if recompute != "bottleneck":  # with which it is swapped already
            dense_ext.swap(ours, recompute=recompute, strict=True)
        return ours, eager

    return copies


@pytest.mark.each_value
@pytest.mark.parametrize("name", FORMS)
def test_trains_as_eager(pair_of: PairOf, name: str, recompute: str) -> None:
    form = FORMS[name]
    ours, eager = pair_of(form, recompute)
    with Calls() as calls:
        assert_trains_alike(ours, eager, form.images(), steps=2)
    assert {"dense_block", "transition"} <= set(calls.names)
    ours.eval()
    eager.eval()
    assert_trains_alike(ours, eager, form.images(), steps=1)
    # The rows of a report, without its search for parts that are not swapped: ``strict`` has found none.
    assert [row.runs for row in swapped_rows(ours)] == ["fused"] * 3


@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("signals", F, "conv1d"), ("signals", F, "avg_pool1d"), ("signals, plain, 5", F, "max_pool1d"),
        ("SiLU, plain", F, "silu"), ("ELU", F, "elu"), ("GELU", F, "gelu"), ("leaky ReLU", F, "leaky_relu"),
        ("biases", torch, "cat"),
    ],
)  # fmt: skip
def test_replaced_functions_are_called(
    pair_of: PairOf,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    owner: Any,
    function: str,
) -> None:
    """As tools do that observe a network, or change what it computes."""
    models = pair_of(FORMS[name])
    images, real = FORMS[name].images(), getattr(owner, function)
    before = models[1](images)
    monkeypatch.setattr(owner, function, lambda *args, **kwargs: real(*args, **kwargs) * 0.5)
    with warnings.catch_warnings(action="ignore"):
        found, expected = (model(images) for model in models)
    assert_equal(found, expected, "output")
    assert not torch.equal(expected, before)


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
def test_dropout_is_in_its_place(
    pair_of: PairOf, name: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = DROPOUTS[name]
    ours, eager = pair_of(form, recompute)
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
    ours, _ = pair(form)
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
def test_second_derivatives(pair_of: PairOf, name: str) -> None:
    form = {**FORMS, **DROPOUTS}[name]
    form = replace(form, drops=(0.0, 0.0), transition_drops=0.0)
    found = []
    x = form.images()
    for model in pair_of(form):
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
def test_under_autocast_errors_are_those_of_eager(pair_of: PairOf, name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    ours, eager = pair_of(form)
    x = form.images()
    reference = copy.deepcopy(eager)(x)
    errors = []
    for model in (ours.float(), eager.float()):
        with torch.autocast("cpu", dtype):
            y = model(x.float())
        assert y.dtype == dtype
        errors.append(float((y.double() - reference).norm() / reference.norm()))
    assert errors[0] <= 1.5 * errors[1] + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("name", "block", "transition"),
    [
        ("biases", "reference", "reference"),
        ("maximum pool", "reference", "reference; PyTorch (pools)"),
        ("5x5", "reference; PyTorch (5x5)", "reference"),
        ("1x1", "reference; PyTorch (1x1)", "reference"),
        ("dilation", "reference; PyTorch (3x3)", "reference"),
        ("GELU", *["reference; PyTorch (1x1, 3x3, pools)"] * 2),
        ("signals", "reference; PyTorch (1x3)", "reference; PyTorch (pools)"),
        ("dilation, plain, volumes", *["reference; PyTorch (3x3x3, pools)"] * 2),
    ],
)
def test_report_says_what_pytorch_runs(pair_of: PairOf, name: str, block: str, transition: str) -> None:
    ours, _ = pair_of(FORMS[name])
    model = dense_ext.swap(ours, backend="reference")
    assert [row.detail for row in dense_ext.report(model).rows] == [block, transition, block]


def test_signals_of_another_rank_are_refused(pair_of: PairOf) -> None:
    ours, _ = pair_of(FORMS["signals"])
    with pytest.raises(ValueError, match=r"input must be 3-D \[N, 5, L\], got shape \(2, 5, 1, 8\)"):
        ours.block1(torch.randn(2, 5, 1, 8, dtype=torch.float64))  # type: ignore[operator]


def test_compiles_without_a_graph_break(pair_of: PairOf) -> None:
    form = FORMS["everything"]
    ours, eager = pair_of(form)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = form.images()
    assert_equal(compiled(x), eager(x), "output")


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_of_a_single_image(training: bool) -> None:
    """PyTorch's batch norm computes wrong gradients for the strides that a single image may have."""
    form = Form(activation=nn.ELU(), bias=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 5, 1), Network(form))
    ours, eager = twin(randomize(model).double().train(training), dense_ext.swap)
    x = torch.randn(1, 5, 9, 8, dtype=torch.float64)
    assert_equal(second_derivative(ours, x), second_derivative(eager, x), "second derivative")
