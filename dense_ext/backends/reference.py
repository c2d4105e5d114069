"""All primitives in plain ATen, for any device and any floating dtype.

The tests take this backend as their oracle. It is also the best place to learn what each primitive does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activation
from .base import STORAGE_DTYPES, Backend, accumulate_dtype


def _widen(x: Tensor) -> Tensor:
    """``x`` in its accumulation dtype."""
    return x.to(accumulate_dtype(x.dtype))


def _pre_activation(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, _widen(x), scale)


def _product(u: Tensor, x: Tensor) -> Tensor:
    """``u*x``, and zero where u is.

    Norms with fixed statistics have u = 0, and then an x that isn't finite does not make the gradient NaN.
    """
    return (u * _widen(x)).masked_fill_(u == 0, 0)


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


class ReferenceBackend(Backend):
    """Computes every primitive step by step, as the formulas in :mod:`dense_ext.backends.base` say.

    Through :mod:`dense_ext.backends.general` it also takes volumes, other activations and other windows.
    """

    name = "reference"
    activation = "relu"
    dilation = 1  # of the convolution called 3x3, whose window its weight tells

    def activate(self, x: Tensor) -> Tensor:
        """The activation of the norm's output ``x``; ReLU is in place."""
        return x.relu_() if self.activation == "relu" else activation(self.activation).forward(x)

    def activation_backward(self, g: Tensor, x: Tensor) -> Tensor:
        """The gradient of the norm's output, or for ReLU of the activation, ``x``; ``g`` is overwritten.

        Where x is NaN the gradient passes, as in PyTorch.
        """
        if self.activation == "relu":
            return g.masked_fill_(x <= 0, 0)
        return activation(self.activation).backward(g, x)

    def _masked(self, g: Tensor, pre: Tensor, x: Tensor, mean: Tensor, sums: Tensor) -> Tensor:
        """The gradient at the norm's output, whose channel sums are written to ``sums``.

        ``g``, the gradient of the activation, and ``pre``, the norm's output, are overwritten.
        """
        pixels = tuple(range(x.dim() - 1))
        g = self.activation_backward(g, pre)
        sums[0] = g.sum(dim=pixels)
        sums[1] = torch.sub(_widen(x), mean, out=pre).mul_(g).sum(dim=pixels)
        return g

    def _padding(self, weight: Tensor) -> list[int]:
        """The padding that keeps the size of images."""
        return [self.dilation * (length // 2) for length in weight.shape[2:]]

    def _window(self, x: Tensor) -> tuple[int, ...]:
        """A transition's pooling window on x [N, ..., C]."""
        return (2,) * _spatial(x)

    def factor(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` as a factor of the 3x3 convolution: widened, whatever the weight's ``dtype``."""
        return _widen(x)

    def unavailable_reason(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not one of {', '.join(str(d) for d in STORAGE_DTYPES)}"
        return None

    def scratch_bytes(
        self,
        primitive: str,
        sizes: Sequence[int],
        in_channels: int,
        out_channels: int,
        dtype: torch.dtype,
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
        return math.ceil(math.prod(sizes) * a_pixel.get(primitive, 0))

    def channel_stats(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        if len(x) == 0:  # of a process that shares statistics with others but has no images
            mean.zero_()
            var.zero_()
            return
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
        out.copy_(_widen(grad) + _product(u, x) + v)

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
        a = self.activate(_pre_activation(x, scale, shift))
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
        dz = z_scale * _widen(grad_bn) + _product(z_u, z) + z_v
        pre = _pre_activation(x, scale, shift)
        a = self.activate(pre)
        if grad_weight is not None:
            dw = dz.flatten(0, -2).t() @ a.flatten(0, -2)
            grad_weight.copy_(dw.view(grad_weight.shape))
        g = self._masked(dz @ _matrix(_widen(weight)), pre, x, mean, sums)
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
        a = self.activate(_pre_activation(z, scale, shift))
        result = _CONVOLUTION[_spatial(z)](
            _nchw(self.factor(a, weight.dtype)),
            self.factor(weight, weight.dtype),
            padding=self._padding(weight),
            dilation=self.dilation,
        )
        y.copy_(_nhwc(result))
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
        dy = _widen(grad) + _product(u, y) + v
        pre = _pre_activation(z, scale, shift)
        a = self.activate(pre)
        ones, zeros = [1] * _spatial(z), [0] * _spatial(z)
        da, dw, _ = torch.ops.aten.convolution_backward(
            _nchw(self.factor(dy, weight.dtype)),
            _nchw(self.factor(a, weight.dtype)),
            self.factor(weight, weight.dtype),
            None,
            ones,
            self._padding(weight),
            [self.dilation] * _spatial(z),
            False,
            zeros,
            1,
            [True, grad_weight is not None, False],
        )
        grad_bn.copy_(self._masked(_widen(_nhwc(da)), pre, z, mean, sums))
        if grad_weight is not None:
            grad_weight.copy_(dw)

    def bn_relu_pool_conv1x1_forward(
        self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, y: Tensor
    ) -> None:
        a = self.activate(_pre_activation(x, scale, shift))
        pooled = _nhwc(_AVERAGE[_spatial(x)](_nchw(a), self._window(x)))
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
        pre, window = _pre_activation(x, scale, shift), self._window(x)
        a = self.activate(pre)
        spread = (_widen(grad) @ _matrix(_widen(weight))) / math.prod(window)
        for dim, length in enumerate(window, start=1):
            spread = spread.repeat_interleave(length, dim=dim)
        g = torch.zeros_like(a)
        g[tuple(slice(size) for size in spread.shape)] = spread
        del spread
        if grad_weight is not None:
            pooled = _nhwc(_AVERAGE[_spatial(x)](_nchw(a), window)).flatten(0, -2)
            dw = _widen(grad).flatten(0, -2).t() @ pooled
            grad_weight.copy_(dw.view(grad_weight.shape))
        grad_x.copy_(self._masked(g, pre, x, mean, sums).mul_(scale))

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
        grad_x.copy_(self._masked(_nhwc(da), a, x, mean, sums).mul_(scale))
