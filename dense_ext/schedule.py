"""The dense block's forward and backward over the primitives, written once for every backend.

A block owns one buffer X [N, H, W, Ct] (NHWC), Ct = c0 + L*K: c0 input channels, then the K new
channels of each of the L layers. Layer l reads the slice ``X[..., :C]``, C = c0 + l*K, and writes
``X[..., C:C+K]``; nothing is ever concatenated. Batch statistics of a channel are taken once, by
the kernel that writes it. In backward, G [N, H, W, Ct] collects the gradient of X; what batch norm
adds to it is kept apart as ``U*X + V`` per channel (see :mod:`dense_ext.batch_norm`).

M is the number of pixels N*H*W, B the bottleneck's channels, z [N, H, W, B] its activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Primitives
from .backends.base import accumulate_dtype

RECOMPUTE = ("none", "bottleneck", "block")


@dataclass
class Norm:
    """One batch norm's constants. ``running`` is None where the batch's statistics are used."""

    weight: Tensor  # [C], accumulation dtype
    bias: Tensor  # [C]
    eps: float
    running: tuple[Tensor, Tensor] | None  # mean, var [C]


@dataclass
class Layer:
    """One dense layer: norm1, conv1 (1x1), norm2, conv2 (3x3); without bottleneck norm1, conv1 (3x3)."""

    norms: list[Norm]
    convs: list[Tensor]


@dataclass
class Block:
    """A dense block's constants, in the order of its layers."""

    layers: list[Layer]
    in_channels: int  # c0
    growth_rate: int  # K
    bottleneck: int  # B, 0 without bottleneck
    drop_rate: float  # 0 when dropout is off
    dropout_seeds: Tensor | None  # [L] int64 on the CPU

    @property
    def out_channels(self) -> int:
        return self.in_channels + len(self.layers) * self.growth_rate

    @property
    def stats_size(self) -> int:
        """Channels with statistics: those of X, then the bottleneck's of each layer."""
        return self.out_channels + len(self.layers) * self.bottleneck

    def channels_before(self, index: int) -> int:
        return self.in_channels + index * self.growth_rate

    def bottleneck_slice(self, index: int) -> slice:
        start = self.out_channels + index * self.bottleneck
        return slice(start, start + self.bottleneck)


def nhwc(x: Tensor) -> Tensor:
    """The NHWC view [N, H, W, C] of an NCHW tensor."""
    return x.permute(0, 2, 3, 1)


