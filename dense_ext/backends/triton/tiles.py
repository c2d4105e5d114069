"""Code shared by the kernels: activation, channel moments, and the second stage of every reduction.

In a kernel that reduces over pixels, each program writes one row of partial results. A small kernel here
adds the rows in a fixed order, without atomics, so equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_two_axes():
    """The index of a program's tile, which the grid's second and third axes hold (launch.two_axes)."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def pre_activation(x, scale, shift):
    """``scale*x + shift`` in float32. Shapes: x [M, C]; scale, shift [C]."""
    return x.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def relu(x):
    """``max(x, 0)``, and NaN where x is NaN, as in PyTorch."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def masked_gradient(da, x, scale, shift, mean, sum_g, sum_gx):
    """ReLU's backward: g [M, C] from da [M, C]. Adds g's channel sums to sum_g and sum_gx [C]."""
    g = tl.where(pre_activation(x, scale, shift) <= 0, 0.0, da)
    sum_g += tl.sum(g, 0)
    sum_gx += tl.sum(g * (x.to(tl.float32) - mean[None, :]), 0)
    return g, sum_g, sum_gx


@triton.jit
def add_moments(count, mean, m2, values, valid, tile_count):
    """Merge a tile's moments into a program's (count, mean, M2) by Chan's formula.

    M2 is the sum of squared deviations from the mean. Shapes: values [M, C] float32; valid [M, 1];
    mean, m2 [C]. ``tile_count`` is the number of valid rows.
    """
    tile_mean = tl.sum(tl.where(valid, values, 0.0), 0) / tile_count
    deviation = tl.where(valid, values - tile_mean[None, :], 0.0)
    tile_m2 = tl.sum(deviation * deviation, 0)
    total = count + tile_count
    delta = tile_mean - mean
    mean += delta * (tile_count / total)
    m2 += tile_m2 + delta * delta * (count * tile_count / total)
    return total, mean, m2


@triton.jit
def store_moments(partials_vec, program, programs, channels, ok, C, count, mean, m2, writes_count):
    """Write a program's moments to the partial results: means [P, C], M2s [P, C], counts [P]."""
    row = program.to(tl.int64) * C + channels
    tl.store(partials_vec + row, mean, mask=ok)
    tl.store(partials_vec + programs.to(tl.int64) * C + row, m2, mask=ok)
    tl.store(partials_vec + 2 * programs.to(tl.int64) * C + program, count, mask=writes_count)


@triton.jit
def merge_moments_kernel(
    partials_vec, mean_vec, var_vec, P, C, M, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The mean and biased variance over all M pixels, from the moments of P groups of them."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = channels < C
    size = P.to(tl.int64) * C
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        count = tl.load(partials_vec + 2 * size + p, mask=p < P, other=0.0)
        at = p[:, None] * C.to(tl.int64) + channels[None, :]
        mean = tl.load(partials_vec + at, mask=(p < P)[:, None] & ok[None, :], other=0.0)
        total += tl.sum(mean * count[:, None], 0)
    union = total / M
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & ok[None, :]
        count = tl.load(partials_vec + 2 * size + p, mask=p < P, other=0.0)
        at = p[:, None] * C.to(tl.int64) + channels[None, :]
        mean = tl.load(partials_vec + at, mask=inside, other=0.0)
        own = tl.load(partials_vec + size + at, mask=inside, other=0.0)
        offset = mean - union[None, :]
        m2 += tl.sum(tl.where(inside, own + offset * offset * count[:, None], 0.0), 0)
    tl.store(mean_vec + channels, union, mask=ok)
    tl.store(var_vec + channels, m2 / M, mask=ok)


@triton.jit
def reduce_partials_kernel(
    partials_vec,
    sums_vec,
    weight_ptr,
    P,
    row_size,
    sums_size,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add P rows of float32: the first ``sums_size`` columns are sums, the rest a weight gradient.

    Column ((i0 * size1) + i1) * size2 + i2 of the weight gradient is stored at offset
    i0*stride0 + i1*stride1 + i2*stride2. Either output may be None; then no column belongs to it.
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < row_size
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p[:, None] * row_size.to(tl.int64) + columns[None, :]
        total += tl.sum(tl.load(partials_vec + at, mask=(p < P)[:, None] & ok[None, :], other=0.0), 0)
    if sums_vec is not None:
        tl.store(sums_vec + columns, total, mask=columns < sums_size)
    if weight_ptr is not None:
        i = columns - sums_size
        target = i // (size1 * size2) * stride0 + i // size2 % size1 * stride1 + i % size2 * stride2
        tl.store(weight_ptr + target, total.to(weight_ptr.dtype.element_ty), mask=ok & (i >= 0))
