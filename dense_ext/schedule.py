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


class Pass:
    """What forward and backward share: a block's tensors, and each layer's part of them."""

    def __init__(self, ops: Primitives, block: Block, out: Tensor, stats: Tensor, z_all: Tensor) -> None:
        self.ops, self.block = ops, block
        self.x = nhwc(out)
        self.mean, self.var = stats[0], stats[1]
        self.keeps_bottleneck = z_all.dim() == 5
        self.z_all = z_all
        if block.bottleneck and not self.keeps_bottleneck:
            self.z_scratch = self.new_bottleneck()

    def new_bottleneck(self) -> Tensor:
        """An unwritten [N, H, W, B]."""
        return self.x.new_empty(*self.x.shape[:3], self.block.bottleneck)

    def inputs(self, index: int) -> slice:
        """The channels of X that layer ``index`` reads."""
        return slice(0, self.block.in_channels + index * self.block.growth_rate)

    def outputs(self, index: int) -> slice:
        """The channels of X that layer ``index`` writes."""
        start = self.inputs(index).stop
        return slice(start, start + self.block.growth_rate)

    def bottleneck(self, index: int) -> slice:
        """Where layer ``index``'s z has its statistics."""
        start = self.block.out_channels + index * self.block.bottleneck
        return slice(start, start + self.block.bottleneck)

    def z(self, index: int) -> Tensor:
        """Layer ``index``'s bottleneck: its own memory if kept, else what all layers share."""
        return self.z_all[index] if self.keeps_bottleneck else self.z_scratch

    def norm1(self, index: int) -> BoundNorm:
        c = self.inputs(index)
        return BoundNorm(self.ops, self.block.layers[index].norms[0], self.mean[c], self.var[c])

    def norm2(self, index: int) -> BoundNorm:
        b = self.bottleneck(index)
        return BoundNorm(self.ops, self.block.layers[index].norms[1], self.mean[b], self.var[b])

    def stats_of(self, channels: slice, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """Where a primitive writes the statistics of ``channels``, if anyone wants them."""
        return (self.mean[channels], self.var[channels]) if wanted else (None, None)

    def run_bottleneck(self, index: int, norm1: BoundNorm, wants_stats: bool) -> None:
        """Write layer ``index``'s z; recomputing it, its statistics are known."""
        self.ops.bn_relu_conv1x1_forward(
            self.x[..., self.inputs(index)],
            norm1.scale,
            norm1.shift,
            self.block.layers[index].convs[0],
            self.z(index),
            *self.stats_of(self.bottleneck(index), wants_stats),
        )

    def dropout_mask(self, index: int) -> Tensor:
        """Layer ``index``'s dropout factors [N, H, W, K], 0 or 1/(1-p); the same whenever asked for."""
        seeds, keep = self.block.dropout_seeds, 1.0 - self.block.drop_rate
        if seeds is None:
            raise ValueError("dropout needs one seed a layer")
        generator = torch.Generator(device=self.x.device)
        generator.manual_seed(int(seeds[index]))
        mask = self.x.new_empty(*self.x.shape[:3], self.block.growth_rate)
        mask.bernoulli_(keep, generator=generator)
        return mask.div_(keep) if keep > 0 else mask


def forward(ops: Primitives, block: Block, x: Tensor, keep_bottleneck: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block.

    Args:
        x: [N, c0, H, W].
        keep_bottleneck: return every layer's z, for a backward that does not recompute it.

    Returns:
        The buffer X as [N, Ct, H, W] in channels_last memory; the batch statistics
        [2, Ct + L*B] (mean and biased variance; zero where nothing used them); and
        z [L, N, H, W, B], or [0] if not kept.
    """
    out, stats, z_all = empty_outputs(block, x, keep_bottleneck)
    if x.shape[0] == 0:
        return out, stats, z_all
    run = Pass(ops, block, out, stats, z_all)
    # The layers' statistics, and those of the last one's channels for the transition that follows.
    wants_stats = any(layer.norms[0].running is None for layer in block.layers)
    first = run.inputs(0)
    run.x[..., first].copy_(nhwc(x))
    if wants_stats:
        ops.channel_stats(run.x[..., first], run.mean[first], run.var[first])
    for i in range(len(block.layers)):
        _layer_forward(run, i, wants_stats)
    return out, stats, z_all


def _layer_forward(run: Pass, index: int, wants_stats: bool) -> None:
    """Write layer ``index``'s K channels of X, and their statistics if wanted."""
    ops, layer = run.ops, run.block.layers[index]
    norm, source = run.norm1(index), run.x[..., run.inputs(index)]
    if run.block.bottleneck:
        run.run_bottleneck(index, norm, layer.norms[1].running is None)
        norm, source = run.norm2(index), run.z(index)
    y, dropout = run.x[..., run.outputs(index)], run.block.drop_rate > 0
    y_stats = run.stats_of(run.outputs(index), wants_stats and not dropout)
    ops.bn_relu_conv3x3_forward(source, norm.scale, norm.shift, layer.convs[-1], y, *y_stats)
    if dropout:
        y.mul_(run.dropout_mask(index))
        if wants_stats:
            ops.channel_stats(y, run.mean[run.outputs(index)], run.var[run.outputs(index)])


@dataclass
class BlockGradients:
    """Gradients in the order of the block's norms and convolutions; None where not asked for."""

    x: Tensor  # [N, c0, H, W]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    convs: list[Tensor | None]


class BackwardPass(Pass):
    """A pass with the gradient buffer G, and U and V, what batch norm adds to it."""

    def __init__(
        self, ops: Primitives, block: Block, grad: Tensor, out: Tensor, stats: Tensor, z_all: Tensor
    ) -> None:
        super().__init__(ops, block, out, stats, z_all)
        self.g = nhwc(grad)
        self.u, self.v = stats.new_zeros(2, block.out_channels)
        # What each layer's second norm adds to the gradient of z; one launch for all.
        self.z_uv = stats.new_zeros(len(block.layers), 2, block.bottleneck)
        if block.bottleneck:
            self.grad_bn = self.new_bottleneck()

    def conv3x3_backward(
        self, index: int, z: Tensor, norm: BoundNorm, grad_bn: Tensor, grad_weight: Tensor | None
    ) -> Tensor:
        """Layer ``index``'s 3x3 convolution: writes grad_bn, returns its sums."""
        k = self.outputs(index)
        grad, y, u, v = self.g[..., k], self.x[..., k], self.u[k], self.v[k]
        if self.block.drop_rate > 0:
            # Dropout lies between the convolution and X: give the convolution its own gradient.
            grad = self.x.new_empty(y.shape)
            self.ops.affine_gradient(self.g[..., k], y, u, v, grad)
            grad.mul_(self.dropout_mask(index))
            u, v = torch.zeros_like(u), torch.zeros_like(v)
        sums = self.mean.new_empty(2, z.shape[-1])
        weight = self.block.layers[index].convs[-1]
        self.ops.bn_relu_conv3x3_backward(
            grad, y, u, v, z, norm.mean, norm.scale, norm.shift, weight, grad_bn, sums, grad_weight
        )
        return sums


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
    run = BackwardPass(ops, block, grad, out, stats, z_all)
    weights = [weight for layer in block.layers for weight in layer.convs]
    convs = [
        torch.empty_like(weight) if needed else None
        for weight, needed in zip(weights, needs_conv_grad, strict=True)
    ]
    layer_backward = _bottleneck_layer_backward if block.bottleneck else _plain_layer_backward
    per_layer = len(convs) // len(block.layers)
    norms: list[tuple[Tensor, Tensor]] = []
    for i in reversed(range(len(block.layers))):
        norms = layer_backward(run, i, convs[i * per_layer : (i + 1) * per_layer]) + norms

    c = run.inputs(0)
    n, _, h, w = out.shape
    grad_x = torch.empty(
        (n, block.in_channels, h, w), dtype=out.dtype, device=out.device, memory_format=torch.channels_last
    )
    ops.affine_gradient(run.g[..., c], run.x[..., c], run.u[c], run.v[c], nhwc(grad_x))
    return BlockGradients(grad_x, [weight for weight, _ in norms], [bias for _, bias in norms], convs)


def _bottleneck_layer_backward(
    run: BackwardPass, index: int, grad_weights: list[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """Add layer ``index``'s part to G, U and V; the gradients of its two norms."""
    ops, m, c = run.ops, pixels(run.x), run.inputs(index)
    norm1, norm2, z = run.norm1(index), run.norm2(index), run.z(index)
    if not run.keeps_bottleneck:
        run.run_bottleneck(index, norm1, wants_stats=False)
    sums2 = run.conv3x3_backward(index, z, norm2, run.grad_bn, grad_weights[1])
    z_u, z_v = run.z_uv[index]
    norm2_grads = norm2.gradient(sums2, m, z_u, z_v)
    sums1 = run.mean.new_empty(2, c.stop)
    ops.bn_relu_conv1x1_backward(
        run.grad_bn, z, norm2.scale, z_u, z_v,
        run.x[..., c], norm1.mean, norm1.scale, norm1.shift, run.block.layers[index].convs[0],
        run.g[..., c], sums1, grad_weights[0],
    )  # fmt: skip
    return [norm1.gradient(sums1, m, run.u[c], run.v[c]), norm2_grads]


def _plain_layer_backward(
    run: BackwardPass, index: int, grad_weights: list[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """The same for a layer without bottleneck: its 3x3 convolution reads X."""
    c, norm = run.inputs(index), run.norm1(index)
    source = run.x[..., c]
    grad_bn = run.x.new_empty(source.shape)
    sums = run.conv3x3_backward(index, source, norm, grad_bn, grad_weights[0])
    run.ops.scaled_accumulate(grad_bn, norm.scale, run.g[..., c])
    return [norm.gradient(sums, pixels(run.x), run.u[c], run.v[c])]