class BoundNorm:
    """A norm with the statistics it uses in this step, and its scale and shift."""

    def __init__(self, ops: Primitives, norm: Norm, mean: Tensor, var: Tensor) -> None:
        self.ops, self.norm = ops, norm
        self.mean, self.var = norm.running if norm.running is not None else (mean, var)
        self.scale = torch.empty_like(self.mean)
        self.shift = torch.empty_like(self.mean)
        ops.bn_scale_shift(self.mean, self.var, norm.weight, norm.bias, norm.eps, self.scale, self.shift)

    def gradient(self, sums: Tensor, count: int, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias gradient [C] from the channel sums; adds to u and v if the batch was used."""
        grad_weight, grad_bias = torch.empty_like(self.mean), torch.empty_like(self.mean)
        if self.norm.running is not None:
            u = v = None
        self.ops.bn_gradient(
            sums, self.mean, self.var, self.norm.weight, self.norm.eps, count, grad_weight, grad_bias, u, v
        )
        return grad_weight, grad_bias


def pixels(x: Tensor) -> int:
    """M of an NHWC tensor."""
    return x.shape[0] * x.shape[1] * x.shape[2]


def _dropout_mask(block: Block, index: int, like: Tensor) -> Tensor:
    """Layer ``index``'s dropout factors, 0 or 1/(1-p), like ``like``; the same whenever asked for."""
    if block.dropout_seeds is None:
        raise ValueError("dropout needs one seed a layer")
    generator = torch.Generator(device=like.device)
    generator.manual_seed(int(block.dropout_seeds[index]))
    keep = 1.0 - block.drop_rate
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    mask.bernoulli_(keep, generator=generator)
    return mask.div_(keep) if keep > 0 else mask


def _recompute_bottleneck(
    ops: Primitives, block: Block, index: int, x: Tensor, stats: Tensor, z: Tensor
) -> None:
    """Layer ``index``'s z from X again; no statistics, they are known."""
    layer, c = block.layers[index], block.channels_before(index)
    norm1 = BoundNorm(ops, layer.norms[0], stats[0, :c], stats[1, :c])
    ops.bn_relu_conv1x1_forward(x[..., :c], norm1.scale, norm1.shift, layer.convs[0], z, None, None)


def empty_outputs(block: Block, x: Tensor, keep_bottleneck: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of :func:`forward`, unwritten (the statistics zero)."""
    n, _, h, w = x.shape
    out = torch.empty(
        (n, block.out_channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    stats = x.new_zeros(2, block.stats_size, dtype=accumulate_dtype(x.dtype))
    kept = keep_bottleneck and block.bottleneck > 0
    z = x.new_empty((len(block.layers), n, h, w, block.bottleneck) if kept else (0,))
    return out, stats, z


def forward(ops: Primitives, block: Block, x: Tensor, keep_bottleneck: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block.

    Args:
        x: [N, c0, H, W].
        keep_bottleneck: return every layer's z, for a backward that does not recompute it.

    Returns:
        The buffer X as [N, Ct, H, W] in channels_last memory; the batch statistics
        [2, Ct + L*B] (mean and biased variance; unwritten where a norm used running ones);
        and z [L, N, H, W, B], or [0] if not kept.
    """
    out, stats, z_all = empty_outputs(block, x, keep_bottleneck)
    n, _, h, w = x.shape
    if n == 0:
        return out, stats, z_all
    layers, k, kept = block.layers, block.growth_rate, z_all.dim() == 5
    buffer, mean, var = nhwc(out), stats[0], stats[1]
    c0 = block.in_channels
    buffer[..., :c0].copy_(nhwc(x))
    # A channel's statistics are worth taking only if some later norm uses the batch's.
    if any(layer.norms[0].running is None for layer in layers):
        ops.channel_stats(buffer[..., :c0], mean[:c0], var[:c0])
    z = x.new_empty(n, h, w, block.bottleneck) if block.bottleneck and not kept else None

    for i, layer in enumerate(layers):
        c = block.channels_before(i)
        y = buffer[..., c : c + k]
        norm1 = BoundNorm(ops, layer.norms[0], mean[:c], var[:c])
        y_stats: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(later.norms[0].running is None for later in layers[i + 1 :]):
            y_stats = mean[c : c + k], var[c : c + k]
        conv_stats = (None, None) if block.drop_rate else y_stats
        if block.bottleneck:
            z = z_all[i] if kept else z
            assert z is not None
            cols = block.bottleneck_slice(i)
            z_stats = (mean[cols], var[cols]) if layer.norms[1].running is None else (None, None)
            ops.bn_relu_conv1x1_forward(
                buffer[..., :c], norm1.scale, norm1.shift, layer.convs[0], z, *z_stats
            )
            norm2 = BoundNorm(ops, layer.norms[1], mean[cols], var[cols])
            ops.bn_relu_conv3x3_forward(z, norm2.scale, norm2.shift, layer.convs[1], y, *conv_stats)
        else:
            ops.bn_relu_conv3x3_forward(
                buffer[..., :c], norm1.scale, norm1.shift, layer.convs[0], y, *conv_stats
            )
        if block.drop_rate:
            y.mul_(_dropout_mask(block, i, y))
            if y_stats[0] is not None and y_stats[1] is not None:
                ops.channel_stats(y, y_stats[0], y_stats[1])
    return out, stats, z_all


@dataclass
class BlockGradients:
    """Gradients in the order of the block's norms and convolutions; None where not asked for."""

    x: Tensor  # [N, c0, H, W]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    convs: list[Tensor | None]


def backward(
    ops: Primitives,
    block: Block,
    grad: Tensor,
    out: Tensor,
    z_all: Tensor,
    stats: Tensor,
    needs_conv_grad: Sequence[bool],
) -> BlockGradients:
    """Backward of :func:`forward`, one pass a kernel.

    Args:
        grad: [N, Ct, H, W] in channels_last memory, the gradient of ``out``. **Overwritten**: it is G.
        out: X as :func:`forward` returned it.
        z_all: the kept z, or [0]: then each layer's is recomputed.
        stats: as :func:`forward` returned it.
        needs_conv_grad: for each convolution, whether its weight gradient is wanted.
    """
    layers, k = block.layers, block.growth_rate
    x, g = nhwc(out), nhwc(grad)
    m = pixels(x)
    per_layer = 2 if block.bottleneck else 1
    norm_grads: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    conv_grads: list[Tensor | None] = [
        torch.empty_like(weight) if needed else None
        for weight, needed in zip((w for la in layers for w in la.convs), needs_conv_grad, strict=True)
    ]
    mean, var = stats[0], stats[1]
    uv = torch.zeros(2, block.out_channels, dtype=stats.dtype, device=stats.device)
    u, v = uv[0], uv[1]
    kept = z_all.dim() == 5
    n, h, w = x.shape[:3]
    z_scratch = x.new_empty(n, h, w, block.bottleneck) if block.bottleneck and not kept else None
    grad_bn = x.new_empty(n, h, w, block.bottleneck) if block.bottleneck else None

    for i in reversed(range(len(layers))):
        layer, c = layers[i], block.channels_before(i)
        grad_y, y, y_u, y_v = g[..., c : c + k], x[..., c : c + k], u[c : c + k], v[c : c + k]
        if block.drop_rate:
            # Dropout lies between the convolution and X: give the convolution its own gradient.
            masked = torch.empty_like(y)
            ops.affine_gradient(grad_y, y, y_u, y_v, masked)
            grad_y = masked.mul_(_dropout_mask(block, i, masked))
            y_u, y_v = torch.zeros_like(y_u), torch.zeros_like(y_v)
        norm1 = BoundNorm(ops, layer.norms[0], mean[:c], var[:c])
        dw1 = conv_grads[i * per_layer]
        sums1 = stats.new_empty(2, c)
        if block.bottleneck:
            dw2 = conv_grads[i * per_layer + 1]
            z = z_all[i] if kept else z_scratch
            assert z is not None and grad_bn is not None
            if not kept:
                _recompute_bottleneck(ops, block, i, x, stats, z)
            cols = block.bottleneck_slice(i)
            norm2 = BoundNorm(ops, layer.norms[1], mean[cols], var[cols])
            sums2, z_uv = stats.new_empty(2, block.bottleneck), stats.new_zeros(2, block.bottleneck)
            ops.bn_relu_conv3x3_backward(
                grad_y, y, y_u, y_v,
                z, norm2.mean, norm2.scale, norm2.shift, layer.convs[1],
                grad_bn, sums2, dw2,
            )  # fmt: skip
            norm2_grads = norm2.gradient(sums2, m, z_uv[0], z_uv[1])
            ops.bn_relu_conv1x1_backward(
                grad_bn, z, norm2.scale, z_uv[0], z_uv[1],
                x[..., :c], norm1.mean, norm1.scale, norm1.shift, layer.convs[0],
                g[..., :c], sums1, dw1,
            )  # fmt: skip
            norm_grads[i] = [norm1.gradient(sums1, m, u[:c], v[:c]), norm2_grads]
        else:
            grad_in = x.new_empty(n, h, w, c)
            ops.bn_relu_conv3x3_backward(
                grad_y, y, y_u, y_v,
                x[..., :c], norm1.mean, norm1.scale, norm1.shift, layer.convs[0],
                grad_in, sums1, dw1,
            )  # fmt: skip
            ops.scaled_accumulate(grad_in, norm1.scale, g[..., :c])
            norm_grads[i] = [norm1.gradient(sums1, m, u[:c], v[:c])]

    c0 = block.in_channels
    grad_x = torch.empty((n, c0, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    ops.affine_gradient(g[..., :c0], x[..., :c0], u[:c0], v[:c0], nhwc(grad_x))
    flat = [pair for pairs in norm_grads for pair in pairs]
    return BlockGradients(grad_x, [p[0] for p in flat], [p[1] for p in flat], conv_grads)
