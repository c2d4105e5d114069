"""bn_relu_maxpool: the stem's 3x3 max pool (stride 2, padding 1) of the activated x, and its backward.

Forward:  y = max over the window of relu(scale*x + shift)
Backward: the first maximum of a window in row-major order takes the window's gradient;
          g = sum of the gradients that a pixel took where scale*x + shift > 0, else 0
          grad_x = scale*g + u*x + v;  sums = [sum g, sum g*(x - mean)]

Shapes: x, grad_x [N, H, W, C]; y, grad [N, (H-1)//2 + 1, (W-1)//2 + 1, C]; each with its own pixel stride.
Elements moved per input pixel: forward 5/4 C, backward 9/4 C. Windows overlap, so most of their nine loads
hit the cache. Backward works on cells of 2x2 input pixels. A cell overlaps at most four windows, whose
maxima backward finds again: that moves fewer bytes than storing the maxima's indices.
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
    partial_results,
    persistent_programs,
    pixels_of,
    plan,
    zero,
)
from .reduce import bind_reduce
from .tiles import masked_gradient, pre_activation, relu


@triton.jit
def window_maximum(x_ptr, image, oh, ow, ok, c, c_ok, scale, shift, H, W, x_stride):
    """The maximum [M, C] of each window, and the index (0 to 8) of the first of its pixels that has it."""
    best = tl.zeros_like(ok[:, None] & c_ok[None, :]).to(tl.float32) - float("inf")
    index = tl.zeros_like(best).to(tl.int32)
    for i in tl.static_range(9):
        line, column = 2 * oh + i // 3 - 1, 2 * ow + i % 3 - 1
        inside = ok & (line >= 0) & (line < H) & (column >= 0) & (column < W)
        pixel = ((image * H + line) * W + column).to(tl.int64)[:, None] * x_stride
        x = tl.load(x_ptr + pixel + c[None, :], mask=inside[:, None] & c_ok[None, :], other=0.0)
        a = relu(pre_activation(x, scale, shift))
        # As in PyTorch, NaN counts as a maximum, and the last NaN of a window wins.
        wins = inside[:, None] & ((a > best) | (a != a))
        best = tl.where(wins, a, best)
        index = tl.where(wins, i, index)
    return best, index


@triton.jit
def bn_relu_maxpool_forward_kernel(
    x_ptr,
    scale_vec,
    shift_vec,
    y_ptr,
    outputs,
    H,
    W,
    c_units,
    x_units,
    y_units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of output pixels, blocks of C)."""
    OH, OW = (H - 1) // 2 + 1, (W - 1) // 2 + 1
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok, c_ok = p < outputs, c < c_units * UNIT
    scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
    shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
    y, _ = window_maximum(
        x_ptr, p // (OH * OW), p // OW % OH, p % OW, ok, c, c_ok, scale, shift, H, W, x_units * UNIT
    )
    at = p.to(tl.int64)[:, None] * UNIT * y_units + c[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok[:, None] & c_ok[None, :])


@triton.jit
def window_gradient(
    grad_ptr, x_ptr, image, oh, ow, ok, c, c_ok, scale, shift, H, W, OH, OW, grad_stride, x_stride
):
    """Each window's gradient [M, C], and the index (0 to 8) of the pixel that takes it."""
    ok = ok & (oh < OH) & (ow < OW)
    _, first = window_maximum(x_ptr, image, oh, ow, ok, c, c_ok, scale, shift, H, W, x_stride)
    at = ((image * OH + oh) * OW + ow).to(tl.int64)[:, None] * grad_stride + c[None, :]
    grad = tl.load(grad_ptr + at, mask=ok[:, None] & c_ok[None, :], other=0.0)
    return grad.to(tl.float32), first


