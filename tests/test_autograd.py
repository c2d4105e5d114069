"""Gradients for every way of using a graph; gradients that other code holds are not modified."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import dense_ext

from .helpers import (
    BackwardBuffers,
    assert_equal,
    assert_same_state,
    assert_trains_alike,
    eager_block,
    eager_transition,
    small_densenet,
    twin,
)


def block_input(batch: int = 2, height: int = 4, width: int = 3, channels: int = 6) -> Tensor:
    return torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)


def as_functional(module: nn.Module, x: Tensor) -> tuple[object, tuple[Tensor, ...]]:
    """The module as a function of x and its parameters."""
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, state, (x,))  # type: ignore[no-any-return]

    return function, (x, *(p.detach().clone().requires_grad_() for p in module.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_block(backend: str, recompute: str, training: bool) -> None:
    block = dense_ext.swap(eager_block(2, 3, 2, 1), recompute=recompute).train(training)
    function, inputs = as_functional(block, block_input(2, 3, 2, channels=3))
    # Check every entry of the Jacobian for the default policy, and random projections for the others.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=recompute != "bottleneck")


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_transition(backend: str, training: bool) -> None:
    model = nn.Sequential(eager_block(1, 2, 2, 1), eager_transition(4, 2))
    function, inputs = as_functional(dense_ext.swap(model).train(training), block_input(2, 3, 2, channels=2))
    assert torch.autograd.gradcheck(function, inputs)


def test_gradcheck_stem(backend: str) -> None:
    net = small_densenet()
    stem = dense_ext.swap(net).features[1:4]
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    function, inputs = as_functional(stem, x)
    assert torch.autograd.gradcheck(function, inputs)


def test_two_forwards_before_one_backward(backend: str, recompute: str) -> None:
    ours, eager = twin(eager_block(), lambda m: dense_ext.swap(m, recompute=recompute))
    x1, x2 = block_input(), block_input(3)
    for model in (ours, eager):
        (model(x1).square().sum() * model(x2).sum()).backward()
    assert_same_state(ours, eager)


def test_same_block_twice_in_a_graph(backend: str, recompute: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = eager_block(2, channels=6, growth_rate=3)
            self.reduce = nn.Conv2d(12, 6, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.reduce(self.block(x)))  # type: ignore[no-any-return]

    ours, eager = twin(Twice(), lambda m: dense_ext.swap(m, recompute=recompute))
    assert_trains_alike(ours, eager, block_input(3, 5, 4).detach())


def test_retained_graph(backend: str, recompute: str) -> None:
    ours, eager = twin(
        nn.Sequential(eager_block(), eager_transition(21, 4)),
        lambda m: dense_ext.swap(m, recompute=recompute),
    )
    x = block_input(2, 4, 4)
    for model in (ours, eager):
        y = model(x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
    assert_same_state(ours, eager)


def test_output_used_by_several(backend: str, recompute: str) -> None:
    """The transition is not the only user of the block's output, as in feature pyramids."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.transition = eager_block(), eager_transition(21, 4)

        def forward(self, x: Tensor) -> Tensor:
            features = self.block(x)
            return self.transition(features).sum() + features.square().sum()  # type: ignore[no-any-return]

    ours, eager = twin(Pyramid(), lambda m: dense_ext.swap(m, recompute=recompute))
    x = block_input(2, 4, 4)
    for model in (ours, eager):
        model(x).backward()
    assert_same_state(ours, eager)


@pytest.mark.parametrize("needs", ["input only", "parameters only", "nothing"])
def test_partial_gradients(backend: str, recompute: str, needs: str) -> None:
    ours, eager = twin(
        nn.Sequential(eager_block(), eager_transition(21, 4)),
        lambda m: dense_ext.swap(m, recompute=recompute),
    )
    x = block_input(2, 4, 4).requires_grad_(needs == "input only")
    results = []
    for model in (ours, eager):
        model.requires_grad_(needs == "parameters only")
        y = model(x)
        assert y.requires_grad == (needs != "nothing")
        if y.requires_grad:
            y.square().sum().backward()
        results.append(x.grad)
        x.grad = None
    assert_equal(results[0], results[1], "input gradient")
    assert_same_state(ours, eager)


