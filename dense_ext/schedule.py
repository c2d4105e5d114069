"""The dense block's forward and backward over the primitives, written once for every backend.

A block owns one buffer X [N, H, W, Ct] (NHWC), Ct = c0 + L*K: c0 input channels, then the K new
channels of each of the L layers. Layer l reads the slice ``X[..., :C]``, C = c0 + l*K, and writes
``X[..., C:C+K]``; nothing is ever concatenated. Batch statistics of a channel are taken once, by
the kernel that writes it. In backward, G [N, H, W, Ct] collects the gradient of X; what batch norm
adds to it is kept apart as ``U*X + V`` per channel (see :mod:`dense_ext.batch_norm`).

M is the number of pixels N*H*W, B the bottleneck's channels, z [N, H, W, B] its activations. All of it
holds for volumes, with D before H and 3x3x3 for 3x3.
"""

from __future__ import annotations

import math
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
    def stats_sizes(self) -> list[int]:
        """Channels with statistics: X's (the input's, then each layer's), then each layer's bottleneck."""
        layers = len(self.layers)
        bottlenecks = [self.bottleneck] * layers if self.bottleneck else []
        return [self.in_channels, *[self.growth_rate] * layers, *bottlenecks]


def norm_starts(num_norms: int, out_channels: int, bottleneck: int) -> list[int]:
    """Where each norm's channels begin in a block's statistics, norms in the order of the layers."""
    if not bottleneck:
        return [0] * num_norms
    return [start for i in range(num_norms // 2) for start in (0, out_channels + i * bottleneck)]


def nhwc(x: Tensor) -> Tensor:
    """The NHWC view [N, H, W, C] of an NCHW tensor, NDHWC of NCDHW."""
    return x.permute((0, 2, 3, 4, 1) if x.dim() == 5 else (0, 2, 3, 1))


def channels_last(x: Tensor) -> torch.memory_format:
    """Channels-last memory for images [N, C, H, W] or volumes [N, C, D, H, W]."""
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def empty_like(x: Tensor, channels: int) -> Tensor:
    """An unwritten tensor of x's batch and size with ``channels``, in channels_last memory."""
    size = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=channels_last(x))


@dataclass
class BoundNorm:
    """A norm with the statistics it uses in this step, and its scale and shift."""

    norm: Norm
    mean: Tensor  # [C]
    var: Tensor
    scale: Tensor
    shift: Tensor

    def gradient(
        self, ops: Primitives, sums: Tensor, count: int, u: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias gradient [C] from the channel sums; adds to u and v if the batch was used."""
        grad_weight, grad_bias = torch.empty_like(self.mean), torch.empty_like(self.mean)
        if self.norm.running is not None:
            u = v = None
        ops.bn_gradient(
            sums, self.mean, self.var, self.norm.weight, self.norm.eps, count, grad_weight, grad_bias, u, v
        )
        return grad_weight, grad_bias


def bind(ops: Primitives, norm: Norm, mean: Tensor, var: Tensor) -> BoundNorm:
    """A norm with its scale and shift; ``mean`` and ``var`` [C] are the batch's, for one not frozen."""
    mean, var = norm.running if norm.running is not None else (mean, var)
    bound = BoundNorm(norm, mean, var, torch.empty_like(mean), torch.empty_like(mean))
    ops.bn_scale_shift(mean, var, norm.weight, norm.bias, norm.eps, bound.scale, bound.shift)
    return bound


def bind_together(ops: Primitives, norms: list[Norm], stats: list[tuple[Tensor, Tensor]]) -> list[BoundNorm]:
    """The same for norms whose statistics are all known: packed, they take one call, not one each."""
    if len({norm.eps for norm in norms}) > 1:
        return [bind(ops, norm, *batch) for norm, batch in zip(norms, stats, strict=True)]
    used = [norm.running or batch for norm, batch in zip(norms, stats, strict=True)]
    mean, var = (torch.cat(vectors) for vectors in zip(*used, strict=True))
    weight, bias = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
    affine = torch.empty_like(mean), torch.empty_like(mean)
    ops.bn_scale_shift(mean, var, weight, bias, norms[0].eps, *affine)
    sizes = [len(norm.weight) for norm in norms]
    scales, shifts = (packed.split(sizes) for packed in affine)
    return [
        BoundNorm(norm, *statistics, scale, shift)
        for norm, statistics, scale, shift in zip(norms, used, scales, shifts, strict=True)
    ]


def first_channels(x: Tensor, channels: int) -> Tensor:
    """``x[..., :channels]``, in half the time."""
    return x.as_strided((*x.shape[:-1], channels), x.stride())


def pixels(x: Tensor) -> int:
    """M of an NHWC tensor."""
    return math.prod(x.shape[:-1])


def empty_outputs(block: Block, x: Tensor, keep_bottleneck: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of :func:`forward`, unwritten (the statistics zero)."""
    out = empty_like(x, block.out_channels)
    stats = x.new_zeros(2, sum(block.stats_sizes), dtype=accumulate_dtype(x.dtype))
    kept = keep_bottleneck and block.bottleneck > 0
    z = x.new_empty((len(block.layers), *nhwc(x).shape[:-1], block.bottleneck) if kept else (0,))
    return out, stats, z


# Layers whose norms are bound together: enough to save the calls, few enough for their vectors not to
# matter beside X, however deep the block.
_LAYERS_TOGETHER = 16


class Pass:
    """What forward and backward share: a block's tensors, and each layer's part of them."""

    def __init__(self, ops: Primitives, block: Block, out: Tensor, stats: Tensor, z_all: Tensor) -> None:
        self.ops, self.block = ops, block
        self.x = nhwc(out)
        self.mean, self.var = stats.unbind()
        # The views of all layers from one call each: a view on its own takes longer than many launches.
        sizes, parts = block.stats_sizes, len(block.layers) + 1
        self.x_parts = self.x.split(sizes[:parts], -1)
        each = list(zip(self.mean.split(sizes), self.var.split(sizes), strict=True))
        self.x_stats, self.z_stats = each[:parts], each[parts:]
        self.keeps_bottleneck = z_all.dim() > 1
        self.z_all = z_all
        if block.bottleneck and not self.keeps_bottleneck:
            self.z_scratch = self.new_bottleneck()
        self.bound: dict[int, list[BoundNorm]] = {}

    def new_bottleneck(self) -> Tensor:
        """An unwritten [N, H, W, B]."""
        return self.x.new_empty(*self.x.shape[:-1], self.block.bottleneck)

    def in_channels(self, index: int) -> int:
        """How many of X's first channels layer ``index`` reads."""
        return self.block.in_channels + index * self.block.growth_rate

    def source(self, index: int) -> Tensor:
        """The part of X that layer ``index`` reads."""
        return first_channels(self.x, self.in_channels(index))

    def z(self, index: int) -> Tensor:
        """Layer ``index``'s bottleneck: its own memory if kept, else what all layers share."""
        return self.z_all[index] if self.keeps_bottleneck else self.z_scratch

    def batch_stats(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of what each of layer ``index``'s norms reads."""
        c = self.in_channels(index)
        first = first_channels(self.mean, c), first_channels(self.var, c)
        return [first, self.z_stats[index]] if self.block.bottleneck else [first]

    def norms(self, index: int) -> list[BoundNorm]:
        """Layer ``index``'s norms, once the statistics of its whole group of layers are known."""
        if index not in self.bound:
            start = index - index % _LAYERS_TOGETHER
            layers = self.block.layers[start : start + _LAYERS_TOGETHER]
            group = range(start, start + len(layers))
            norms = [norm for layer in layers for norm in layer.norms]
            bound = bind_together(self.ops, norms, [stats for i in group for stats in self.batch_stats(i)])
            each = len(layers[0].norms)
            self.bound = {i: bound[j * each : (j + 1) * each] for j, i in enumerate(group)}
        return self.bound[index]

    def run_bottleneck(
        self, index: int, norm1: BoundNorm, mean: Tensor | None = None, var: Tensor | None = None
    ) -> None:
        """Write layer ``index``'s z, and its statistics where they are wanted."""
        self.ops.bn_relu_conv1x1_forward(
            self.source(index),
            norm1.scale,
            norm1.shift,
            self.block.layers[index].convs[0],
            self.z(index),
            mean,
            var,
        )

    def dropout_mask(self, index: int, y: Tensor) -> Tensor:
        """Layer ``index``'s dropout factors, like y [N, H, W, K]."""
        return dropout_mask(self.block.dropout_seeds, index, self.block.drop_rate, y)


def dropout_mask(seeds: Tensor | None, index: int, drop_rate: float, y: Tensor) -> Tensor:
    """Layer ``index``'s dropout factors, 0 or 1/(1-p), like y [N, H, W, K]; the same whenever asked for."""
    if seeds is None:
        raise ValueError("dropout needs one seed a layer")
    keep = 1.0 - drop_rate
    generator = torch.Generator(device=y.device)
    generator.manual_seed(int(seeds[index]))
    mask = torch.empty(y.shape, dtype=y.dtype, device=y.device)
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
    norms = [norm for layer in block.layers for norm in layer.norms]
    frozen = all(norm.running is not None for norm in norms)
    # The layers' statistics, and those of the last one's channels for the transition that follows.
    wants_stats = any(layer.norms[0].running is None for layer in block.layers)
    run.x_parts[0].copy_(nhwc(x))
    if wants_stats:
        ops.channel_stats(run.x_parts[0], *run.x_stats[0])
    for i in range(len(block.layers)):
        _layer_forward(run, i, wants_stats, frozen)
    return out, stats, z_all


def _layer_forward(run: Pass, index: int, wants_stats: bool, frozen: bool) -> None:
    """Write layer ``index``'s K channels of X, and their statistics if wanted.

    Unless all norms are ``frozen``, each is bound when the statistics it takes have been written.
    """
    ops, layer = run.ops, run.block.layers[index]
    batch = run.batch_stats(index)

    def norm(which: int) -> BoundNorm:
        return run.norms(index)[which] if frozen else bind(ops, layer.norms[which], *batch[which])

    last, source = norm(0), run.source(index)
    if run.block.bottleneck:
        run.run_bottleneck(index, last, *(batch[1] if layer.norms[1].running is None else ()))
        last, source = norm(1), run.z(index)
    y, y_stats, dropout = run.x_parts[index + 1], run.x_stats[index + 1], run.block.drop_rate > 0
    written = y_stats if wants_stats and not dropout else (None, None)
    ops.bn_relu_conv3x3_forward(source, last.scale, last.shift, layer.convs[-1], y, *written)
    if dropout:
        y.mul_(run.dropout_mask(index, y))
        if wants_stats:
            ops.channel_stats(y, *y_stats)


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
        self.u, self.v = stats.new_zeros(2, block.out_channels).unbind()
        sizes = block.stats_sizes[: len(self.x_parts)]
        self.g_parts = self.g.split(sizes, -1)
        self.u_parts, self.v_parts = self.u.split(sizes), self.v.split(sizes)
        # What each layer's second norm adds to the gradient of z; one launch for all.
        z_uv = stats.new_zeros(2, len(block.layers), block.bottleneck)
        self.z_u, self.z_v = (vectors.unbind() for vectors in z_uv.unbind())
        if block.bottleneck:
            self.grad_bn = self.new_bottleneck()

    def conv3x3_backward(
        self, index: int, z: Tensor, norm: BoundNorm, grad_bn: Tensor, grad_weight: Tensor | None
    ) -> Tensor:
        """Layer ``index``'s 3x3 convolution: writes grad_bn, returns its sums."""
        k = index + 1
        grad, y, u, v = self.g_parts[k], self.x_parts[k], self.u_parts[k], self.v_parts[k]
        if self.block.drop_rate > 0:
            # Dropout lies between the convolution and X: give the convolution its own gradient.
            grad = self.x.new_empty(y.shape)
            self.ops.affine_gradient(self.g_parts[k], y, u, v, grad)
            grad.mul_(self.dropout_mask(index, y))
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

    grad_x = empty_like(out, block.in_channels)
    ops.affine_gradient(run.g_parts[0], run.x_parts[0], run.u_parts[0], run.v_parts[0], nhwc(grad_x))
    return BlockGradients(grad_x, [weight for weight, _ in norms], [bias for _, bias in norms], convs)


def _bottleneck_layer_backward(
    run: BackwardPass, index: int, grad_weights: list[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """Add layer ``index``'s part to G, U and V; the gradients of its two norms."""
    ops, m, c = run.ops, pixels(run.x), run.in_channels(index)
    norm1, norm2 = run.norms(index)
    z, z_u, z_v = run.z(index), run.z_u[index], run.z_v[index]
    if not run.keeps_bottleneck:
        run.run_bottleneck(index, norm1)
    sums2 = run.conv3x3_backward(index, z, norm2, run.grad_bn, grad_weights[1])
    norm2_grads = norm2.gradient(ops, sums2, m, z_u, z_v)
    sums1 = run.mean.new_empty(2, c)
    ops.bn_relu_conv1x1_backward(
        run.grad_bn, z, norm2.scale, z_u, z_v,
        run.source(index), norm1.mean, norm1.scale, norm1.shift, run.block.layers[index].convs[0],
        first_channels(run.g, c), sums1, grad_weights[0],
    )  # fmt: skip
    return [norm1.gradient(ops, sums1, m, first_channels(run.u, c), first_channels(run.v, c)), norm2_grads]


def _plain_layer_backward(
    run: BackwardPass, index: int, grad_weights: list[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """The same for a layer without bottleneck: its 3x3 convolution reads X."""
    c, (norm,) = run.in_channels(index), run.norms(index)
    source, g = run.source(index), first_channels(run.g, c)
    grad_bn = run.x.new_empty(source.shape)
    sums = run.conv3x3_backward(index, source, norm, grad_bn, grad_weights[0])
    run.ops.scaled_accumulate(grad_bn, norm.scale, g)
    return [norm.gradient(run.ops, sums, pixels(run.x), first_channels(run.u, c), first_channels(run.v, c))]
