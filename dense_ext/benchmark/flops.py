"""A network's arithmetic, counted without doing it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def without_memory() -> AbstractContextManager[object]:
    """While active, tensors have shapes and no values: nothing is allocated or computed."""
    return FakeTensorMode()


def flops_per_image(build: Callable[[], nn.Module], size: int, backward: bool) -> int:
    """Floating-point operations per image of convolutions and matrix products, 2 per multiply-add.

    Args:
        build: makes the network; called without memory.
        size: height and width of the images in pixels.
        backward: count forward and backward rather than forward alone.
    """
    with without_memory(), FlopCounterMode(display=False) as counter:
        output = build().train()(torch.randn(2, 3, size, size))
        if backward:
            output.sum().backward()
    return counter.get_total_flops() // 2
