"""PyTorch's ways to differentiate: forward mode, torch.func, batches of gradients, second derivatives.

A swapped network gives the same results as eager, whether its operators run fused or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import dense_ext

from .helpers import (
    Calls,
    assert_equal,
    assert_same_state,
    eager_block,
    eager_transition,
    in_three_dimensions,
    small_densenet,
    twin,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[[nn.Module, Tensor], Any]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 33, 32, dtype=torch.float64)


def pair(recompute: str = "bottleneck", training: bool = True) -> tuple[nn.Module, nn.Module]:
    """A swapped network and its eager twin."""
    return twin(small_densenet().train(training), lambda m: dense_ext.swap(m, recompute=recompute))


def same_values(actual: Any, expected: Any) -> None:
    """Assert that two trees of tensors have the same structure and equal tensors."""
    (a, form), (e, expected_form) = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert form == expected_form
    assert any(torch.count_nonzero(tensor) for tensor in e)
    for i, (one, other) in enumerate(zip(a, e, strict=True)):
        assert_equal(one.detach(), other.detach(), f"value {i}")


def values(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's parameters and buffers, detached."""
    named = model.named_parameters(), model.named_buffers()
    parameters, buffers = ({name: t.detach().clone() for name, t in group} for group in named)
    return parameters, buffers


def loss(model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.softplus(functional_call(model, (parameters, buffers), (x,))).square().sum()


# --- forward mode and torch.func ----------------------------------------------------------------------


def tangent_of_dual_numbers(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.sin()))).tangent


def tangent_with_frozen_parameters(model: nn.Module, x: Tensor) -> Tensor:
    return tangent_of_dual_numbers(model.requires_grad_(False), x)


@torch.no_grad()
def tangent_without_a_graph(model: nn.Module, x: Tensor) -> Tensor:
    return tangent_of_dual_numbers(model, x)


def jvp_over_parameters(model: nn.Module, x: Tensor) -> Tensor:
    parameters, buffers = values(model)
    direction = {name: p.cos() for name, p in parameters.items()}
    return jvp(lambda p: functional_call(model, (p, buffers), (x,)), (parameters,), (direction,))


def jacfwd_along_a_line(model: nn.Module, x: Tensor) -> Tensor:
    return jacfwd(lambda s: model(x * s))(torch.ones((), dtype=x.dtype))


def grad_over_parameters(model: nn.Module, x: Tensor) -> Any:
    return grad(lambda p, b: loss(model, p, b, x))(*values(model))


def vjp_over_parameters(model: nn.Module, x: Tensor) -> Any:
    parameters, buffers = values(model)
    y, back = vjp(lambda p: functional_call(model, (p, buffers), (x,)), parameters)
    return y, back(y.sin())


def grad_over_images(model: nn.Module, x: Tensor) -> Tensor:
    return grad(lambda x: model(x).square().sum())(x)


def gradients_of_each_sample(model: nn.Module, x: Tensor) -> Any:
    one = grad(lambda p, b, x: loss(model, p, b, x[None]))
    return vmap(one, in_dims=(None, None, 0))(*values(model), x)


def jacrev_over_images(model: nn.Module, x: Tensor) -> Tensor:
    return jacrev(model)(x[:1])


def hessian_along_a_line(model: nn.Module, x: Tensor) -> Tensor:
    return hessian(lambda s: F.softplus(model(x * s)).sum())(torch.ones((), dtype=x.dtype))


