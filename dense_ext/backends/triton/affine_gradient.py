"""affine_gradient: ``out = factor*grad + u*x + v``; scaled_accumulate: ``out += scale*grad``.

Shapes: grad, x, out [M, C], each with its own pixel stride; factor (1 if absent), u, v, scale [C].
``out`` may be ``grad``. Each moves 3 C elements per pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, alignment_of, configure, pixels_of, plan


@triton.jit
def affine_gradient_kernel(
    grad_ptr,
    factor_vec,
    x_ptr,
    u_vec,
    v_vec,
    out_ptr,
    M,
    c_units,
    grad_units,
    x_units,
    out_units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of pixels, blocks of C)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < c_units * UNIT
    ok = (m < M)[:, None] & c_ok[None, :]
    row = m.to(tl.int64)[:, None] * UNIT
    grad = tl.load(grad_ptr + row * grad_units + c[None, :], mask=ok).to(tl.float32)
    x = tl.load(x_ptr + row * x_units + c[None, :], mask=ok).to(tl.float32)
    if factor_vec is not None:
        grad *= tl.load(factor_vec + c, mask=c_ok)[None, :]
    u, v = tl.load(u_vec + c, mask=c_ok), tl.load(v_vec + c, mask=c_ok)
    out = grad + (x * u[None, :] + v[None, :])
    tl.store(out_ptr + row * out_units + c[None, :], out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def scaled_accumulate_kernel(
    grad_ptr,
    scale_vec,
    out_ptr,
    M,
    c_units,
    grad_units,
    out_units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (tiles of pixels, blocks of C)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < c_units * UNIT
    ok = (m < M)[:, None] & c_ok[None, :]
    row = m.to(tl.int64)[:, None] * UNIT
    grad = tl.load(grad_ptr + row * grad_units + c[None, :], mask=ok).to(tl.float32)
    at = out_ptr + row * out_units + c[None, :]
    scale = tl.load(scale_vec + c, mask=c_ok)[None, :]
    total = tl.load(at, mask=ok).to(tl.float32) + grad * scale
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=ok)


_affine = Kernel(affine_gradient_kernel)
_accumulate = Kernel(scaled_accumulate_kernel)


def bind_affine(
    device: int,
    pixels: int,
    channels: int,
    strides: tuple[int, int, int],
    dtype: torch.dtype,
    alignment: int,
    has_factor: bool = False,
) -> Callable[..., None]:
    """Returns ``launch(grad, factor, x, u, v, out)``, with None for factor unless ``has_factor``.

    ``strides`` are the pixel strides of grad, x and out.
    """
    unit = alignment // dtype.itemsize
    config = configure(_affine, device, "any", (pixels, channels)).fit(BLOCK_C=channels)
    grid = triton.cdiv(pixels, config.blocks["BLOCK_M"]), triton.cdiv(channels, config.blocks["BLOCK_C"])
    vector = torch.float32
    types = (dtype, vector if has_factor else None, dtype, vector, vector, dtype)
    numbers = (pixels, channels // unit, *(stride // unit for stride in strides))
    return _affine.bind(device, grid, types, numbers, alignment, config, UNIT=unit)


_plan_affine = plan(bind_affine)


@plan
def _plan_accumulate(device, pixels, channels, strides, dtype, alignment):
    unit = alignment // dtype.itemsize
    config = configure(_accumulate, device, "any", (pixels, channels)).fit(BLOCK_C=channels)
    grid = triton.cdiv(pixels, config.blocks["BLOCK_M"]), triton.cdiv(channels, config.blocks["BLOCK_C"])
    numbers = (pixels, channels // unit, *(stride // unit for stride in strides))
    return _accumulate.bind(
        device, grid, (dtype, torch.float32, dtype), numbers, alignment, config, UNIT=unit
    )


def affine_gradient(grad: Tensor, x: Tensor, u: Tensor, v: Tensor, out: Tensor) -> None:
    if x.numel() == 0:
        return
    channels, strides = x.shape[3], (grad.stride(2), x.stride(2), out.stride(2))
    alignment = alignment_of(grad, x, out)
    launch = _plan_affine(x.get_device(), pixels_of(x), channels, strides, x.dtype, alignment)
    launch(grad, None, x, u, v, out)


def scaled_accumulate(grad: Tensor, scale: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    channels, strides = out.shape[3], (grad.stride(2), out.stride(2))
    alignment = alignment_of(grad, out)
    launch = _plan_accumulate(out.get_device(), pixels_of(out), channels, strides, out.dtype, alignment)
    launch(grad, scale, out)
