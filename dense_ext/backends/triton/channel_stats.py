"""channel_stats: mean and biased variance of each channel of x [M, C], with any pixel stride.

Elements moved per pixel: C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    Kernel,
    alignment_of,
    configure,
    partial_results,
    persistent_programs,
    pixels_of,
    plan,
    zero,
)
from .reduce import bind_merge
from .tiles import add_moments, store_moments


@triton.jit
def channel_stats_kernel(
    x_ptr,
    partials_vec,
    M,
    c_units,
    x_units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of C, programs that share the tiles of pixels)."""
    C = c_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = (m < M)[:, None]
        at = m.to(tl.int64)[:, None] * UNIT * x_units + c[None, :]
        x = tl.load(x_ptr + at, mask=m_ok & c_ok[None, :], other=0.0)
        rows = tl.minimum(M - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        count, mean, m2 = add_moments(count, mean, m2, x.to(tl.float32), m_ok, rows)
    store_moments(
        partials_vec, tl.program_id(1), tl.num_programs(1), c, c_ok, C, count, mean, m2,
        tl.program_id(0) == 0,
    )  # fmt: skip


_kernel = Kernel(channel_stats_kernel)


@plan
def _plan(pixels, channels, stride, dtype, alignment, device):
    unit = alignment // dtype.itemsize
    config = configure(_kernel, device, "any", (pixels, channels)).fit(BLOCK_C=channels)
    blocks = triton.cdiv(channels, config.blocks["BLOCK_C"])
    programs = persistent_programs(device, pixels, config, blocks)
    launch = _kernel.bind(
        device,
        (blocks, programs),
        (dtype, torch.float32),
        (pixels, channels // unit, stride // unit),
        alignment,
        config,
        UNIT=unit,
    )
    return (2 * channels + 1) * programs, launch, bind_merge(device, programs, channels, pixels)


def channel_stats(x: Tensor, mean: Tensor, var: Tensor) -> None:
    if x.numel() == 0:
        return zero(mean, var)
    channels, stride = x.shape[3], x.stride(2)
    alignment = alignment_of(x)
    length, launch, merge = _plan(pixels_of(x), channels, stride, x.dtype, alignment, x.get_device())
    partials = partial_results(length, x)
    launch(x, partials)
    return merge(partials, mean, var)
