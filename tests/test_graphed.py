"""make_graphed, with recordings that run the model again; tests/gpu/test_graphed.py has true CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense_ext
from dense_ext import graphed
from dense_ext.graphed import GraphedModel

from .graphs import assert_trains_alike
from .helpers import small_densenet


def run_again(run: graphed.Run, pool: Any, stream: Any) -> tuple[Sequence[Any], Callable[[], None]]:
    """Stands for a CUDA graph: a replay runs Python again, and overwrites the first results."""
    gradients, results = torch.is_grad_enabled(), run()

    def replay() -> None:
        with torch.set_grad_enabled(gradients):
            again = run()
        with torch.no_grad():
            for result, value in zip(results, again, strict=True):
                if result is not None and value is not None:
                    result.copy_(value)

    return results, replay


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Callable[..., GraphedModel]:
    """make_graphed on the CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graphed, "record", run_again)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda which: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return lambda model, *samples: GraphedModel(model, samples)


def batches(count: int = 4, size: int = 32) -> list[Tensor]:
    return [torch.randn(2, 3, size, size) for _ in range(count)]


@pytest.fixture
def model() -> nn.Module:
    return dense_ext.swap(small_densenet().float(), recompute="bottleneck")


@pytest.mark.parametrize("accumulate", [False, True])
def test_trains_as_without(make: Any, model: nn.Module, accumulate: bool) -> None:
    samples = batches()
    assert_trains_alike(model, lambda m: make(m, samples[0]), samples, accumulate)


def test_several_shapes_and_others(make: Any, model: nn.Module) -> None:
    """A recording for each sample; the model itself runs what has none."""
    samples = [*batches(2, 32), *batches(2, 40), *batches(1, 36)]
    calls: list[int] = []

    def graph(m: nn.Module) -> GraphedModel:
        made: GraphedModel = make(m, samples[0], samples[2])
        m.register_forward_hook(lambda module, args, y: calls.append(args[0].shape[-1]))
        return made

    assert_trains_alike(model, graph, samples)
    # A stand-in for a graph runs the hooks as well, with the recording's own input.
    assert calls.count(36) == 1


def test_recording_changes_nothing(make: Any, model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make(model, batches()[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_evaluation(make: Any, model: nn.Module) -> None:
    first, second = batches(2)
    call = make(model.eval(), first)
    with torch.no_grad():
        expected = [model(first), model(second)]
        found = [call(first), call(second)]  # the second call leaves the first one's output alone
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert call(first).requires_grad  # the model itself ran, as gradients are wanted


def test_gradient_of_the_input(make: Any, model: nn.Module) -> None:
    x = batches(1)[0].requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    call = make(model, x)
    assert torch.equal(torch.autograd.grad(call(x).square().sum(), x)[0], expected)


def test_frozen_parameters_have_no_gradient(make: Any, model: nn.Module) -> None:
    first = next(model.parameters()).requires_grad_(False)
    make(model, batches()[0])(batches()[0]).sum().backward()
    assert first.grad is None
    assert all(p.grad is not None for p in model.parameters() if p is not first)


def test_held_gradients_stay(make: Any, model: nn.Module) -> None:
    held: list[Tensor] = []
    next(model.parameters()).register_hook(held.append)
    call = make(model, batches()[0])
    held.clear()
    call(batches()[0]).sum().backward()
    before = held[0].clone()
    call(batches()[0]).square().sum().backward()
    assert torch.equal(held[0], before)


def test_backward_of_an_earlier_call_fails(make: Any, model: nn.Module) -> None:
    call = make(model, batches()[0])
    first = call(batches()[0])
    call(batches()[0])
    with pytest.raises(RuntimeError, match="run backward before the model is called again"):
        first.sum().backward()


def test_second_backward_fails(make: Any, model: nn.Module) -> None:
    loss = make(model, batches()[0])(batches()[0]).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once for each forward"):
        loss.backward()


def test_second_derivative_fails(make: Any, model: nn.Module) -> None:
    x = batches()[0].requires_grad_()
    y = make(model, x)(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def freeze(model: nn.Module) -> None:
    next(model.parameters()).requires_grad_(False)


def move(model: nn.Module) -> None:
    parameter = next(model.parameters())
    parameter.data = parameter.data.clone()


def exchange(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.weight = nn.Parameter(norm.weight.detach().clone())


def evaluate_a_norm(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()


def change_momentum(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = 0.25


def add_a_module(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.Sequential)).append(nn.Tanh())


@pytest.mark.parametrize("change", [freeze, move, exchange, evaluate_a_norm, change_momentum, add_a_module])
def test_a_changed_model_runs_itself(
    make: Any, model: nn.Module, change: Callable[[nn.Module], None]
) -> None:
    x = batches()[0]
    call = make(model, x)
    change(model)
    with pytest.warns(UserWarning, match="runs without its CUDA graph"):
        y = call(x)
    assert torch.equal(y, model(x))


def test_setting_what_was_set_keeps_the_graph(make: Any, model: nn.Module) -> None:
    call = make(model, batches()[0])
    momentum = 0.1
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = float(str(momentum))  # an object of its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(batches()[0])


def test_new_values_of_parameters_are_used(make: Any, model: nn.Module) -> None:
    call, x = make(model, batches()[0]), batches()[0]
    other = small_densenet().float()
    model.load_state_dict(other.state_dict())
    assert torch.equal(call(x), dense_ext.swap(other)(x))


def test_fused_dropout_is_refused(make: Any) -> None:
    model = dense_ext.swap(small_densenet(drop_rate=0.3).float())
    with pytest.raises(ValueError, match="random numbers on the CPU"):
        make(model, batches()[0])
    make(model.eval(), batches()[0])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_refuses(make: Any, model: nn.Module) -> None:
    with pytest.raises(ValueError, match="one tensor, got tuple"):
        make(Pair().eval(), batches()[0])
    with pytest.raises(ValueError, match="nothing requires a gradient"):
        make(copy.deepcopy(model).requires_grad_(False), batches()[0])
    with pytest.raises(ValueError, match="needs a sample"):
        dense_ext.make_graphed(model)
    with pytest.raises(ValueError, match="the sample is on cpu"):
        dense_ext.make_graphed(model, batches()[0])
