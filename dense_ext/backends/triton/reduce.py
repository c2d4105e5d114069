"""Launching the second stage of the reductions, whose kernels are in :mod:`.tiles`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from .configs import Config
from .launch import Kernel
from .tiles import merge_moments_kernel, reduce_partials_kernel

# Second stages read a few MB at the most, from the L2 cache: nothing to tune.
_MERGE = Config({"BLOCK_P": 64, "BLOCK_C": 16})
_REDUCE = Config({"BLOCK_P": 16, "BLOCK": 128})

_merge = Kernel(merge_moments_kernel)
_reduce = Kernel(reduce_partials_kernel)


def bind_merge(device: int, programs: int, channels: int, pixels: int) -> Callable[..., None]:
    """Partial moments of ``programs`` programs to (mean, var): called with partials, mean, var."""
    grid = (triton.cdiv(channels, _MERGE.blocks["BLOCK_C"]),)
    types = (torch.float32,) * 3
    return _merge.bind(device, grid, types, (programs, channels, pixels), config=_MERGE)


def bind_reduce(
    device: int,
    programs: int,
    sums: int,
    dtype: torch.dtype | None = None,
    shape: tuple[int, int, int] = (0, 0, 0),
    strides: tuple[int, int, int] | None = None,
) -> Callable[..., None]:
    """Rows of ``sums`` sums and a weight gradient to their places: called with partials, sums, weight.

    Args:
        programs: rows to add.
        sums: how many sums lead a row; 0 if there are none.
        dtype: of the weight's gradient.
        shape: the gradient's axes in the order in which a row holds them.
        strides: of those axes in memory; None if there is no gradient.
    """
    if strides is None:
        dtype, shape, strides = None, (0, 0, 0), (0, 0, 0)
    row = sums + shape[0] * shape[1] * shape[2]
    types = (torch.float32, torch.float32 if sums else None, dtype)
    grid = (triton.cdiv(row, _REDUCE.blocks["BLOCK"]),)
    return _reduce.bind(device, grid, types, (programs, row, sums, *shape[1:], *strides), config=_REDUCE)
