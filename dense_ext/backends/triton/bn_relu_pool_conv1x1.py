"""bn_relu_pool_conv1x1: the transition, a 1x1 convolution of the pooled, activated x, and its backward.

Forward:  p = avg_pool2x2(relu(scale*x + shift));  y = p @ W^T
Backward: da = (grad @ W) / 4 for each pixel of a window;  g = da where scale*x + shift > 0, else 0
          grad_x = scale*g + u*x + v;  sums = [sum g, sum g*(x - mean)];  dW = grad^T @ p

Shapes: x, grad_x [N, H, W, C]; y, grad [Q, K] for Q = N * H//2 * W//2 windows; each with its own pixel
stride. W, dW [K, C].
Minimum elements moved per output pixel: forward 4C + K, backward 8C + K.
The sums, from which u and v follow, must be known before grad_x is written. So two kernels form da, and the
second reads x and grad again. The first stores p, a quarter of x's size, for the weight gradient's product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import bn_gradient, sums_and_uv
from .launch import (
    Kernel,
    alignment_of,
    configure,
    dense_1x1,
    dot_precision,
    fp32_precision,
    partial_results,
    persistent_programs,
    pixels_of,
    plan,
    two_axes,
    zero,
)
from .reduce import bind_reduce
from .tiles import masked_gradient, pre_activation, relu, tile_of_two_axes


@triton.jit
def bn_relu_pool_conv1x1_forward_kernel(
    x_ptr,
    scale_vec,
    shift_vec,
    weight_ptr,
    y_ptr,
    Q,
    H,
    W,
    c_units,
    k_units,
    x_units,
    y_units,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of K, tiles of windows on two axes)."""
    C, K = c_units * UNIT, k_units * UNIT
    OH, OW = H // 2, W // 2
    q = tile_of_two_axes() * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    q_ok, k_ok = (q < Q)[:, None], k < K
    corner = (q // (OH * OW) * H + q // OW % OH * 2) * W + q % OW * 2
    first = corner.to(tl.int64)[:, None] * UNIT * x_units
    product = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_ok = c < C
        scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
        shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
        pooled = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for pixel in tl.static_range(4):
            at = first + (pixel // 2 * W + pixel % 2).to(tl.int64) * UNIT * x_units + c[None, :]
            x = tl.load(x_ptr + at, mask=q_ok & c_ok[None, :], other=0.0)
            pooled += relu(pre_activation(x, scale, shift))
        w = tl.load(weight_ptr + k[None, :] * C + c[:, None], mask=k_ok[None, :] & c_ok[:, None], other=0.0)
        product = tl.dot((pooled * 0.25).to(w.dtype), w, product, input_precision=PRECISION)
    at = q.to(tl.int64)[:, None] * UNIT * y_units + k[None, :]
    tl.store(y_ptr + at, product.to(y_ptr.dtype.element_ty), mask=q_ok & k_ok[None, :])


@triton.jit
def window_gradient(
    grad_ptr, weight_ptr, q, q_ok, c, c_ok, C, K, grad_stride,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``da = (grad @ W) / 4`` [M, C] for the windows q."""
    da = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    row = q.to(tl.int64)[:, None] * grad_stride
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < K
        grad = tl.load(grad_ptr + row + k[None, :], mask=q_ok[:, None] & k_ok[None, :], other=0.0)
        w = tl.load(weight_ptr + k[:, None] * C + c[None, :], mask=k_ok[:, None] & c_ok[None, :], other=0.0)
        da = tl.dot(grad, w, da, input_precision=PRECISION)
    return da * 0.25


@triton.jit
def bn_relu_pool_conv1x1_sums_kernel(
    grad_ptr,
    x_ptr,
    mean_vec,
    scale_vec,
    shift_vec,
    weight_ptr,
    pooled_ptr,
    partials_vec,
    Q,
    H,
    W,
    c_units,
    k_units,
    grad_units,
    x_units,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums, and p [Q, C] for the weight gradient. Grid: (blocks of C, programs that share the tiles)."""
    C, K = c_units * UNIT, k_units * UNIT
    OH, OW = H // 2, W // 2
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
    shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
    mean = tl.load(mean_vec + c, mask=c_ok, other=0.0)
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(Q, BLOCK_M), tl.num_programs(1)):
        q = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q_ok = q < Q
        da = window_gradient(
            grad_ptr, weight_ptr, q, q_ok, c, c_ok, C, K, grad_units * UNIT,
            PRECISION, BLOCK_M, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        corner = (q // (OH * OW) * H + q // OW % OH * 2) * W + q % OW * 2
        first = corner.to(tl.int64)[:, None] * UNIT * x_units
        pooled = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for pixel in tl.static_range(4):
            at = first + (pixel // 2 * W + pixel % 2).to(tl.int64) * UNIT * x_units + c[None, :]
            x = tl.load(x_ptr + at, mask=q_ok[:, None] & c_ok[None, :], other=0.0)
            pooled += relu(pre_activation(x, scale, shift))
            _, sum_g, sum_gx = masked_gradient(da, x, scale, shift, mean, sum_g, sum_gx)
        if pooled_ptr is not None:
            at = q.to(tl.int64)[:, None] * C + c[None, :]
            value = (pooled * 0.25).to(pooled_ptr.dtype.element_ty)
            tl.store(pooled_ptr + at, value, mask=q_ok[:, None] & c_ok[None, :])
    at = tl.program_id(1).to(tl.int64) * 2 * C + c
    tl.store(partials_vec + at, sum_g, mask=c_ok)
    tl.store(partials_vec + C + at, sum_gx, mask=c_ok)


@triton.jit
def bn_relu_pool_conv1x1_weight_kernel(
    grad_ptr,
    pooled_ptr,
    partials_vec,
    Q,
    c_units,
    k_units,
    grad_units,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``dW = grad^T @ p``, as one partial [K, C] per program of the second grid axis.

    Grid: (blocks of dW, programs that share the tiles).
    """
    C, K = c_units * UNIT, k_units * UNIT
    c_blocks = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(0) // c_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c_ok, k_ok = c < C, k < K
    dw = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(Q, BLOCK_M), tl.num_programs(1)):
        q = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q_ok = (q < Q)[:, None]
        row = q.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + row * grad_units * UNIT + k[None, :], mask=q_ok & k_ok[None, :], other=0.0)
        pooled = tl.load(pooled_ptr + row * C + c[None, :], mask=q_ok & c_ok[None, :], other=0.0)
        dw = tl.dot(tl.trans(grad), pooled, dw, input_precision=PRECISION)
    at = tl.program_id(1).to(tl.int64) * K * C + k[:, None] * C + c[None, :]
    tl.store(partials_vec + at, dw, mask=k_ok[:, None] & c_ok[None, :])


@triton.jit
def bn_relu_pool_conv1x1_data_kernel(
    grad_ptr,
    x_ptr,
    scale_vec,
    shift_vec,
    weight_ptr,
    u_vec,
    v_vec,
    grad_x_ptr,
    cells,
    H,
    W,
    c_units,
    k_units,
    grad_units,
    x_units,
    grad_x_units,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes grad_x. Grid: (blocks of C, tiles of cells of 2x2 pixels on two axes).

    An odd last row or column adds cells that belong to no window.
    """
    C, K = c_units * UNIT, k_units * UNIT
    OH, OW = H // 2, W // 2
    CH, CW = (H + 1) // 2, (W + 1) // 2
    p = tile_of_two_axes() * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok, ok = c < C, p < cells
    image, i, j = p // (CH * CW), p // CW % CH, p % CW
    scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
    shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
    da = window_gradient(
        grad_ptr, weight_ptr, (image * OH + i) * OW + j, ok & (i < OH) & (j < OW), c, c_ok, C, K,
        grad_units * UNIT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    for pixel in tl.static_range(4):
        line, column = 2 * i + pixel // 2, 2 * j + pixel % 2
        inside = (ok & (line < H) & (column < W))[:, None] & c_ok[None, :]
        at = ((image * H + line) * W + column).to(tl.int64)[:, None] * UNIT
        x = tl.load(x_ptr + at * x_units + c[None, :], mask=inside, other=0.0)
        dx = tl.where(pre_activation(x, scale, shift) <= 0, 0.0, da) * scale[None, :]
        if u_vec is not None:
            u = tl.load(u_vec + c, mask=c_ok, other=0.0)
            v = tl.load(v_vec + c, mask=c_ok, other=0.0)
            dx += x.to(tl.float32) * u[None, :] + v[None, :]
        tl.store(grad_x_ptr + at * grad_x_units + c[None, :], dx.to(x.dtype), mask=inside)


_forward = Kernel(bn_relu_pool_conv1x1_forward_kernel)
_sums = Kernel(bn_relu_pool_conv1x1_sums_kernel)
_weight = Kernel(bn_relu_pool_conv1x1_weight_kernel)
_data = Kernel(bn_relu_pool_conv1x1_data_kernel)


@plan
def _plan_forward(device, shape, outputs, strides, dtype, precision, alignment):
    images, height, width, channels = shape
    unit = alignment // dtype.itemsize
    windows = images * (height // 2) * (width // 2)
    config = configure(_forward, device, precision, (windows, channels, outputs))
    config = config.fit(BLOCK_C=channels, BLOCK_K=outputs)
    tiles = two_axes(triton.cdiv(windows, config.blocks["BLOCK_M"]))
    grid = triton.cdiv(outputs, config.blocks["BLOCK_K"]), *tiles
    types = (dtype, torch.float32, torch.float32, dtype, dtype)
    numbers = (windows, height, width, *(n // unit for n in (channels, outputs, *strides)))
    return _forward.bind(
        device, grid, types, numbers, alignment, config, UNIT=unit, PRECISION=dot_precision(precision)
    )


@plan
def _plan_sums(device, shape, outputs, strides, dtype, precision, alignment, keeps_pooled):
    images, height, width, channels = shape
    unit = alignment // dtype.itemsize
    windows = images * (height // 2) * (width // 2)
    config = configure(_sums, device, precision, (windows, channels, outputs))
    config = config.fit(BLOCK_C=channels, BLOCK_K=outputs)
    blocks = triton.cdiv(channels, config.blocks["BLOCK_C"])
    programs = persistent_programs(device, windows, config, blocks)
    vector = torch.float32
    types = (dtype, dtype, vector, vector, vector, dtype, dtype if keeps_pooled else None, vector)
    numbers = (windows, height, width, *(n // unit for n in (channels, outputs, *strides)))
    launch = _sums.bind(
        device, (blocks, programs), types, numbers, alignment, config,
        UNIT=unit, PRECISION=dot_precision(precision),
    )  # fmt: skip
    return windows, 2 * channels * programs, launch, bind_reduce(device, programs, 2 * channels)


@plan
def _plan_weight(device, windows, channels, outputs, stride, dtype, precision, alignment, weight_strides):
    unit = alignment // dtype.itemsize
    config = configure(_weight, device, precision, (windows, channels, outputs))
    config = config.fit(BLOCK_C=channels, BLOCK_K=outputs)
    blocks = triton.cdiv(channels, config.blocks["BLOCK_C"]) * triton.cdiv(outputs, config.blocks["BLOCK_K"])
    programs = persistent_programs(device, windows, config, blocks)
    numbers = (windows, channels // unit, outputs // unit, stride // unit)
    launch = _weight.bind(
        device, (blocks, programs), (dtype, dtype, torch.float32), numbers, alignment, config,
        UNIT=unit, PRECISION=dot_precision(precision),
    )  # fmt: skip
    reduce = bind_reduce(device, programs, 0, dtype, (1, outputs, channels), (0, *weight_strides))
    return outputs * channels * programs, launch, reduce


@plan
def _plan_data(device, shape, outputs, strides, dtype, precision, alignment, batch):
    images, height, width, channels = shape
    unit = alignment // dtype.itemsize
    cells = images * ((height + 1) // 2) * ((width + 1) // 2)
    config = configure(_data, device, precision, (cells, channels, outputs))
    config = config.fit(BLOCK_C=channels, BLOCK_K=outputs)
    tiles = two_axes(triton.cdiv(cells, config.blocks["BLOCK_M"]))
    grid = triton.cdiv(channels, config.blocks["BLOCK_C"]), *tiles
    vector = torch.float32
    types = (dtype, dtype, vector, vector, dtype, *((vector, vector) if batch else (None, None)), dtype)
    numbers = (cells, height, width, *(n // unit for n in (channels, outputs, *strides)))
    return _data.bind(
        device, grid, types, numbers, alignment, config, UNIT=unit, PRECISION=dot_precision(precision)
    )


def bn_relu_pool_conv1x1_forward(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, y: Tensor) -> None:
    if y.numel() == 0:
        return
    weight, outputs, strides = dense_1x1(weight), y.shape[3], (x.stride(2), y.stride(2))
    alignment = alignment_of(x, y, weight=weight)
    pixels_of(x)
    launch = _plan_forward(
        x.get_device(), tuple(x.shape), outputs, strides, x.dtype, fp32_precision(x.dtype), alignment
    )
    launch(x, scale, shift, weight, y)


def _sums_and_weight_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    sums: Tensor,
    grad_weight: Tensor | None,
) -> None:
    """Writes sums, and grad_weight unless None."""
    pixels_of(x)
    device, outputs, channels = x.get_device(), grad.shape[3], x.shape[3]
    precision, strides = fp32_precision(x.dtype), (grad.stride(2), x.stride(2))
    alignment = alignment_of(grad, x, weight=weight)
    windows, length, launch, reduce = _plan_sums(
        device, tuple(x.shape), outputs, strides, x.dtype, precision, alignment, grad_weight is not None
    )
    pooled = None if grad_weight is None else x.new_empty(windows, channels)
    partials = partial_results(length, x)
    launch(grad, x, mean, scale, shift, weight, pooled, partials)
    reduce(partials, sums, None)
    if grad_weight is not None:
        length, launch, reduce = _plan_weight(
            device, windows, channels, outputs, strides[0], x.dtype, precision, alignment,
            grad_weight.stride()[:2],
        )  # fmt: skip
        partials = partial_results(length, x)
        launch(grad, pooled, partials)
        reduce(partials, None, grad_weight)


def _data_gradient(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    uv: tuple[Tensor, Tensor] | None,
    grad_x: Tensor,
) -> None:
    """Writes grad_x."""
    outputs = grad.shape[3]
    strides = (grad.stride(2), x.stride(2), grad_x.stride(2))
    alignment = alignment_of(grad, x, grad_x, weight=weight)
    launch = _plan_data(
        x.get_device(), tuple(x.shape), outputs, strides, x.dtype, fp32_precision(x.dtype), alignment,
        uv is not None,
    )  # fmt: skip
    launch(grad, x, scale, shift, weight, *(uv or (None, None)), grad_x)


def bn_relu_pool_conv1x1_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    sums: Tensor,
    grad_weight: Tensor | None,
) -> None:
    if grad.numel() == 0:  # no images, or images too small for a window
        return zero(grad_x, sums, grad_weight)
    weight = dense_1x1(weight)
    _sums_and_weight_gradient(grad, x, mean, scale, shift, weight, sums, grad_weight)
    return _data_gradient(grad, x, scale, shift, weight, None, grad_x)


def bn_relu_pool_conv1x1_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    grad_norm_weight: Tensor,
    grad_norm_bias: Tensor,
    grad_weight: Tensor | None,
) -> None:
    """Computes the sums first, so that grad_x is written once, with ``u*x + v`` added."""
    if grad.numel() == 0:
        return zero(grad_x, grad_norm_weight, grad_norm_bias, grad_weight)
    weight = dense_1x1(weight)
    sums, (u, v) = sums_and_uv(mean)
    _sums_and_weight_gradient(grad, x, mean, scale, shift, weight, sums, grad_weight)
    bn_gradient(sums, mean, var, norm_weight, eps, pixels_of(x), grad_norm_weight, grad_norm_bias, u, v)
    return _data_gradient(grad, x, scale, shift, weight, (u, v), grad_x)
