"""Launches the second stage of the reductions; its kernels are in :mod:`.tiles`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from .configs import Config
from .launch import Kernel
from .tiles import merge_moments_kernel, reduce_partials_kernel

# Second stages read at most a few MB, from the L2 cache, so there is nothing to tune.
_MERGE = Config({"BLOCK_P": 64, "BLOCK_C": 16})
_REDUCE = Config({"BLOCK_P": 16, "BLOCK": 128})

_merge = Kernel(merge_moments_kernel)
_reduce = Kernel(reduce_partials_kernel)


def bind_merge(device: int, programs: int, channels: int, pixels: int) -> Callable[..., None]:
    """Returns a launch that merges the moments of ``programs`` programs: ``launch(partials, mean, var)``."""
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
    """Returns a launch that adds the programs' partial results: ``launch(partials, sums, weight_gradient)``.

    Args:
        programs: the number of programs, each of which left one row of partial results.
        sums: the number of channel sums at the start of a row; 0 if there are none.
        dtype: the weight gradient's dtype.
        shape: the weight gradient's axes in the order in which a row holds them.
        strides: the strides of those axes in the gradient; None if there is no gradient.
    """
    if strides is None:
        dtype, shape, strides = None, (0, 0, 0), (0, 0, 0)
    row = sums + shape[0] * shape[1] * shape[2]
    types = (torch.float32, torch.float32 if sums else None, dtype)
    grid = (triton.cdiv(row, _REDUCE.blocks["BLOCK"]),)
    return _reduce.bind(device, grid, types, (programs, row, sums, *shape[1:], *strides), config=_REDUCE)
