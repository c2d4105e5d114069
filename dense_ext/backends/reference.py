"""All primitives in plain ATen, for any device and any floating dtype.

The tests take this backend as their oracle. It is also the best place to learn what each primitive does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import STORAGE_DTYPES, Backend, accumulate_dtype


def _widen(x: Tensor) -> Tensor:
    """``x`` in its accumulation dtype."""
    return x.to(accumulate_dtype(x.dtype))


def _pre_activation(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, _widen(x), scale)


def _nchw(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _nhwc(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight as [out, in]."""
    return weight.flatten(1)


# PyTorch's operators by the number of spatial dimensions.
_CONVOLUTION = {2: F.conv2d, 3: F.conv3d}
_AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {2: F.max_pool2d, 3: F.max_pool3d}
_MAXIMUM_BACKWARD = {
    2: torch.ops.aten.max_pool2d_with_indices_backward,
    3: torch.ops.aten.max_pool3d_with_indices_backward,
}


def _spatial(x: Tensor) -> int:
    """How many spatial dimensions x [N, ..., C] has."""
    return x.dim() - 2


def _mask_and_sum(g: Tensor, activation: Tensor, x: Tensor, mean: Tensor, sums: Tensor) -> None:
    """Apply ReLU's backward to the gradient ``g`` in place, and write its channel sums to ``sums``.

    ``activation`` is overwritten. Where it is NaN the gradient passes, as in PyTorch.
    """
    pixels = tuple(range(x.dim() - 1))
    g.masked_fill_(activation <= 0, 0)
    sums[0] = g.sum(dim=pixels)
    sums[1] = torch.sub(_widen(x), mean, out=activation).mul_(g).sum(dim=pixels)


class ReferenceBackend(Backend):
    """Computes every primitive step by step, as the formulas in :mod:`dense_ext.backends.base` say.

    It takes images and, through :mod:`dense_ext.backends.volume`, volumes.
    """

    name = "reference"

    def factor(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` as a factor of the 3x3 convolution: widened, whatever the activations' ``dtype``."""
        return _widen(x)

    def unavailable_reason(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not one of {', '.join(str(d) for d in STORAGE_DTYPES)}"
        return None

    def scratch_bytes(
        self, primitive: str, pixels: int, in_channels: int, out_channels: int, dtype: torch.dtype
    ) -> int:
        """The largest sum of temporaries alive at once in the formulas below, for images.

        ``c`` and ``k`` are the bytes of one pixel's input and output channels in the accumulation dtype.
        """
        wide = accumulate_dtype(dtype)
        c, k = in_channels * wide.itemsize, out_channels * wide.itemsize
        copy = c if wide != dtype else 0  # widening copies 16-bit activations
        summing = max(copy, in_channels)  # _mask_and_sum: x widened, or ReLU's mask of one byte per value
        indices = 8 * in_channels / 4  # of the max pool: an int64 for each of a quarter of the pixels
        a_pixel = {
            "channel_stats": copy,
            "affine_gradient": 2 * c + copy,
            "scaled_accumulate": c + 2 * copy,
            "bn_relu_conv1x1_forward": c + max(copy, k),
            "bn_relu_conv1x1_backward": k + 3 * c + copy,  # dz; a, g, the new grad_x
            "bn_relu_conv3x3_forward": c + max(copy, k),
            "bn_relu_conv3x3_backward": k + 2 * c + summing,  # dy; a, da
            "bn_relu_pool_conv1x1_forward": c + max(copy, (c + k) / 4),
            "bn_relu_pool_conv1x1_backward": 3 * c,  # a, spread, g
            "bn_relu_maxpool_forward": c + max(copy, c / 4 + indices),
            "bn_relu_maxpool_backward": 2.25 * c + indices + summing,  # a, da, the maxima
        }
        return math.ceil(pixels * a_pixel.get(primitive, 0))

    def channel_stats(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        v, m = torch.var_mean(_widen(x), dim=tuple(range(x.dim() - 1)), correction=0)
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
        z.copy_(a @ _matrix(_widen(weight)).t())
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
        if grad_weight is not None:
            dw = dz.flatten(0, -2).t() @ a.flatten(0, -2)
            grad_weight.copy_(dw.view(grad_weight.shape))
        g = dz @ _matrix(_widen(weight))
        _mask_and_sum(g, a, x, mean, sums)
        self.scaled_accumulate(g, scale, grad_x)

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
        convolve = _CONVOLUTION[_spatial(z)]
        y.copy_(_nhwc(convolve(_nchw(self.factor(a, z.dtype)), self.factor(weight, z.dtype), padding=1)))
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
        ones, zeros = [1] * _spatial(z), [0] * _spatial(z)
        da, dw, _ = torch.ops.aten.convolution_backward(
            _nchw(self.factor(dy, z.dtype)),
            _nchw(self.factor(a, z.dtype)),
            self.factor(weight, z.dtype),
            None,
            ones,
            ones,
            ones,
            False,
            zeros,
            1,
            [True, grad_weight is not None, False],
        )
        g = _widen(_nhwc(da))
        _mask_and_sum(g, a, z, mean, sums)
        grad_bn.copy_(g)
        if grad_weight is not None:
            grad_weight.copy_(dw)

    def bn_relu_pool_conv1x1_forward(
        self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, y: Tensor
    ) -> None:
        a = _pre_activation(x, scale, shift).relu_()
        pooled = _nhwc(_AVERAGE[_spatial(x)](_nchw(a), 2))
        y.copy_(pooled @ _matrix(_widen(weight)).t())

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
        spread = (_widen(grad) @ _matrix(_widen(weight))) / 2 ** _spatial(x)
        for dim in range(1, x.dim() - 1):
            spread = spread.repeat_interleave(2, dim=dim)
        g = torch.zeros_like(a)
        g[tuple(slice(size) for size in spread.shape)] = spread
        del spread
        if grad_weight is not None:
            pooled = _nhwc(_AVERAGE[_spatial(x)](_nchw(a), 2)).flatten(0, -2)
            dw = _widen(grad).flatten(0, -2).t() @ pooled
            grad_weight.copy_(dw.view(grad_weight.shape))
        _mask_and_sum(g, a, x, mean, sums)
        grad_x.copy_(g.mul_(scale))

    def bn_relu_maxpool_forward(self, x: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
        a = _pre_activation(x, scale, shift).relu_()
        y.copy_(_nhwc(_MAXIMUM[_spatial(x)](_nchw(a), 3, stride=2, padding=1)))

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
        d = _spatial(x)
        _, indices = _MAXIMUM[d](_nchw(a), 3, stride=2, padding=1, return_indices=True)
        da = _MAXIMUM_BACKWARD[d](
            _nchw(_widen(grad)), _nchw(a), [3] * d, [2] * d, [1] * d, [1] * d, False, indices
        )
        g = _nhwc(da)
        _mask_and_sum(g, a, x, mean, sums)
        grad_x.copy_(g.mul_(scale))
