"""The transition's and the stem's forward and backward over the primitives.

Both apply batch norm, ReLU and a pool. The transition averages 2x2 windows and then convolves 1x1; the stem
takes the maximum (window 3, stride 2, padding 1). For volumes the windows are 2x2x2 and 3x3x3. Only the input
is saved; backward recomputes the activation tile by tile. The input's gradient leaves the operator, so batch
norm's deferred ``u*x + v`` is added here (see :mod:`dense_ext.batch_norm`).

Norm and activation alone, without a pool, serve an encoder that returns the activation before the pool too.

A transition's average pool and 1x1 convolution commute. If the pool takes the maximum, or dropout comes
before it, they do not: then the convolution comes first, and its result is held in memory during the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activation
from .backends import Primitives
from .backends.base import accumulate_dtype
from .batch_norm import values_per_channel
from .schedule import BoundNorm, Dropout, Norm, bind, channels_last, nhwc
from .synchronised import Sync


@dataclass
class Pooling:
    """The constants of a transition, of the stem, or of norm and activation alone.

    The last two have neither convolution nor dropout.
    """

    norm: Norm
    weight: Tensor | None  # a transition's convolution's [K, C, 1, 1]
    bias: Tensor | None  # the convolution's [K], accumulation dtype
    dropout: Dropout  # between convolution and pool
    takes_maximum: bool  # whether a transition's pool takes the maximum
    window: tuple[int, ...]  # of a transition's pool
    sync: Sync | None  # the processes that share batch statistics
    activation: str = (
        ""  # of norm and activation alone, as :func:`activation` takes it; "" if there is a pool
    )

    @property
    def pools_first(self) -> bool:
        """Whether the pool comes first: always in the stem, in a transition if the two may be exchanged."""
        return not self.takes_maximum and self.dropout.rate == 0


def empty_outputs(pooling: Pooling, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for the outputs of :func:`forward`: y uninitialised, the statistics zero."""
    n, c, *pixels = x.shape
    if pooling.activation:
        return torch.empty_like(x), x.new_zeros(2, c, dtype=accumulate_dtype(x.dtype))
    if pooling.weight is None:
        size = (n, c, *((length - 1) // 2 + 1 for length in pixels))
    else:
        lengths = (length // w for length, w in zip(pixels, pooling.window, strict=True))
        size = (n, pooling.weight.shape[0], *lengths)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=channels_last(x))
    return y, x.new_zeros(2, c, dtype=accumulate_dtype(x.dtype))


def forward(
    ops: Primitives, pooling: Pooling, x: Tensor, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a transition, the stem, or norm and activation alone.

    Args:
        x: [N, C, H, W] in channels_last memory; for norm and activation alone in any memory format.
        known: x's batch statistics [2, C] if they are known, else None. Without a pool they must be.

    Returns:
        y in channels_last memory, and the batch statistics [2, C]. y is [N, K, H//2, W//2], or for the stem
        [N, C, (H-1)//2 + 1, (W-1)//2 + 1]. Without a pool y is like x. The statistics are mean and biased
        variance, and zero if the norm uses running statistics.
    """
    y, stats = empty_outputs(pooling, x)
    if x.shape[0] == 0 and pooling.sync is None:
        return y, stats
    norm = pooling.norm
    if norm.running is None and known is not None:
        stats.copy_(known)
    elif norm.running is None:
        ops.channel_stats(nhwc(x), stats[0], stats[1])
        if pooling.sync is not None:
            pooling.sync.combine(stats[0], stats[1])
    bound = bind(ops, norm, stats[0], stats[1])
    if pooling.activation:
        nhwc(y).copy_(activation(pooling.activation).forward(_normed(bound, x)))
    elif pooling.weight is None:
        ops.bn_relu_maxpool_forward(nhwc(x), bound.scale, bound.shift, nhwc(y))
    elif pooling.pools_first:
        ops.bn_relu_pool_conv1x1_forward(nhwc(x), bound.scale, bound.shift, pooling.weight, nhwc(y))
        if pooling.bias is not None:
            nhwc(y).add_(pooling.bias)
    else:
        y.copy_(_pool(pooling, _convolved(ops, pooling, bound, x)))
    return y, stats


def _normed(bound: BoundNorm, x: Tensor) -> Tensor:
    """The norm's output [N, H, W, C] in the accumulation dtype."""
    return torch.addcmul(bound.shift, nhwc(x).to(bound.shift.dtype), bound.scale)


def _convolved(ops: Primitives, pooling: Pooling, bound: BoundNorm, x: Tensor) -> Tensor:
    """The convolution's result [N, K, H, W], after bias and dropout."""
    assert pooling.weight is not None
    z = x.new_empty(*nhwc(x).shape[:-1], pooling.weight.shape[0])
    ops.bn_relu_conv1x1_forward(nhwc(x), bound.scale, bound.shift, pooling.weight, z, None, None)
    if pooling.bias is not None:
        z.add_(pooling.bias)
    if pooling.dropout.rate > 0:
        z.mul_(pooling.dropout.mask(z))
    return z.movedim(-1, 1)


def _pool(pooling: Pooling, z: Tensor) -> Tensor:
    """The pool of z [N, K, H, W], through PyTorch's operators."""
    dims = len(pooling.window)
    pools: Any = (F.max_pool2d, F.max_pool3d) if pooling.takes_maximum else (F.avg_pool2d, F.avg_pool3d)
    return pools[dims - 2](z, pooling.window)


def _pool_backward(pooling: Pooling, grad: Tensor, z: Tensor) -> Tensor:
    """The gradient of z [N, K, H, W], of whose values only a maximum depends."""
    dims, window = len(pooling.window), pooling.window
    zeros, ones = [0] * dims, [1] * dims
    if not pooling.takes_maximum:
        average = getattr(torch.ops.aten, f"avg_pool{dims}d_backward")
        return average(grad, z, window, window, zeros, False, True, None)
    maximum = (F.max_pool2d, F.max_pool3d)[dims - 2]
    _, indices = maximum(z, window, return_indices=True)
    backward = getattr(torch.ops.aten, f"max_pool{dims}d_with_indices_backward")
    return backward(grad, z, window, window, zeros, ones, False, indices)


@dataclass
class PoolingGradients:
    """The gradients of an operator's parameters and input; None where there is none."""

    x: Tensor
    norm_weight: Tensor  # [C]
    norm_bias: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None  # [K]


def backward(
    ops: Primitives, pooling: Pooling, grad: Tensor, x: Tensor, stats: Tensor, needs_conv_grad: bool
) -> PoolingGradients:
    """Backward of :func:`forward`.

    Args:
        grad: the gradient of y, of the same shape, in channels_last memory.
        x: forward's x, in channels_last memory.
        stats: as forward returned them.
        needs_conv_grad: whether the gradient of the convolution's weight is needed.
    """
    norm, weight = pooling.norm, pooling.weight
    bound = bind(ops, norm, stats[0], stats[1])
    if pooling.activation:
        return _activation_backward(ops, pooling, bound, grad, x)
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty_like(weight) if weight is not None and needs_conv_grad else None
    # Averaging windows keeps the sum of a gradient, and so the gradient of a bias.
    grad_bias = None if pooling.bias is None else _sum(nhwc(grad), pooling.bias)
    vectors = torch.empty_like(bound.mean), torch.empty_like(bound.mean)
    if norm.running is None and pooling.sync is None and pooling.pools_first:
        through = bound.mean, bound.var, norm.weight, norm.eps, bound.scale, bound.shift
        if weight is None:
            ops.bn_relu_maxpool_norm_backward(nhwc(grad), nhwc(x), *through, nhwc(grad_x), *vectors)
        else:
            ops.bn_relu_pool_conv1x1_norm_backward(
                nhwc(grad), nhwc(x), *through, weight, nhwc(grad_x), *vectors, grad_weight
            )
        return PoolingGradients(grad_x, *vectors, grad_weight, grad_bias)
    sums = torch.empty_like(stats)
    affine = bound.mean, bound.scale, bound.shift
    if weight is None:
        ops.bn_relu_maxpool_backward(nhwc(grad), nhwc(x), *affine, nhwc(grad_x), sums)
    elif pooling.pools_first:
        ops.bn_relu_pool_conv1x1_backward(
            nhwc(grad), nhwc(x), *affine, weight, nhwc(grad_x), sums, grad_weight
        )
    else:
        z = _convolved(ops, pooling, bound, x)
        dz = nhwc(_pool_backward(pooling, grad, z).contiguous(memory_format=channels_last(x)))
        if pooling.dropout.rate > 0:
            dz.mul_(pooling.dropout.mask(dz))
        if pooling.bias is not None:
            grad_bias = _sum(dz, pooling.bias)
        ones, zeros = dz.new_ones(dz.shape[-1], dtype=stats.dtype), stats.new_zeros(dz.shape[-1])
        ops.bn_relu_conv1x1_backward(
            dz, nhwc(z), ones, zeros, zeros, nhwc(x), *affine, weight, nhwc(grad_x.zero_()), sums, grad_weight
        )
    u, v = torch.zeros_like(stats)
    count = values_per_channel(x) if pooling.sync is None else 1
    vectors = bound.gradient(ops, sums, count, u, v)
    if norm.running is None:
        if pooling.sync is not None:
            pooling.sync.average(u, v)
        ops.affine_gradient(nhwc(grad_x), nhwc(x), u, v, nhwc(grad_x))
    return PoolingGradients(grad_x, *vectors, grad_weight, grad_bias)


def _activation_backward(
    ops: Primitives, pooling: Pooling, bound: BoundNorm, grad: Tensor, x: Tensor
) -> PoolingGradients:
    """Backward of norm and activation alone, through PyTorch's operators."""
    pixels, wide = tuple(range(x.dim() - 1)), nhwc(x).to(bound.mean.dtype)
    g = activation(pooling.activation).backward(nhwc(grad).to(wide.dtype), _normed(bound, x))
    sums = torch.stack([g.sum(pixels), (g * (wide - bound.mean)).sum(pixels)])
    u, v = torch.zeros_like(sums)
    count = values_per_channel(x) if pooling.sync is None else 1
    vectors = bound.gradient(ops, sums, count, u, v)
    dx = g * bound.scale
    if pooling.norm.running is None:
        if pooling.sync is not None:
            pooling.sync.average(u, v)
        dx += u * wide + v
    grad_x = torch.empty_like(x)
    nhwc(grad_x).copy_(dx)
    return PoolingGradients(grad_x, *vectors)


def _sum(grad: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias [K], which was added to a tensor with the gradient ``grad`` [N, H, W, K]."""
    return grad.sum(tuple(range(grad.dim() - 1)), dtype=bias.dtype)
