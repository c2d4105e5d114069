"""A backward uses the values that its forward used, or raises; and it modifies no tensor that others hold."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dense_ext
from dense_ext import ops

from .helpers import assert_equal, assert_same_state, small_densenet, twin

pytestmark = pytest.mark.usefixtures("one_thread")


def images() -> Tensor:
    return torch.randn(2, 3, 33, 32, dtype=torch.float64)


def pair(recompute: str) -> tuple[nn.Module, nn.Module]:
    return twin(small_densenet(), lambda m: dense_ext.swap(m, recompute=recompute))


def gradient_of_the_transition(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loss whose graph is kept, and the gradient of one weight after the first block."""
    loss = model(x).square().sum()
    (found,) = torch.autograd.grad(loss, model.features.transition1.conv.weight, retain_graph=True)
    return loss, found


def test_gradients_of_parts_first_then_of_all(backend: str, recompute: str) -> None:
    ours, eager = pair(recompute)
    x = images()
    found = []
    for model in (ours, eager):
        loss, first = gradient_of_the_transition(model, x)
        weight = model.features.transition3.conv.weight
        found.append([first, *torch.autograd.grad(loss, weight, retain_graph=True)])
        loss.backward()
    for mine, theirs in zip(*found, strict=True):
        assert_equal(mine, theirs, "gradient of a transition's weight")
    assert_same_state(ours, eager)


WRITTEN: dict[str, Callable[[nn.Module], Tensor]] = {
    "a convolution's weight": lambda m: m.features.denseblock1.denselayer1.conv2.weight,
    "a norm's weight": lambda m: m.features.denseblock1.denselayer2.norm1.weight,
    "a transition's weight": lambda m: m.features.transition1.conv.weight,
    "a transition's norm": lambda m: m.features.transition1.norm.weight,
    "the stem's norm": lambda m: m.features.norm0.weight,
}


@pytest.mark.parametrize("what", WRITTEN)
def test_a_write_into_a_parameter_before_backward_is_an_error(recompute: str, what: str) -> None:
    """As in eager PyTorch."""
    for model in pair(recompute):
        loss = model(images()).square().sum()
        with torch.no_grad():
            WRITTEN[what](model).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("what", WRITTEN)
def test_a_write_into_a_parameter_between_two_backwards_is_an_error(recompute: str, what: str) -> None:
    """Also if the first backward has already recomputed the block's output."""
    for model in pair(recompute):
        loss, _ = gradient_of_the_transition(model, images())
        with torch.no_grad():
            WRITTEN[what](model).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_write_during_backward_is_an_error(recompute: str) -> None:
    """By a hook that runs after the transition's backward and before that of the block in front of it."""
    for model in pair(recompute):
        weight = model.features.denseblock1.denselayer1.conv2.weight

        def write(_: Tensor, weight: Tensor = weight) -> None:
            weight.detach().mul_(2)

        model.features.transition1.conv.weight.register_post_accumulate_grad_hook(write)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(images()).square().sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_write_into_the_input_is_an_error(recompute: str, training: bool) -> None:
    block = dense_ext.swap(small_densenet(), recompute=recompute).features.denseblock1.train(training)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    y = block(x)
    (x if recompute == "block" else y).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_may_change_before_backward_in_training(recompute: str) -> None:
    """A second forward updates them; in training mode backward does not read them."""
    ours, eager = pair(recompute)
    x, other = images(), images()
    for model in (ours, eager):
        loss = model(x).square().sum()
        with torch.no_grad():
            model(other)
        loss.backward()
    assert_same_state(ours, eager)


class Mode(TorchDispatchMode):
    """Inside it PyTorch does not count the writes of its ``_foreach`` functions."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [nullcontext, Mode])
def test_running_statistics_that_backward_reads_may_not_change(recompute: str, mode: Any) -> None:
    """A step in training mode comes between a forward in eval mode and its backward.

    Eager's gradient is wrong: it takes the new statistics for those of the forward.
    """
    ours, _ = pair(recompute)
    loss = ours.eval()(images()).square().sum()
    with mode():
        ours.train()(images())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_biases_are_trained(recompute: str) -> None:
    """Eager's backward does not read them, so that a step of the optimizer may come before it."""
    ours, eager = pair(recompute)
    batches = images(), images()
    for model in (ours, eager):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for loss in [model(x).square().sum() for x in batches]:
            loss.backward()
            optimizer.step()
    assert_same_state(ours, eager)