def batched_over_images(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(model)(x[:, None])


def steps_on_replaced_parameters(model: nn.Module, x: Tensor) -> Any:
    """First-order MAML: autograd's gradients with respect to the parameters that functional_call passes."""
    fast = dict(model.named_parameters())
    for _ in range(2):
        gradients = torch.autograd.grad(functional_call(model, fast, (x,)).square().sum(), fast.values())
        fast = {name: p - 1e-3 * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
    return fast


def gradients_in_a_batch(model: nn.Module, x: Tensor) -> Any:
    y = model(x)
    directions = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    return torch.autograd.grad(y, [*model.parameters()], directions, is_grads_batched=True)


def vectorized_jacobian(model: nn.Module, x: Tensor) -> Any:
    return torch.autograd.functional.jacobian(model, x, vectorize=True)


# In training mode, eager's batch norm refuses to update its statistics inside most torch.func transforms.
IN_EITHER_MODE = (
    tangent_of_dual_numbers, tangent_with_frozen_parameters, tangent_without_a_graph, grad_over_parameters,
    steps_on_replaced_parameters, gradients_in_a_batch, vectorized_jacobian,
)  # fmt: skip
IN_EVAL = (
    *IN_EITHER_MODE, jvp_over_parameters, jacfwd_along_a_line, vjp_over_parameters, grad_over_images,
    gradients_of_each_sample, jacrev_over_images, hessian_along_a_line, batched_over_images,
)  # fmt: skip
CASES = [*((run, True) for run in IN_EITHER_MODE), *((run, False) for run in IN_EVAL)]


@pytest.mark.parametrize(
    ("run", "training"), CASES, ids=[f"{run.__name__}-{'train' if t else 'eval'}" for run, t in CASES]
)
def test_a_transformed_network_equals_eager(run: Run, training: bool) -> None:
    ours, eager = pair(training=training)
    x = images()
    same_values(run(ours, x), run(eager, x))
    assert_same_state(ours, eager)
    assert all(row.runs == "fused" for row in dense_ext.report(ours).rows), "all parts are fused again"


def test_a_batch_of_gradients_under_every_policy(backend: str, recompute: str) -> None:
    """The forward has run fused, and only its backward gets the batch of gradients."""
    ours, eager = pair(recompute)
    x = images()
    same_values(gradients_in_a_batch(ours, x), gradients_in_a_batch(eager, x))


def test_after_a_transform_the_network_runs_fused_again() -> None:
    ours, eager = pair(training=False)
    x = images()
    for _ in range(2):
        same_values(grad_over_images(ours, x), grad_over_images(eager, x))
        with Calls() as calls:
            assert_equal(ours(x), eager(x), "output")
        assert calls.names.count("dense_block") == 4


# --- second derivatives ----------------------------------------------------------------------------------


def gradient_penalty(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As in WGAN-GP: a loss on the norm of the input's gradient, trained with backward()."""
    leaf = x.clone().requires_grad_()
    y = F.softplus(model(leaf)).square().sum()
    (gradient,) = torch.autograd.grad(y, leaf, create_graph=True)
    (y + 0.1 * gradient.square().sum()).backward()
    return [gradient, leaf.grad]


def gradient_norm_of_parameters(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As for sharpness and gradient matching: backward through the gradients of all parameters."""
    leaf = x.clone().requires_grad_()
    y = F.softplus(model(leaf)).square().sum()
    gradients = torch.autograd.grad(y, [*model.parameters()], create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    return [*gradients, leaf.grad]


def hessian_vector_product(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    y = F.softplus(model(x)).square().sum()
    gradients = torch.autograd.grad(y, parameters, create_graph=True)
    return torch.autograd.grad(gradients, parameters, [p.detach().cos() for p in parameters])


def gradients_kept_by_backward(model: nn.Module, x: Tensor) -> list[Tensor]:
    """backward(create_graph=True), as second-order optimizers call it."""
    F.softplus(model(x)).square().sum().backward(create_graph=True)
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)


def of_a_single_transition(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A second derivative for one weight of a transition, and then one for all weights."""
    y = F.softplus(model(x)).square().sum()
    weight = model.features.transition1.conv.weight
    (first,) = torch.autograd.grad(y, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight, retain_graph=True)
    y.backward()
    return [first, second]


SECOND = (
    gradient_penalty, gradient_norm_of_parameters, hessian_vector_product, gradients_kept_by_backward,
    of_a_single_transition,
)  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("run", SECOND, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_second_derivatives_are_eagers(recompute: str, run: Run, training: bool) -> None:
    """The running statistics count one step, although backward recomputes layers."""
    ours, eager = pair(recompute, training)
    x = images()
    same_values(run(ours, x), run(eager, x))
    assert_same_state(ours, eager)
    counters = {int(b) for name, b in ours.named_buffers() if name.endswith("num_batches_tracked")}
    assert counters == {int(training)}


def test_second_derivatives_on_every_backend(backend: str) -> None:
    ours, eager = pair()
    x = images()
    same_values(gradient_penalty(ours, x), gradient_penalty(eager, x))
    assert_same_state(ours, eager)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives_for_volumes(recompute: str, training: bool) -> None:
    blocks = in_three_dimensions(nn.Sequential(eager_block(2), eager_transition(16, 4), eager_block(1, 4)))
    stem = nn.Conv3d(1, 6, 3, bias=False), nn.BatchNorm3d(6), nn.ReLU(inplace=True), nn.MaxPool3d(3, 2, 1)
    # So that ReLU cuts off some windows' maxima; otherwise this bias's gradient would be zero.
    nn.init.constant_(stem[1].bias, -1.5)
    network = nn.Sequential(*stem, *blocks).double().train(training)
    ours, eager = twin(network, lambda m: dense_ext.swap(m, recompute=recompute, strict=True))
    x = torch.randn(2, 1, 6, 11, 9, dtype=torch.float64)
    for run in (gradient_penalty, hessian_vector_product):
        same_values(run(ours, x), run(eager, x))
    assert_same_state(ours, eager)


def test_second_derivatives_with_dropout_are_those_of_one_mask() -> None:
    """All policies give the same for the same seed; gradgradcheck below verifies that it is right."""
    results = []
    for policy in ("none", "bottleneck", "block"):
        torch.manual_seed(0)
        ours = dense_ext.swap(small_densenet(drop_rate=0.3), recompute=policy)
        x = images()
        found = [*gradient_penalty(ours, x), *hessian_vector_product(ours, x)]
        results.append([*found, *(p.grad for p in ours.parameters())])
    for other in results[1:]:
        same_values(other, results[0])


@pytest.mark.parametrize("policy", ["none", "bottleneck", "block"])
def test_a_gradient_to_be_differentiated_again_has_forwards_masks(policy: str) -> None:
    model = dense_ext.swap(small_densenet(drop_rate=0.3), recompute=policy)
    x = images().requires_grad_()
    y = model(x).square().sum()
    inputs = [x, *model.parameters()]
    once = torch.autograd.grad(y, inputs, retain_graph=True)
    same_values(torch.autograd.grad(y, inputs, create_graph=True), once)


def dropping_block() -> tuple[nn.Module, tuple[int, ...]]:
    return eager_block(2, 3, 2, 1, drop_rate=0.4), (2, 3, 3, 2)


def transition_behind_a_block() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(eager_block(1, 2, 2, 1), eager_transition(4, 2)), (2, 2, 3, 2)


def stem() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*small_densenet().features[1:4], eager_block(1, 8, 1, 1)), (2, 8, 3, 4)


@pytest.mark.parametrize(
    ("make", "policy", "training"),
    [
        (dropping_block, "none", True),
        (dropping_block, "bottleneck", True),
        (dropping_block, "block", True),
        (dropping_block, "block", False),
        (transition_behind_a_block, "block", True),
        (transition_behind_a_block, "none", False),
        (stem, "none", True),
        (stem, "none", False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradgradcheck(
    make: Callable[[], tuple[nn.Module, tuple[int, ...]]], policy: str, training: bool
) -> None:
    model, size = make()
    dense_ext.swap(model, recompute=policy).train(training)
    names = [name for name, _ in model.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(7)  # the mask's seed
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [torch.randn(size, dtype=torch.float64), *model.parameters()]
    inputs = tuple(t.detach().clone().requires_grad_() for t in leaves)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
