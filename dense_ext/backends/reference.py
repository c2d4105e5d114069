"""All primitives in plain ATen: any device, any floating dtype. The oracle, and the place to learn them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import STORAGE_DTYPES, Backend, accumulate_dtype


def _widen(x: Tensor) -> Tensor:
    """The tensor in its accumulation dtype."""
    return x.to(accumulate_dtype(x.dtype))


def _pre_activation(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, _widen(x), scale)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _mask(grad: Tensor, activation: Tensor) -> Tensor:
    """ReLU's backward as PyTorch does it: a NaN activation lets the gradient through."""
    return grad.masked_fill(activation <= 0, 0)


def _write_sums(sums: Tensor, g: Tensor, x: Tensor, mean: Tensor) -> None:
    sums[0] = g.sum(dim=(0, 1, 2))
    sums[1] = (g * (_widen(x) - mean)).sum(dim=(0, 1, 2))


class ReferenceBackend(Backend):
    """Every primitive as the formula in :mod:`dense_ext.backends.base`, step by step."""

    name = "reference"

    def can_run(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not a floating type it handles"
        return None

    def scratch_bytes(
        self, primitive: str, pixels: int, in_channels: int, out_channels: int, dtype: torch.dtype
    ) -> int:
        """Counted from the formulas below; c and k are a pixel's in and out channels, widened.

        Widening copies 16-bit activations, which shows where nothing larger is alive.
        """
        wide = accumulate_dtype(dtype)
        c, k = in_channels * wide.itemsize, out_channels * wide.itemsize
        copy = c if wide != dtype else 0
        indices = 8 * in_channels / 4  # of the max pool, int64
        a_pixel = {
            "channel_stats": copy,
            "affine_gradient": 2 * c + copy,
            "scaled_accumulate": c + 2 * copy,
            "bn_relu_conv1x1_forward": c + max(copy, k),
            "bn_relu_conv1x1_backward": k + 4 * c,  # dz; a, g, x - mean and its product with g
            "bn_relu_conv3x3_forward": c + max(copy, k),
            "bn_relu_conv3x3_backward": k + 5 * c,  # dy; a, da, g and the same two
            "bn_relu_pool_conv1x1_forward": c + max(copy, (c + k) / 4),
            "bn_relu_pool_conv1x1_backward": 5.25 * c,  # a, the windows' gradient, spread, g, the two
            "bn_relu_maxpool_forward": c + max(copy, c / 4 + indices),
            "bn_relu_maxpool_backward": 5.25 * c + indices,  # a, the maxima, da, g, the two
        }
        return math.ceil(pixels * a_pixel.get(primitive, 0))

    def channel_stats(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        v, m = torch.var_mean(_widen(x), dim=(0, 1, 2), correction=0)
        mean.copy_(m)
        var.copy_(v)

    def bn_scale_shift(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: Tensor,
        shift: Tensor,
    ) -> None:
        torch.mul(weight, (var + eps).rsqrt(), out=scale)
        torch.sub(bias, mean * scale, out=shift)

    def bn_gradient(
        self,
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
        invstd = (var + eps).rsqrt()
        torch.mul(sums[1], invstd, out=grad_weight)
        grad_bias.copy_(sums[0])
        if u is not None and v is not None:
            scale = weight * invstd
            du = -scale * invstd * grad_weight / count
            u += du
            v -= scale * grad_bias / count + du * mean

    def affine_gradient(self, grad: Tensor, x: Tensor, u: Tensor, v: Tensor, out: Tensor) -> None:
        out.copy_(_widen(grad) + u * _widen(x) + v)

    def scaled_accumulate(self, grad: Tensor, scale: Tensor, out: Tensor) -> None:
        out.copy_(torch.addcmul(_widen(out), _widen(grad), scale))

    def bn_relu_conv1x1_forward(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        z: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> None:
        a = _pre_activation(x, scale, shift).relu_()
        z.copy_(a @ _widen(weight)[:, :, 0, 0].t())
        if mean is not None and var is not None:
            self.channel_stats(z, mean, var)

    def bn_relu_conv1x1_backward(
        self,
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
        dz = z_scale * _widen(grad_bn) + z_u * _widen(z) + z_v
        a = _pre_activation(x, scale, shift).relu_()
        g = _mask(dz @ _widen(weight)[:, :, 0, 0], a)
        _write_sums(sums, g, x, mean)
        self.scaled_accumulate(g, scale, grad_x)
        if grad_weight is not None:
            dw = dz.flatten(0, 2).t() @ a.flatten(0, 2)
            grad_weight.copy_(dw[:, :, None, None])

    def bn_relu_conv3x3_forward(
        self,
        z: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        y: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> None:
        a = _pre_activation(z, scale, shift).relu_()
        y.copy_(_nhwc(F.conv2d(_nchw(a), _widen(weight), padding=1)))
        if mean is not None and var is not None:
            self.channel_stats(y, mean, var)

    def bn_relu_conv3x3_backward(
        self,
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
        dy = _widen(grad) + u * _widen(y) + v
        a = _pre_activation(z, scale, shift).relu_()
        da, dw, _ = torch.ops.aten.convolution_backward(
            _nchw(dy),
            _nchw(a),
            _widen(weight),
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, grad_weight is not None, False],
        )
        g = _mask(_nhwc(da), a)
        _write_sums(sums, g, z, mean)
        grad_bn.copy_(g)
        if grad_weight is not None:
            grad_weight.copy_(dw)

    def bn_relu_pool_conv1x1_forward(
        self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, y: Tensor
    ) -> None:
        a = _pre_activation(x, scale, shift).relu_()
        pooled = _nhwc(F.avg_pool2d(_nchw(a), 2))
        y.copy_(pooled @ _widen(weight)[:, :, 0, 0].t())

    def bn_relu_pool_conv1x1_backward(
        self,
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
        a = _pre_activation(x, scale, shift).relu_()
        height, width = grad.shape[1:3]
        window_grad = (_widen(grad) @ _widen(weight)[:, :, 0, 0]) / 4
        spread = window_grad.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        g = torch.zeros_like(a)
        g[:, : 2 * height, : 2 * width] = spread
        g = _mask(g, a)
        _write_sums(sums, g, x, mean)
        grad_x.copy_(scale * g)
        if grad_weight is not None:
            pooled = _nhwc(F.avg_pool2d(_nchw(a), 2)).flatten(0, 2)
            dw = _widen(grad).flatten(0, 2).t() @ pooled
            grad_weight.copy_(dw[:, :, None, None])

    def bn_relu_maxpool_forward(self, x: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
        a = _pre_activation(x, scale, shift).relu_()
        y.copy_(_nhwc(F.max_pool2d(_nchw(a), 3, stride=2, padding=1)))

    def bn_relu_maxpool_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        grad_x: Tensor,
        sums: Tensor,
    ) -> None:
        a = _pre_activation(x, scale, shift).relu_()
        _, indices = F.max_pool2d(_nchw(a), 3, stride=2, padding=1, return_indices=True)
        da = torch.ops.aten.max_pool2d_with_indices_backward(
            _nchw(_widen(grad)), _nchw(a), [3, 3], [2, 2], [1, 1], [1, 1], False, indices
        )
        g = _mask(_nhwc(da), a)
        _write_sums(sums, g, x, mean)
        grad_x.copy_(scale * g)
