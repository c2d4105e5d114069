"""Memory is deterministic: the bytes kept for backward, and the peak of a training step."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.models import densenet121

import dense_ext
from dense_ext.benchmark.memory import allocation_levels, saved_bytes

MB = 1e6


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)


def swapped(recompute: str) -> torch.nn.Module:
    return dense_ext.swap(densenet121().to(memory_format=torch.channels_last), recompute=recompute)


@pytest.mark.parametrize(("recompute", "limit"), [("bottleneck", 10.5), ("block", 6.5)])
def test_kept_for_backward(recompute: str, limit: float) -> None:
    """A tenth of eager's 130 MB per image: 4.0 for the stem, 5.8 for the four buffers, 0.2 for the head."""
    model, x = swapped(recompute), images(2)
    assert saved_bytes(model, lambda: model(x).sum()) / 2 <= limit * MB


@pytest.mark.parametrize(("recompute", "limit"), [("bottleneck", 10.5), ("block", 6.5)])
def test_allocated_after_forward(recompute: str, limit: float) -> None:
    """After the forward nothing else holds memory: the allocator's bytes are those that autograd keeps."""
    model, x = swapped(recompute), images(2)
    model(x)
    assert allocation_levels(lambda: model(x).sum())[-1] / 2 <= limit * MB


def test_peak_of_a_training_step() -> None:
    """At batch 8, with the parameters' gradients in place, 8.5 times below eager's 125 MB per image."""
    model, x = swapped("bottleneck"), images(8)

    def step() -> None:
        model(x).sum().backward()

    step()
    assert 9 * MB < max(allocation_levels(step)) / 8 <= 125 * MB / 8.5


def test_nothing_is_kept_without_gradients() -> None:
    model, x = swapped("none").eval(), images(1)
    with torch.no_grad():
        assert saved_bytes(model, lambda: model(x).sum()) == 0


def test_grows_linearly_with_depth() -> None:
    """Each layer adds K channels of X and its norms' statistics, and nothing that grows with depth."""
    sizes = []
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    for layers in (100, 200, 300):
        block = dense_ext.DenseBlock(layers, 8, 4, bn_size=1)
        sizes.append(saved_bytes(block, lambda b=block: b(x).sum()))
    steps = [b - a for a, b in itertools.pairwise(sizes)]
    assert steps[0] == steps[1]