def recomputed() -> int:
    """The number of recomputed block outputs that are alive."""
    gc.collect()
    return sum(o.value is not None for o in gc.get_objects() if type(o) is ops._Recomputed)


def fail(gradient: Tensor) -> None:
    raise KeyError


@pytest.mark.parametrize("failing", [False, True], ids=["of a part", "that failed"])
def test_recomputed_outputs_are_freed_after_a_backward(failing: bool) -> None:
    model = dense_ext.swap(small_densenet(), recompute="block")
    if failing:
        loss = model(images()).square().sum()
        model.features.transition1.conv.weight.register_hook(fail)
        with pytest.raises(KeyError):
            loss.backward(retain_graph=True)
    else:
        loss, _ = gradient_of_the_transition(model, images())
    assert recomputed() == 0
    assert loss.grad_fn is not None, "and the graph is still there"


def test_a_write_after_a_backward_that_failed_is_an_error(recompute: str) -> None:
    """A backward that fails between a transition and its block leaves nothing for the next."""
    for model in pair(recompute):
        loss = model(images()).square().sum()
        handle = model.features.transition1.conv.weight.register_hook(fail)
        with pytest.raises(KeyError):
            loss.backward(retain_graph=True)
        handle.remove()
        with torch.no_grad():
            WRITTEN["a convolution's weight"](model).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


MANY_THREADS = """
import sys, threading, time
import torch, dense_ext
from dense_ext import ops
from torch.utils._python_dispatch import TorchDispatchMode

sys.setswitchinterval(1e-6)
torch.set_num_threads(1)
probe = ops._probe_ownership

def slow_probe():
    time.sleep(0.1)
    probe()
    time.sleep(0.1)

ops._probe_ownership = slow_probe
THREADS, STEPS = 8, 2
start, wrong = threading.Barrier(THREADS), []

class InPlace(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.dense_ext.dense_block_backward_.default
        return func(*args, **(kwargs or {}))

def backward(hold):
    block = dense_ext.DenseBlock(2, 6, 5, 2).double()
    y = block(torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True))
    weight, held = torch.randn_like(y), []
    if hold:
        y.register_hook(held.append)
    loss = (y * weight).sum()
    with InPlace() as found:
        loss.backward()
    if hold and not torch.equal(held[0], weight):
        wrong.append("a gradient that a hook holds was overwritten")
    return found.count

def work(i):
    start.wait()
    for step in range(STEPS):
        backward(hold=(i + step) % 2)

threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not wrong, wrong
assert backward(hold=False) == 1, "an exclusive gradient is reused"
assert backward(hold=True) == 0 and not wrong
"""


UNDER_A_MODE = """
import torch, dense_ext
from torch.utils._python_dispatch import TorchDispatchMode

class Keeping(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.results.append(func(*args, **(kwargs or {})))
        return self.results[-1]

def backward():
    y = dense_ext.DenseBlock(2, 6, 5, 2).double()(torch.randn(2, 6, 4, 4, dtype=torch.float64))
    weight, held = torch.randn_like(y), []
    y.register_hook(held.append)
    (y * weight).sum().backward()
    assert torch.equal(held[0], weight), "a gradient that a hook holds was overwritten"

with Keeping():
    backward()
backward()
"""


def test_a_first_backward_under_a_mode_that_keeps_results() -> None:
    """It makes no later backward take a gradient that one hook holds for one that nobody does."""
    done = subprocess.run([sys.executable, "-c", UNDER_A_MODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_first_backwards_in_many_threads_overwrite_no_gradient_that_is_held() -> None:
    """Meanwhile one of the threads slowly takes the counts of an exclusive gradient."""
    done = subprocess.run([sys.executable, "-c", MANY_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
