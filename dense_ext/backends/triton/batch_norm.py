"""bn_scale_shift and bn_gradient: a batch norm's arithmetic on per-channel vectors, all [C]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, plan

BLOCK = 128


@triton.jit
def bn_scale_shift_kernel(
    mean_vec, var_vec, weight_vec, bias_vec, scale_vec, shift_vec, C, eps, BLOCK: tl.constexpr
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = c < C
    invstd = 1.0 / tl.sqrt_rn(tl.load(var_vec + c, mask=ok, other=1.0) + eps)
    scale = tl.load(weight_vec + c, mask=ok) * invstd
    tl.store(scale_vec + c, scale, mask=ok)
    tl.store(shift_vec + c, tl.load(bias_vec + c, mask=ok) - tl.load(mean_vec + c, mask=ok) * scale, mask=ok)


@triton.jit
def bn_gradient_kernel(
    sums_vec,
    mean_vec,
    var_vec,
    weight_vec,
    grad_weight_vec,
    grad_bias_vec,
    u_vec,
    v_vec,
    C,
    count,
    eps,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = c < C
    invstd = 1.0 / tl.sqrt_rn(tl.load(var_vec + c, mask=ok, other=1.0) + eps)
    grad_bias = tl.load(sums_vec + c, mask=ok)
    grad_weight = tl.load(sums_vec + C + c, mask=ok) * invstd
    tl.store(grad_bias_vec + c, grad_bias, mask=ok)
    tl.store(grad_weight_vec + c, grad_weight, mask=ok)
    if u_vec is not None:
        scale = tl.load(weight_vec + c, mask=ok) * invstd
        du = -scale * invstd * grad_weight / count
        dv = -scale * grad_bias / count - du * tl.load(mean_vec + c, mask=ok)
        tl.store(u_vec + c, tl.load(u_vec + c, mask=ok) + du, mask=ok)
        tl.store(v_vec + c, tl.load(v_vec + c, mask=ok) + dv, mask=ok)


_scale_shift = Kernel(bn_scale_shift_kernel)
_gradient = Kernel(bn_gradient_kernel)


@plan
def _plan_scale_shift(channels, eps, device):
    return _scale_shift.bind(
        device, (triton.cdiv(channels, BLOCK),), (torch.float32,) * 6, (channels, float(eps)), BLOCK=BLOCK
    )


@plan
def _plan_gradient(channels, eps, count, batch, device):
    types = (torch.float32,) * 6 + ((torch.float32,) * 2 if batch else (None, None))
    return _gradient.bind(
        device, (triton.cdiv(channels, BLOCK),), types, (channels, count, float(eps)), BLOCK=BLOCK
    )


def bn_scale_shift(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor, shift: Tensor
) -> None:
    launch = _plan_scale_shift(mean.shape[0], eps, mean.get_device())
    launch(mean, var, weight, bias, scale, shift)


def bn_gradient(
    sums: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    eps: float,
    count: int,
    grad_weight: Tensor,
    grad_bias: Tensor,
    u: Tensor | None,
    v: Tensor | None,
) -> None:
    launch = _plan_gradient(mean.shape[0], eps, count, u is not None, mean.get_device())
    launch(sums, mean, var, weight, grad_weight, grad_bias, u, v)


def sums_and_uv(mean: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised sums [2, C], and zeroed u and v as [2, C], for a norm whose ``mean`` is [C]."""
    return mean.new_empty(2, mean.shape[0]), mean.new_zeros(2, mean.shape[0])
