"""The transition's and the stem's forward and backward over the primitives.

Both are batch norm and ReLU, then a pool: the transition averages 2x2 windows and convolves 1x1,
the stem takes maxima (window 3, stride 2, padding 1). Only their input is kept, the activation is
recomputed tile by tile in backward. Their input's gradient leaves the operator, so the deferred
``u*x + v`` of the batch norm is applied at once, in place. Volumes have windows 2x2x2 and 3x3x3.

``weight`` is the transition's convolution [K, C, 1, 1], None for the stem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Primitives
from .backends.base import accumulate_dtype
from .batch_norm import values_per_channel
from .schedule import Norm, bind, channels_last, nhwc


def empty_outputs(weight: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of :func:`forward`, unwritten (the statistics zero)."""
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
        known: x's batch statistics [2, C] if a block has taken them.

    Returns:
        y [N, K, H//2, W//2] or [N, C, (H-1)//2 + 1, (W-1)//2 + 1] in channels_last memory, and the
        batch statistics [2, C] (mean and biased variance; zero where running ones are used).
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
    """Gradients of x, of the norm's weight and bias, and of the convolution's weight.

    Args:
        grad: like forward's y, in channels_last memory.
        x: forward's x, in channels_last memory.
        stats: as forward returned it.
        needs_conv_grad: whether the last one is wanted; else it is None.
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
