"""bn_relu_conv3x3: a 3x3 convolution of the activated z, and its backward.

Forward:  y = conv3x3(relu(scale*z + shift), W), zero outside the image; and y's channel moments
Backward: dy = grad + u*y + v;  g = conv3x3^T(dy, W) where scale*z + shift > 0, else 0 (-> grad_bn)
          sums = [sum g, sum g*(z - mean)];  dW[tap] = dy^T @ relu(scale*z + shift) shifted by the tap

Shapes: z, grad_bn [M, B]; y, grad [M, K]; each with its own pixel stride, for the M pixels of N images of
H x W. W, dW [K, B, 3, 3]; the kernels read W in channels_last memory, [K, 3, 3, B].
Minimum elements moved per pixel: forward B + K, backward 2B + 2K. Backward first writes dy in place of grad,
which moves 2K more, so that each of the nine taps is a plain load.

Forward activates a pixel three times, not nine. A row of taps (dx = -1, 0, 1) multiplies the same pixels
into three accumulators. At the end the outer two, which are only K wide, are shifted by one pixel. The
first and last pixels of a tile exist only for that shift.

In backward, some programs compute the data gradient and others the weight gradient, over the same tiles at
the same time. So z and dy are read from device memory once, and from the L2 cache after that. Each program
of the weight gradient computes one row of taps, because nine accumulators spill on sm_80 and sm_100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine_gradient import bind_affine
from .launch import (
    Kernel,
    alignment_of,
    configure,
    dense_3x3,
    dot_precision,
    fp32_precision,
    partial_results,
    persistent_programs,
    pixels_of,
    plan,
    zero,
)
from .reduce import bind_merge, bind_reduce
from .tiles import add_moments, masked_gradient, pre_activation, relu, store_moments


@triton.jit
def bn_relu_conv3x3_forward_kernel(
    z_ptr,
    scale_vec,
    shift_vec,
    weight_ptr,
    y_ptr,
    partials_vec,
    M,
    H,
    W,
    b_units,
    k_units,
    z_units,
    y_units,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (blocks of K, programs that share the tiles of BLOCK_M - 2 output pixels)."""
    B, K = b_units * UNIT, k_units * UNIT
    OUTPUTS: tl.constexpr = BLOCK_M - 2
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    i = tl.arange(0, BLOCK_M)
    before = tl.broadcast_to(tl.maximum(i - 1, 0)[:, None], [BLOCK_M, BLOCK_K])
    after = tl.broadcast_to(tl.minimum(i + 1, BLOCK_M - 1)[:, None], [BLOCK_M, BLOCK_K])
    count = 0.0
    mean = tl.zeros([BLOCK_K], tl.float32)
    m2 = tl.zeros([BLOCK_K], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(M, OUTPUTS), tl.num_programs(1)):
        m = tile * OUTPUTS - 1 + i
        column, line = m % W, m // W % H
        left = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        middle = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        right = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        chunks = tl.cdiv(B, BLOCK_B)
        for step in range(3 * chunks):
            dy = step // chunks
            b = step % chunks * BLOCK_B + tl.arange(0, BLOCK_B)
            b_ok = b < B
            inside = (m >= 0) & (m < M) & (line + dy >= 1) & (line + dy <= H)
            source = (m + (dy - 1) * W).to(tl.int64)[:, None] * UNIT
            z = tl.load(
                z_ptr + source * z_units + b[None, :], mask=inside[:, None] & b_ok[None, :], other=0.0
            )
            scale = tl.load(scale_vec + b, mask=b_ok, other=0.0)
            shift = tl.load(shift_vec + b, mask=b_ok, other=0.0)
            a = relu(pre_activation(z, scale, shift))
            a = tl.where(inside[:, None], a, 0.0).to(z.dtype)
            w_at = weight_ptr + (k[None, :] * 9 + dy * 3) * B + b[:, None]
            w_ok = k_ok[None, :] & b_ok[:, None]
            left = tl.dot(a, tl.load(w_at, mask=w_ok, other=0.0), left, input_precision=PRECISION)
            middle = tl.dot(a, tl.load(w_at + B, mask=w_ok, other=0.0), middle, input_precision=PRECISION)
            right = tl.dot(a, tl.load(w_at + 2 * B, mask=w_ok, other=0.0), right, input_precision=PRECISION)
        left = tl.where((column > 0)[:, None], tl.gather(left, before, 0), 0.0)
        right = tl.where((column < W - 1)[:, None], tl.gather(right, after, 0), 0.0)
        y = (left + middle + right).to(y_ptr.dtype.element_ty)
        m_ok = ((i > 0) & (i <= OUTPUTS) & (m < M))[:, None]
        y_row = m.to(tl.int64)[:, None] * UNIT * y_units
        tl.store(y_ptr + y_row + k[None, :], y, mask=m_ok & k_ok[None, :])
        if partials_vec is not None:
            rows = tl.minimum(M - tile * OUTPUTS, OUTPUTS).to(tl.float32)
            count, mean, m2 = add_moments(count, mean, m2, y.to(tl.float32), m_ok, rows)
    if partials_vec is not None:
        store_moments(
            partials_vec, tl.program_id(1), tl.num_programs(1), k, k_ok, K, count, mean, m2,
            tl.program_id(0) == 0,
        )  # fmt: skip


