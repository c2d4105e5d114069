"""bn_relu_conv1x1: a 1x1 convolution of the activated x, and its backward.

Forward:  z = relu(scale*x + shift) @ W^T, and z's channel moments
Backward: dz = z_scale*grad_bn + z_u*z + z_v;  g = (dz @ W) where scale*x + shift > 0, else 0
          grad_x += scale*g;  sums = [sum g, sum g*(x - mean)];  dW = dz^T @ relu(scale*x + shift)

Shapes: x, grad_x [M, C]; z, grad_bn [M, B]; each with its own pixel stride. W, dW [B, C].
Minimum elements moved per pixel: forward C + B, backward 3C + 2B. In addition, each program on the second
grid axis writes one row of partial results: moments, or sums and dW.

Backward has two versions:

* Fused: a program holds dW for a chunk of C and all of B, forms dz itself, and uses each loaded tile for
  both gradients. So everything is read from device memory once; chunks that run at the same time share
  grad_bn and z through the L2 cache. To save registers, the accumulators are transposed and the per-channel
  vectors are loaded again inside the loop. The registers suffice where tensor cores read shared memory
  (sm_90 and later), for B up to 256.
* Split: dz is written once in place of grad_bn. Then some programs compute the data gradient and others the
  weight gradient at the same time, sharing x and dz through the L2 cache. It works for any B on any GPU, and
  moves 2B more elements per pixel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine_gradient import bind_affine
from .configs import Config
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
    zero,
)
from .reduce import bind_merge, bind_reduce
from .tiles import add_moments, masked_gradient, pre_activation, relu, store_moments


@triton.jit
def bn_relu_conv1x1_forward_kernel(
    x_ptr,
    scale_vec,
    shift_vec,
    weight_ptr,
    z_ptr,
    partials_vec,
    M,
    c_units,
    b_units,
    x_units,
    z_units,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (blocks of B, programs that share the tiles of pixels)."""
    C, B = c_units * UNIT, b_units * UNIT
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_ok = b < B
    count = 0.0
    mean = tl.zeros([BLOCK_B], tl.float32)
    m2 = tl.zeros([BLOCK_B], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = (m < M)[:, None]
        x_row = (m.to(tl.int64) * x_units * UNIT)[:, None]
        product = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            c_ok = c < C
            x = tl.load(x_ptr + x_row + c[None, :], mask=m_ok & c_ok[None, :], other=0.0)
            scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
            shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
            a = relu(pre_activation(x, scale, shift)).to(x.dtype)
            w = tl.load(
                weight_ptr + b[None, :] * C + c[:, None], mask=b_ok[None, :] & c_ok[:, None], other=0.0
            )
            product = tl.dot(a, w, product, input_precision=PRECISION)
        z = product.to(z_ptr.dtype.element_ty)
        z_row = (m.to(tl.int64) * z_units * UNIT)[:, None]
        tl.store(z_ptr + z_row + b[None, :], z, mask=m_ok & b_ok[None, :])
        if partials_vec is not None:
            rows = tl.minimum(M - tile * BLOCK_M, BLOCK_M).to(tl.float32)
            count, mean, m2 = add_moments(count, mean, m2, z.to(tl.float32), m_ok, rows)
    if partials_vec is not None:
        store_moments(
            partials_vec, tl.program_id(1), tl.num_programs(1), b, b_ok, B, count, mean, m2,
            tl.program_id(0) == 0,
        )  # fmt: skip


@triton.jit
def bn_relu_conv1x1_backward_fused_kernel(
    grad_bn_ptr,
    z_ptr,
    z_scale_vec,
    z_u_vec,
    z_v_vec,
    x_ptr,
    mean_vec,
    scale_vec,
    shift_vec,
    weight_ptr,
    grad_x_ptr,
    partials_vec,
    M,
    c_units,
    b_units,
    grad_bn_units,
    z_units,
    x_units,
    grad_x_units,
    row_size,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (chunks of C, programs that share the tiles of pixels). BLOCK_B covers B."""
    C, B = c_units * UNIT, b_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.arange(0, BLOCK_B)
    c_ok, b_ok = c < C, b < B
    w_at = b[None, :] * C + c[:, None]
    w_ok = b_ok[None, :] & c_ok[:, None]
    w = tl.load(weight_ptr + w_at, mask=w_ok, other=0.0)
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_C], tl.float32)
    dw = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = (m < M)[:, None]
        row = m.to(tl.int64)[:, None] * UNIT
        grad_bn = tl.load(
            grad_bn_ptr + row * grad_bn_units + b[None, :], mask=m_ok & b_ok[None, :], other=0.0
        )
        z = tl.load(z_ptr + row * z_units + b[None, :], mask=m_ok & b_ok[None, :], other=0.0)
        z_scale = tl.load(z_scale_vec + b, mask=b_ok, other=0.0)
        z_u = tl.load(z_u_vec + b, mask=b_ok, other=0.0)
        z_v = tl.load(z_v_vec + b, mask=b_ok, other=0.0)
        affine = grad_bn.to(tl.float32) * z_scale[None, :] + (z.to(tl.float32) * z_u[None, :] + z_v[None, :])
        dz = tl.where(m_ok, affine, 0.0).to(z.dtype)
        x = tl.load(x_ptr + row * x_units + c[None, :], mask=m_ok & c_ok[None, :], other=0.0)
        scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
        shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
        mean = tl.load(mean_vec + c, mask=c_ok, other=0.0)
        da = tl.trans(tl.dot(w, tl.trans(dz), input_precision=PRECISION))
        if WEIGHT:
            a = relu(pre_activation(x, scale, shift)).to(x.dtype)
            dw = tl.dot(tl.trans(a), dz, dw, input_precision=PRECISION)
        g, sum_g, sum_gx = masked_gradient(da, x, scale, shift, mean, sum_g, sum_gx)
        grad_x_at = grad_x_ptr + row * grad_x_units + c[None, :]
        grad_x = tl.load(grad_x_at, mask=m_ok & c_ok[None, :], other=0.0)
        total = grad_x.to(tl.float32) + g * scale[None, :]
        tl.store(grad_x_at, total.to(grad_x.dtype), mask=m_ok & c_ok[None, :])
    partials_vec += tl.program_id(1).to(tl.int64) * row_size
    tl.store(partials_vec + c, sum_g, mask=c_ok)
    tl.store(partials_vec + C + c, sum_gx, mask=c_ok)
    if WEIGHT:
        tl.store(partials_vec + 2 * C + w_at, dw, mask=w_ok)


@triton.jit
def bn_relu_conv1x1_backward_split_kernel(
    dz_ptr,
    x_ptr,
    mean_vec,
    scale_vec,
    shift_vec,
    weight_ptr,
    grad_x_ptr,
    partials_vec,
    M,
    c_units,
    b_units,
    dz_units,
    x_units,
    grad_x_units,
    row_size,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (chunks of C for the data gradient, then chunks of dW; programs that share the tiles)."""
    C, B = c_units * UNIT, b_units * UNIT
    c_blocks = tl.cdiv(C, BLOCK_C)
    is_data = tl.program_id(0) < c_blocks
    block = tl.program_id(0) - c_blocks
    c = (tl.where(is_data, tl.program_id(0), block % c_blocks)) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    scale = tl.load(scale_vec + c, mask=c_ok, other=0.0)
    shift = tl.load(shift_vec + c, mask=c_ok, other=0.0)
    partials_vec += tl.program_id(1).to(tl.int64) * row_size
    if is_data:
        mean = tl.load(mean_vec + c, mask=c_ok, other=0.0)
        sum_g = tl.zeros([BLOCK_C], tl.float32)
        sum_gx = tl.zeros([BLOCK_C], tl.float32)
        for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            m_ok = (m < M)[:, None]
            row = m.to(tl.int64)[:, None] * UNIT
            da = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            for start in range(0, B, BLOCK_B):
                b = start + tl.arange(0, BLOCK_B)
                b_ok = b < B
                dz = tl.load(dz_ptr + row * dz_units + b[None, :], mask=m_ok & b_ok[None, :], other=0.0)
                w = tl.load(
                    weight_ptr + b[:, None] * C + c[None, :], mask=b_ok[:, None] & c_ok[None, :], other=0.0
                )
                da = tl.dot(dz, w, da, input_precision=PRECISION)
            x = tl.load(x_ptr + row * x_units + c[None, :], mask=m_ok & c_ok[None, :], other=0.0)
            g, sum_g, sum_gx = masked_gradient(da, x, scale, shift, mean, sum_g, sum_gx)
            grad_x_at = grad_x_ptr + row * grad_x_units + c[None, :]
            grad_x = tl.load(grad_x_at, mask=m_ok & c_ok[None, :], other=0.0)
            total = grad_x.to(tl.float32) + g * scale[None, :]
            tl.store(grad_x_at, total.to(grad_x.dtype), mask=m_ok & c_ok[None, :])
        tl.store(partials_vec + c, sum_g, mask=c_ok)
        tl.store(partials_vec + C + c, sum_gx, mask=c_ok)
    else:
        b = block // c_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
        b_ok = b < B
        dw = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
        for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            m_ok = (m < M)[:, None]
            row = m.to(tl.int64)[:, None] * UNIT
            dz = tl.load(dz_ptr + row * dz_units + b[None, :], mask=m_ok & b_ok[None, :], other=0.0)
            x = tl.load(x_ptr + row * x_units + c[None, :], mask=m_ok & c_ok[None, :], other=0.0)
            a = relu(pre_activation(x, scale, shift)).to(x.dtype)
            dw = tl.dot(tl.trans(a), dz, dw, input_precision=PRECISION)
        at = 2 * C + b[None, :] * C + c[:, None]
        tl.store(partials_vec + at, dw, mask=b_ok[None, :] & c_ok[:, None])


_forward = Kernel(bn_relu_conv1x1_forward_kernel)
_fused = Kernel(bn_relu_conv1x1_backward_fused_kernel)
_split = Kernel(bn_relu_conv1x1_backward_split_kernel)


@plan
def _plan_forward(device, pixels, channels, bottleneck, strides, dtype, precision, alignment, stats):
    unit = alignment // dtype.itemsize
    config = configure(_forward, device, precision, (pixels, channels, bottleneck))
    config = config.fit(BLOCK_B=bottleneck, BLOCK_C=channels)
    blocks = triton.cdiv(bottleneck, config.blocks["BLOCK_B"])
    programs = persistent_programs(device, pixels, config, blocks)
    vector = torch.float32
    types = (dtype, vector, vector, dtype, dtype, vector if stats else None)
    numbers = (pixels, *(n // unit for n in (channels, bottleneck, *strides)))
    launch = _forward.bind(
        device, (blocks, programs), types, numbers, alignment, config,
        UNIT=unit, PRECISION=dot_precision(precision),
    )  # fmt: skip
    return (2 * bottleneck + 1) * programs, launch, bind_merge(device, programs, bottleneck, pixels)


def bn_relu_conv1x1_forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    z: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    if x.numel() == 0:
        return zero(mean, var)
    weight, channels, bottleneck = dense_1x1(weight), x.shape[3], z.shape[3]
    strides = (x.stride(2), z.stride(2))
    alignment = alignment_of(x, z, weight=weight)
    length, launch, merge = _plan_forward(
        x.get_device(), pixels_of(x), channels, bottleneck, strides, x.dtype,
        fp32_precision(x.dtype), alignment, mean is not None,
    )  # fmt: skip
    partials = None if mean is None else partial_results(length, x)
    launch(x, scale, shift, weight, z, partials)
    if mean is not None:
        merge(partials, mean, var)
    return None


def _fused_config(device, precision, sizes) -> Config | None:
    """The fused kernel's configuration if the table has one that covers all of B, else None."""
    try:
        config = configure(_fused, device, precision, sizes)
    except LookupError:
        return None
    return config if config.blocks["BLOCK_B"] >= sizes[2] else None


@plan
def _plan_backward(
    device, pixels, channels, bottleneck, strides, dtype, precision, alignment, weight_strides
):
    """Returns (length of the partial results, form_dz, launch, reduce).

    ``form_dz`` launches the kernel that forms dz; it is None if ``launch`` runs the fused kernel.
    """
    unit, sizes = alignment // dtype.itemsize, (pixels, channels, bottleneck)
    fused = _fused_config(device, precision, sizes)
    config = fused or configure(_split, device, precision, sizes)
    config = config.fit(BLOCK_B=bottleneck, BLOCK_C=channels)
    blocks = triton.cdiv(channels, config.blocks["BLOCK_C"])
    wanted, vector = weight_strides is not None, torch.float32
    if not fused:
        blocks *= 1 + triton.cdiv(bottleneck, config.blocks["BLOCK_B"]) * wanted
    programs = persistent_programs(device, pixels, config, blocks)
    row = 2 * channels + (bottleneck * channels if wanted else 0)
    places = (0, *weight_strides) if wanted else None
    reduce = bind_reduce(device, programs, 2 * channels, dtype, (1, bottleneck, channels), places)
    constants = {"UNIT": unit, "PRECISION": dot_precision(precision)}
    from_x = (dtype, *(vector,) * 3, dtype, dtype, vector)
    grad_bn, z, x, grad_x = strides
    if fused:
        types: tuple[torch.dtype, ...] = (dtype, dtype, *(vector,) * 3, *from_x)
        numbers = (pixels, *(n // unit for n in (channels, bottleneck, *strides)), row)
        kernel, form_dz, constants["WEIGHT"] = _fused, None, wanted
    else:
        types = (dtype, *from_x)
        numbers = (pixels, *(n // unit for n in (channels, bottleneck, grad_bn, x, grad_x)), row)
        kernel = _split
        form_dz = bind_affine(device, pixels, bottleneck, (grad_bn, z, grad_bn), dtype, alignment, True)
    launch = kernel.bind(device, (blocks, programs), types, numbers, alignment, config, **constants)
    return row * programs, form_dz, launch, reduce


def bn_relu_conv1x1_backward(
    grad_bn: Tensor,
    z: Tensor,
    z_scale: Tensor,
    z_u: Tensor,
    z_v: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    sums: Tensor,
    grad_weight: Tensor | None,
) -> None:
    if x.numel() == 0:
        return zero(sums, grad_weight)
    weight, channels, bottleneck = dense_1x1(weight), x.shape[3], z.shape[3]
    strides = (grad_bn.stride(2), z.stride(2), x.stride(2), grad_x.stride(2))
    alignment = alignment_of(grad_bn, z, x, grad_x, weight=weight)
    length, form_dz, launch, reduce = _plan_backward(
        x.get_device(), pixels_of(x), channels, bottleneck, strides, x.dtype, fp32_precision(x.dtype),
        alignment, None if grad_weight is None else grad_weight.stride()[:2],
    )  # fmt: skip
    partials = partial_results(length, x)
    if form_dz is None:
        launch(grad_bn, z, z_scale, z_u, z_v, x, mean, scale, shift, weight, grad_x, partials)
    else:
        form_dz(grad_bn, z_scale, z, z_u, z_v, grad_bn)
        launch(grad_bn, x, mean, scale, shift, weight, grad_x, partials)
    return reduce(partials, sums, grad_weight)