class TestGradientsOthersHold:
    """The backward accumulates in place only into a gradient that no other code holds."""

    def captured(self, capture: str) -> tuple[Tensor, Tensor]:
        """The gradient of a block's output that other code holds, and its expected value."""
        block = dense_ext.swap(eager_block())
        x = block_input()
        y = block(x)
        weight = torch.randn_like(y).contiguous(memory_format=torch.channels_last)
        held: list[Tensor] = []
        storages: list[Any] = []
        if capture == "tensor hook":
            y.register_hook(held.append)
        elif capture == "hook keeping a view":
            y.register_hook(lambda g: held.append(g[:, :].detach()))
        elif capture == "hook keeping the storage":
            y.register_hook(lambda g: storages.append((g.untyped_storage(), g.shape, g.stride())))
        elif capture == "module hook":
            block.register_full_backward_hook(lambda m, gi, go: held.append(go[0]))
            y = block(x)
        elif capture == "retain_grad":
            y.retain_grad()
        if capture == "given by the user":
            held.append(weight)
            y.backward(weight)
        elif capture == "memory of NumPy's":
            constant = weight.permute(0, 2, 3, 1).numpy().copy()
            y.register_hook(lambda g: torch.from_numpy(constant.transpose(0, 3, 1, 2)))
            y.sum().backward()
            held.append(torch.from_numpy(constant.transpose(0, 3, 1, 2)))
        elif capture == "shared by an addition":
            z = torch.zeros_like(y, requires_grad=True)
            ((y + z) * weight).sum().backward()
            assert z.grad is not None
            held.append(z.grad)
        else:
            (y * weight).sum().backward()
        if capture == "retain_grad":
            assert y.grad is not None
            held.append(y.grad)
        held += [y.new_empty(0).set_(storage, 0, *shape) for storage, *shape in storages]
        return held[0], weight

    @pytest.mark.parametrize(
        "capture",
        [
            "tensor hook",
            "hook keeping a view",
            "hook keeping the storage",
            "module hook",
            "retain_grad",
            "given by the user",
            "memory of NumPy's",
            "shared by an addition",
        ],
    )
    def test_stay_as_they_were(self, backend: str, capture: str) -> None:
        for _ in range(2):  # the second time, the counts of an exclusive gradient are known
            held, expected = self.captured(capture)
            assert torch.equal(held, expected)

    def test_an_exclusive_gradient_is_reused(self, backend: str) -> None:
        """Otherwise the step's peak memory would be a quarter higher, which no other test would notice."""
        block = dense_ext.swap(eager_block())
        y = block(block_input())
        weight = torch.randn_like(y).contiguous(memory_format=torch.channels_last)
        pointers: list[int] = []
        y.register_hook(lambda g: pointers.append(g.data_ptr()))
        loss = (y * weight).sum()
        with BackwardBuffers() as buffers:
            loss.backward()
        assert buffers.pointers == pointers


class TestHooksInside:
    """A hook on an inner module makes its block run layer by layer while the hook is there."""

    def test_hook_is_called_and_nothing_changes(self, backend: str) -> None:
        ours, eager = twin(small_densenet(), dense_ext.swap)
        calls: list[str] = []
        handles = [
            ours.features.denseblock2.denselayer2.conv1.register_forward_hook(
                lambda *_: calls.append("conv1")
            ),
            ours.features.transition1.norm.register_forward_hook(lambda *_: calls.append("norm")),
            ours.features.relu0.register_forward_hook(lambda *_: calls.append("relu0")),
        ]
        x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
        with pytest.warns(UserWarning, match="runs its original forward: .* carries a hook") as caught:
            assert_trains_alike(ours, eager, x, steps=2)
        parts = ("features", "features.transition1", "features.denseblock2")
        assert [str(w.message).split()[1] for w in caught] == list(parts), "each part warns once"
        assert sorted({*calls}) == ["conv1", "norm", "relu0"]
        runs = {row.name: row.runs for row in dense_ext.report(ours).rows}
        assert runs["features.denseblock2"] == runs["features.transition1"] == "eager"
        assert runs["features.denseblock1"] == "fused"
        for handle in handles:
            handle.remove()
        assert all(row.runs == "fused" for row in dense_ext.report(ours).rows)
        assert_trains_alike(ours, eager, x, steps=1)
        assert len(calls) == 6

    def test_exchanged_norm(self, backend: str) -> None:
        ours, eager = twin(small_densenet(), dense_ext.swap)
        for model in (ours, eager):
            model.features.denseblock1.denselayer1.norm2 = nn.GroupNorm(3, 15).double()
        with pytest.warns(UserWarning, match="denseblock1 runs .*: denselayer1: norm2 is GroupNorm"):
            assert_trains_alike(ours, eager, torch.randn(2, 3, 40, 40, dtype=torch.float64), steps=1)

    def test_pruning_and_parametrization(self, backend: str) -> None:
        def shrink(model: nn.Module) -> None:
            conv = model.features.denseblock1.denselayer1.conv2
            prune.l1_unstructured(conv, "weight", amount=0.5)
            nn.utils.parametrizations.weight_norm(model.features.denseblock2.denselayer1.conv1)

        ours, eager = twin(small_densenet(), dense_ext.swap)
        shrink(ours)
        shrink(eager)
        x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
        with pytest.warns(UserWarning, match="runs its original forward") as caught:
            assert_equal(ours(x), eager(x), "output")
        assert "denseblock1" in str(caught[0].message)
        assert "ParametrizedConv2d, not Conv2d" in str(caught[1].message)


def test_backward_uses_the_backend_of_its_forward() -> None:
    block = dense_ext.swap(eager_block())
    x = block_input()
    with dense_ext.use_backend("reference"):
        y = block(x)
    copied = y.grad_fn
    assert copied is not None
    ((node, _),) = copied.next_functions  # a block by itself returns a copy of its result
    assert node.constants[-1] == "reference"
    y.sum().backward()


def test_gradient_checkpointing_around_a_block(backend: str, recompute: str) -> None:
    block = dense_ext.swap(eager_block().eval(), recompute=recompute)
    plain = copy.deepcopy(block)
    x = block_input()
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    plain(x.detach().requires_grad_()).square().sum().backward()
    assert_same_state(block, plain)