@triton.jit
def load_tap(dy_ptr, m, line, column, k, k_ok, M, H, W, row_stride, tap):
    """Loads dy [M, K] at the output pixels that pixels m reach through ``tap``; zero outside the image."""
    i, j = tap // 3 - 1, tap % 3 - 1
    inside = (m < M) & (line >= i) & (line - i < H) & (column >= j) & (column - j < W)
    source = (m - i * W - j).to(tl.int64)[:, None] * row_stride
    return tl.load(dy_ptr + source + k[None, :], mask=inside[:, None] & k_ok[None, :], other=0.0)


@triton.jit
def bn_relu_conv3x3_backward_kernel(
    dy_ptr,
    z_ptr,
    mean_vec,
    scale_vec,
    shift_vec,
    weight_ptr,
    grad_bn_ptr,
    partials_vec,
    M,
    H,
    W,
    b_units,
    k_units,
    dy_units,
    z_units,
    grad_bn_units,
    row_size,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (blocks of B for the data gradient, then blocks of dW, one for each row of taps; programs that
    share the tiles).
    """
    B, K = b_units * UNIT, k_units * UNIT
    b_blocks = tl.cdiv(B, BLOCK_B)
    is_data = tl.program_id(0) < b_blocks
    block = tl.program_id(0) - b_blocks
    b = tl.where(is_data, tl.program_id(0), block % b_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = b < B
    scale = tl.load(scale_vec + b, mask=b_ok, other=0.0)
    shift = tl.load(shift_vec + b, mask=b_ok, other=0.0)
    partials_vec += tl.program_id(1).to(tl.int64) * row_size
    if is_data:
        mean = tl.load(mean_vec + b, mask=b_ok, other=0.0)
        sum_g = tl.zeros([BLOCK_B], tl.float32)
        sum_gz = tl.zeros([BLOCK_B], tl.float32)
        for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            m_ok = (m < M)[:, None]
            column, line = m % W, m // W % H
            da = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
            for step in range(9 * tl.cdiv(K, BLOCK_K)):
                tap = step % 9
                k = step // 9 * BLOCK_K + tl.arange(0, BLOCK_K)
                k_ok = k < K
                dy = load_tap(dy_ptr, m, line, column, k, k_ok, M, H, W, dy_units * UNIT, tap)
                w_at = weight_ptr + (k[:, None] * 9 + tap) * B + b[None, :]
                w = tl.load(w_at, mask=k_ok[:, None] & b_ok[None, :], other=0.0)
                da = tl.dot(dy, w, da, input_precision=PRECISION)
            row = m.to(tl.int64)[:, None] * UNIT
            z = tl.load(z_ptr + row * z_units + b[None, :], mask=m_ok & b_ok[None, :], other=0.0)
            g, sum_g, sum_gz = masked_gradient(da, z, scale, shift, mean, sum_g, sum_gz)
            tl.store(grad_bn_ptr + row * grad_bn_units + b[None, :], g.to(z.dtype), mask=m_ok & b_ok[None, :])
        tl.store(partials_vec + b, sum_g, mask=b_ok)
        tl.store(partials_vec + B + b, sum_gz, mask=b_ok)
    else:
        tap = block // b_blocks % 3 * 3
        k = block // b_blocks // 3 * BLOCK_K + tl.arange(0, BLOCK_K)
        k_ok = k < K
        stride = dy_units * UNIT
        dw0 = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        dw1, dw2 = dw0, dw0
        for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            m_ok = (m < M)[:, None]
            column, line = m % W, m // W % H
            row = m.to(tl.int64)[:, None] * UNIT
            z = tl.load(z_ptr + row * z_units + b[None, :], mask=m_ok & b_ok[None, :], other=0.0)
            a = tl.trans(relu(pre_activation(z, scale, shift)).to(z.dtype))
            dy0 = load_tap(dy_ptr, m, line, column, k, k_ok, M, H, W, stride, tap)
            dy1 = load_tap(dy_ptr, m, line, column, k, k_ok, M, H, W, stride, tap + 1)
            dy2 = load_tap(dy_ptr, m, line, column, k, k_ok, M, H, W, stride, tap + 2)
            dw0 = tl.dot(a, dy0, dw0, input_precision=PRECISION)
            dw1 = tl.dot(a, dy1, dw1, input_precision=PRECISION)
            dw2 = tl.dot(a, dy2, dw2, input_precision=PRECISION)
        at = partials_vec + 2 * B + (k[None, :] * 9 + tap) * B + b[:, None]
        ok = k_ok[None, :] & b_ok[:, None]
        tl.store(at, dw0, mask=ok)
        tl.store(at + B, dw1, mask=ok)
        tl.store(at + 2 * B, dw2, mask=ok)


_forward = Kernel(bn_relu_conv3x3_forward_kernel)
_backward = Kernel(bn_relu_conv3x3_backward_kernel)


@plan
def _plan_forward(device, shape, outputs, strides, dtype, precision, alignment, stats):
    images, height, width, bottleneck = shape
    pixels, unit = images * height * width, alignment // dtype.itemsize
    config = configure(_forward, device, precision, (pixels, bottleneck, outputs))
    config = config.fit(BLOCK_B=bottleneck, BLOCK_K=outputs)
    blocks = triton.cdiv(outputs, config.blocks["BLOCK_K"])
    programs = persistent_programs(device, pixels, config, blocks)
    vector = torch.float32
    types = (dtype, vector, vector, dtype, dtype, vector if stats else None)
    numbers = (pixels, height, width, *(n // unit for n in (bottleneck, outputs, *strides)))
    launch = _forward.bind(
        device, (blocks, programs), types, numbers, alignment, config,
        UNIT=unit, PRECISION=dot_precision(precision),
    )  # fmt: skip
    return (2 * outputs + 1) * programs, launch, bind_merge(device, programs, outputs, pixels)


def bn_relu_conv3x3_forward(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    y: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    if z.numel() == 0:
        return zero(mean, var)
    weight, outputs, strides = dense_3x3(weight), y.shape[3], (z.stride(2), y.stride(2))
    alignment = alignment_of(z, y, weight=weight)
    pixels_of(z)
    length, launch, merge = _plan_forward(
        z.get_device(), tuple(z.shape), outputs, strides, z.dtype,
        fp32_precision(z.dtype), alignment, mean is not None,
    )  # fmt: skip
    partials = None if mean is None else partial_results(length, z)
    launch(z, scale, shift, weight, y, partials)
    if mean is not None:
        merge(partials, mean, var)
    return None


@plan
def _plan_backward(device, shape, outputs, strides, dtype, precision, alignment, weight_strides):
    images, height, width, bottleneck = shape
    pixels, unit = images * height * width, alignment // dtype.itemsize
    config = configure(_backward, device, precision, (pixels, bottleneck, outputs))
    config = config.fit(BLOCK_B=bottleneck, BLOCK_K=outputs)
    b_blocks = triton.cdiv(bottleneck, config.blocks["BLOCK_B"])
    wanted, vector = weight_strides is not None, torch.float32
    blocks = b_blocks * (1 + 3 * triton.cdiv(outputs, config.blocks["BLOCK_K"]) * wanted)
    programs = persistent_programs(device, pixels, config, blocks)
    row = 2 * bottleneck + (9 * outputs * bottleneck if wanted else 0)
    grad, y, z, grad_bn = strides
    form_dy = bind_affine(device, pixels, outputs, (grad, y, grad), dtype, alignment)
    types = (dtype, dtype, *(vector,) * 3, dtype, dtype, vector)
    numbers = (
        pixels, height, width, *(n // unit for n in (bottleneck, outputs, grad, z, grad_bn)), row
    )  # fmt: skip
    launch = _backward.bind(
        device, (blocks, programs), types, numbers, alignment, config,
        UNIT=unit, PRECISION=dot_precision(precision),
    )  # fmt: skip
    places = (weight_strides[0], weight_strides[3], weight_strides[1]) if wanted else None
    reduce = bind_reduce(device, programs, 2 * bottleneck, dtype, (outputs, 9, bottleneck), places)
    return row * programs, form_dy, launch, reduce


def bn_relu_conv3x3_backward(
    grad: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    grad_bn: Tensor,
    sums: Tensor,
    grad_weight: Tensor | None,
) -> None:
    if z.numel() == 0:
        return zero(sums, grad_weight)
    if grad_weight is not None and grad_weight.stride(2) != 3 * grad_weight.stride(3):
        dense = grad_weight.contiguous()  # the reduction needs the nine taps evenly spaced
        bn_relu_conv3x3_backward(grad, y, u, v, z, mean, scale, shift, weight, grad_bn, sums, dense)
        grad_weight.copy_(dense)
        return None
    weight, outputs = dense_3x3(weight), y.shape[3]
    strides = (grad.stride(2), y.stride(2), z.stride(2), grad_bn.stride(2))
    alignment = alignment_of(grad, y, z, grad_bn, weight=weight)
    pixels_of(z)
    length, form_dy, launch, reduce = _plan_backward(
        z.get_device(), tuple(z.shape), outputs, strides, z.dtype, fp32_precision(z.dtype), alignment,
        None if grad_weight is None else grad_weight.stride(),
    )  # fmt: skip
    partials = partial_results(length, z)
    form_dy(grad, None, y, u, v, grad)
    launch(grad, z, mean, scale, shift, weight, grad_bn, partials)
    return reduce(partials, sums, grad_weight)