@triton.jit
def bn_relu_maxpool_backward_kernel(
    grad_ptr,
    x_ptr,
    mean_vec,
    scale_vec,
    shift_vec,
    u_vec,
    v_vec,
    grad_x_ptr,
    partials_vec,
    cells,
    H,
    W,
    c_units,
    grad_units,
    x_units,
    grad_x_units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of C, programs that share the tiles of cells)."""
    C = c_units * UNIT
    OH, OW = (H - 1) // 2 + 1, (W - 1) // 2 + 1
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
    shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
    mean = tl.load(mean_vec + c, mask=c_ok, other=0.0)
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(cells, BLOCK_M), tl.num_programs(1)):
        # Cell (i, j) holds pixels (2i, 2j) to (2i + 1, 2j + 1). There are as many cells as windows; a cell
        # overlaps its own window and the next ones below, to the right, and diagonally.
        p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = p < cells
        image, i, j = p // (OH * OW), p // OW % OH, p % OW
        own, own_first = window_gradient(
            grad_ptr, x_ptr, image, i, j, ok, c, c_ok, scale, shift, H, W, OH, OW,
            grad_units * UNIT, x_units * UNIT,
        )  # fmt: skip
        right, right_first = window_gradient(
            grad_ptr, x_ptr, image, i, j + 1, ok, c, c_ok, scale, shift, H, W, OH, OW,
            grad_units * UNIT, x_units * UNIT,
        )  # fmt: skip
        below, below_first = window_gradient(
            grad_ptr, x_ptr, image, i + 1, j, ok, c, c_ok, scale, shift, H, W, OH, OW,
            grad_units * UNIT, x_units * UNIT,
        )  # fmt: skip
        across, across_first = window_gradient(
            grad_ptr, x_ptr, image, i + 1, j + 1, ok, c, c_ok, scale, shift, H, W, OH, OW,
            grad_units * UNIT, x_units * UNIT,
        )  # fmt: skip
        for pixel in tl.static_range(4):
            a, b = pixel // 2, pixel % 2
            da = tl.where(own_first == 3 * a + b + 4, own, 0.0)
            da += tl.where((right_first == 3 * a + 3) & (b == 1), right, 0.0)
            da += tl.where((below_first == b + 1) & (a == 1), below, 0.0)
            da += tl.where((across_first == 0) & (pixel == 3), across, 0.0)
            inside = (ok & (2 * i + a < H) & (2 * j + b < W))[:, None] & c_ok[None, :]
            at = ((image * H + 2 * i + a) * W + 2 * j + b).to(tl.int64)[:, None] * UNIT
            x = tl.load(x_ptr + at * x_units + c[None, :], mask=inside, other=0.0)
            g, sum_g, sum_gx = masked_gradient(da, x, scale, shift, mean, sum_g, sum_gx)
            if grad_x_ptr is not None:
                dx = g * scale[None, :]
                if u_vec is not None:
                    u = tl.load(u_vec + c, mask=c_ok, other=0.0)
                    v = tl.load(v_vec + c, mask=c_ok, other=0.0)
                    dx += x.to(tl.float32) * u[None, :] + v[None, :]
                tl.store(grad_x_ptr + at * grad_x_units + c[None, :], dx.to(x.dtype), mask=inside)
    if partials_vec is not None:
        at = tl.program_id(1).to(tl.int64) * 2 * C + c
        tl.store(partials_vec + at, sum_g, mask=c_ok)
        tl.store(partials_vec + C + at, sum_gx, mask=c_ok)


_forward = Kernel(bn_relu_maxpool_forward_kernel)
_backward = Kernel(bn_relu_maxpool_backward_kernel)


@plan
def _plan_forward(device, shape, strides, dtype, alignment):
    images, height, width, channels = shape
    unit = alignment // dtype.itemsize
    outputs = images * ((height - 1) // 2 + 1) * ((width - 1) // 2 + 1)
    config = configure(_forward, device, "any", (outputs, channels)).fit(BLOCK_C=channels)
    grid = triton.cdiv(outputs, config.blocks["BLOCK_M"]), triton.cdiv(channels, config.blocks["BLOCK_C"])
    numbers = (outputs, height, width, channels // unit, *(stride // unit for stride in strides))
    types = (dtype, torch.float32, torch.float32, dtype)
    return _forward.bind(device, grid, types, numbers, alignment, config, UNIT=unit)


@plan
def _plan_backward(device, shape, strides, dtype, alignment, writes, sums, batch):
    images, height, width, channels = shape
    unit = alignment // dtype.itemsize
    cells = images * ((height - 1) // 2 + 1) * ((width - 1) // 2 + 1)
    config = configure(_backward, device, "any", (cells, channels)).fit(BLOCK_C=channels)
    blocks = triton.cdiv(channels, config.blocks["BLOCK_C"])
    programs = persistent_programs(device, cells, config, blocks)
    vector = torch.float32
    types = (
        dtype, dtype, vector, vector, vector, *((vector, vector) if batch else (None, None)),
        dtype if writes else None, vector if sums else None,
    )  # fmt: skip
    numbers = (cells, height, width, channels // unit, *(stride // unit for stride in strides))
    launch = _backward.bind(device, (blocks, programs), types, numbers, alignment, config, UNIT=unit)
    return 2 * channels * programs, launch, bind_reduce(device, programs, 2 * channels)


def bn_relu_maxpool_forward(x: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
    if x.numel() == 0:
        return
    strides = (x.stride(2), y.stride(2))
    alignment = alignment_of(x, y)
    pixels_of(x)
    launch = _plan_forward(x.get_device(), tuple(x.shape), strides, x.dtype, alignment)
    launch(x, scale, shift, y)


def _backward_pass(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    uv: tuple[Tensor, Tensor] | None,
    grad_x: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Writes grad_x and sums, each unless None."""
    written = x if grad_x is None else grad_x
    strides = (grad.stride(2), x.stride(2), written.stride(2))
    alignment = alignment_of(grad, x, written)
    pixels_of(x)
    length, launch, reduce = _plan_backward(
        x.get_device(), tuple(x.shape), strides, x.dtype, alignment,
        grad_x is not None, sums is not None, uv is not None,
    )  # fmt: skip
    partials = None if sums is None else partial_results(length, x)
    launch(grad, x, mean, scale, shift, *(uv or (None, None)), grad_x, partials)
    if sums is not None:
        reduce(partials, sums, None)


def bn_relu_maxpool_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    grad_x: Tensor,
    sums: Tensor,
) -> None:
    if x.numel() == 0:
        return zero(sums)
    return _backward_pass(grad, x, mean, scale, shift, None, grad_x, sums)


def bn_relu_maxpool_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    grad_x: Tensor,
    grad_norm_weight: Tensor,
    grad_norm_bias: Tensor,
) -> None:
    """Computes the sums first and then grad_x, so that x is read twice but grad_x is written only once."""
    sums, (u, v) = sums_and_uv(mean)
    _backward_pass(grad, x, mean, scale, shift, None, None, sums)
    bn_gradient(sums, mean, var, norm_weight, eps, pixels_of(x), grad_norm_weight, grad_norm_bias, u, v)
    _backward_pass(grad, x, mean, scale, shift, (u, v), grad_x, None)
