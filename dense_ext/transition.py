"""The transition's and the stem's forward and backward over the primitives.

Both apply batch norm, ReLU and a pool. The transition averages 2x2 windows and then convolves 1x1; the stem
takes the maximum (window 3, stride 2, padding 1). For volumes the windows are 2x2x2 and 3x3x3. Only the input
is saved; backward recomputes the activation tile by tile. The input's gradient leaves the operator, so batch
norm's deferred ``u*x + v`` is added here (see :mod:`dense_ext.batch_norm`).

``weight`` is the transition's convolution [K, C, 1, 1], and None for the stem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Primitives
from .backends.base import accumulate_dtype
from .batch_norm import values_per_channel
from .schedule import Norm, bind, channels_last, nhwc


def empty_outputs(weight: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors for the outputs of :func:`forward`: y uninitialised, the statistics zero."""
    n, c, *pixels = x.shape
    if weight is None:
        size = (n, c, *((length - 1) // 2 + 1 for length in pixels))
    else:
        size = (n, weight.shape[0], *(length // 2 for length in pixels))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=channels_last(x))
    return y, x.new_zeros(2, c, dtype=accumulate_dtype(x.dtype))


def forward(
    ops: Primitives, norm: Norm, weight: Tensor | None, x: Tensor, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a transition or the stem.

    Args:
        x: [N, C, H, W] in channels_last memory.
        known: x's batch statistics [2, C] if the block before has computed them, else None.

    Returns:
        y in channels_last memory, and the batch statistics [2, C]. y is [N, K, H//2, W//2], or for the stem
        [N, C, (H-1)//2 + 1, (W-1)//2 + 1]. The statistics are mean and biased variance, and zero if the norm
        uses running statistics.
    """
    y, stats = empty_outputs(weight, x)
    if x.shape[0] == 0:
        return y, stats
    if norm.running is None and known is not None:
        stats.copy_(known)
    elif norm.running is None:
        ops.channel_stats(nhwc(x), stats[0], stats[1])
    bound = bind(ops, norm, stats[0], stats[1])
    if weight is None:
        ops.bn_relu_maxpool_forward(nhwc(x), bound.scale, bound.shift, nhwc(y))
    else:
        ops.bn_relu_pool_conv1x1_forward(nhwc(x), bound.scale, bound.shift, weight, nhwc(y))
    return y, stats


def backward(
    ops: Primitives,
    norm: Norm,
    weight: Tensor | None,
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    needs_conv_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Backward of :func:`forward`.

    Args:
        grad: the gradient of y, of the same shape, in channels_last memory.
        x: forward's x, in channels_last memory.
        stats: as forward returned them.
        needs_conv_grad: whether the gradient of the convolution's weight is needed.

    Returns:
        The gradients of x, of the norm's weight and bias [C], and of the convolution's weight; the last is
        None if not needed.
    """
    bound = bind(ops, norm, stats[0], stats[1])
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty_like(weight) if weight is not None and needs_conv_grad else None
    if norm.running is None:
        through = bound.mean, bound.var, norm.weight, norm.eps, bound.scale, bound.shift
        grads = torch.empty_like(bound.mean), torch.empty_like(bound.mean)
        if weight is None:
            ops.bn_relu_maxpool_norm_backward(nhwc(grad), nhwc(x), *through, nhwc(grad_x), *grads)
        else:
            ops.bn_relu_pool_conv1x1_norm_backward(
                nhwc(grad), nhwc(x), *through, weight, nhwc(grad_x), *grads, grad_weight
            )
        return grad_x, *grads, grad_weight
    sums = torch.empty_like(stats)
    affine = bound.mean, bound.scale, bound.shift
    if weight is None:
        ops.bn_relu_maxpool_backward(nhwc(grad), nhwc(x), *affine, nhwc(grad_x), sums)
    else:
        ops.bn_relu_pool_conv1x1_backward(
            nhwc(grad), nhwc(x), *affine, weight, nhwc(grad_x), sums, grad_weight
        )
    return grad_x, *bound.gradient(ops, sums, values_per_channel(x), None, None), grad_weight
