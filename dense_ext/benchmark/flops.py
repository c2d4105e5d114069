"""A network's arithmetic, counted without doing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

_BATCH = 2  # batch norm refuses a single value per channel


def without_memory() -> AbstractContextManager[object]:
    """While active, tensors have shapes and no values: nothing is allocated or computed."""
    return FakeTensorMode()


def flops_per_image(build: Callable[[], nn.Module], shape: Sequence[int], backward: bool) -> int:
    """Floating-point operations per image of convolutions and matrix products, 2 per multiply-add.

    Args:
        build: makes the network; called without memory.
        shape: of an image, C, H and W.
        backward: count forward and backward rather than forward alone.
    """
    with without_memory():
        network, images = build().train(), torch.randn(_BATCH, *shape)
        with FlopCounterMode(display=False) as counter:
            output = network(images)
            if backward:
                output.sum().backward()
    return int(counter.get_total_flops()) // _BATCH
