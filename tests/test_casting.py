"""Casting many tensors in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense_ext.casting import cast


def weights() -> list[Tensor]:
    """Of several dtypes, shapes and memory formats; one takes no gradient."""
    made = [
        torch.randn(4, 3, 1, 1),
        torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 5, dtype=torch.float64),
        torch.randn(6, dtype=torch.bfloat16),
    ]
    return [tensor.requires_grad_() for tensor in made] + [torch.randn(7)]


def test_equals_a_cast_each() -> None:
    tensors = weights()
    for got, tensor in zip(cast(tensors, torch.bfloat16), tensors, strict=True):
        expected = tensor.to(torch.bfloat16)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
        assert got.requires_grad == tensor.requires_grad
    assert cast(tensors, torch.bfloat16)[3] is tensors[3]


def test_gradients() -> None:
    tensors, copies = weights(), []
    for tensor in tensors:
        copies.append(tensor.detach().clone().requires_grad_(tensor.requires_grad))
    for of, casts in ((tensors, cast(tensors, torch.bfloat16)), (copies, [c.bfloat16() for c in copies])):
        del casts[0], of[0]  # one that has no gradient
        torch.stack([(c.double() ** 3).sum() for c in casts]).sum().backward()
    for tensor, copied in zip(tensors, copies, strict=True):
        assert (tensor.grad is None) == (copied.grad is None)
        if tensor.grad is not None and copied.grad is not None:
            assert tensor.grad.dtype == tensor.dtype
            assert torch.equal(tensor.grad, copied.grad)


def test_differentiable_twice() -> None:
    tensors = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    total = torch.stack([(c.double() ** 3).sum() for c in cast(tensors, torch.float32)]).sum()
    grads = torch.autograd.grad(total, tensors, create_graph=True)
    seconds = torch.autograd.grad(torch.stack([g.sum() for g in grads]).sum(), tensors)
    for tensor, second in zip(tensors, seconds, strict=True):
        torch.testing.assert_close(second, 6 * tensor.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_gradients(count: int) -> None:
    tensors = [torch.randn(3, requires_grad=True) for _ in range(count)]
    with torch.no_grad():
        found = cast(tensors, torch.float16)
    assert [c.dtype for c in found] == [torch.float16] * count
    assert not any(c.requires_grad for c in found)
