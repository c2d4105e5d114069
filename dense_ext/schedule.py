"""The dense block's forward and backward over the primitives, written once for every backend.

A block owns one buffer X [N, H, W, Ct] (NHWC) with Ct = c0 + L*K channels. c0 of them come from the input,
and K from each of the L layers; K may differ from layer to layer. Layer l reads the slice ``X[..., :C]``,
C = c0 + l*K, and writes ``X[..., C:C+K]``, so nothing is ever concatenated. A channel's batch statistics are
computed once, by the kernel that writes the channel. In backward, G [N, H, W, Ct] accumulates the gradient of
X. Batch norm's contribution to it is kept separately, as ``U*X + V`` per channel (see
:mod:`dense_ext.batch_norm`).

M is the number of pixels N*H*W, B the number of channels of a layer's bottleneck, and z [N, H, W, B] the
bottleneck's activations. All this also holds for volumes, with D before H and 3x3x3 instead of 3x3.

A convolution may be followed by a bias and dropout, which are applied to its result in place. Then the
statistics are computed in a pass of their own, and backward forms the convolution's gradient in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Primitives
from .backends.base import PlainBlocks, accumulate_dtype
from .batch_norm import values_per_channel
from .synchronised import Sync

RECOMPUTE = ("none", "bottleneck", "block")


@dataclass
class Norm:
    """One batch norm's constants. A *frozen* norm uses running statistics; others have ``running`` None."""

    weight: Tensor  # [C], accumulation dtype
    bias: Tensor  # [C]
    eps: float
    running: tuple[Tensor, Tensor] | None  # mean, var [C]


@dataclass
class Layer:
    """One dense layer: norm1, conv1 (1x1), norm2, conv2 (3x3); or norm1, conv1 (3x3) without a bottleneck."""

    norms: list[Norm]
    convs: list[Tensor]
    biases: list[Tensor]  # of the convolutions, in the accumulation dtype; empty if they have none
    dropouts: list[Dropout]  # one after each convolution


@dataclass
class Dropout:
    """Dropout whose mask follows from a seed, so that backward gets the same mask as forward."""

    rate: float  # 0 if dropout is off
    channels: bool = False  # whether it drops whole channels of an image
    seed: int | None = None

    def mask(self, y: Tensor) -> Tensor:
        """The factors of y [N, H, W, K], 0 or 1/(1-p): of y's shape, or [N, 1, 1, K].

        Raises:
            ValueError: there is no seed.
        """
        if self.seed is None:
            raise ValueError("dropout needs one seed per convolution")
        keep = 1.0 - self.rate
        generator = torch.Generator(device=y.device)
        generator.manual_seed(self.seed)
        shape = (len(y), *[1] * (y.dim() - 2), y.shape[-1]) if self.channels else y.shape
        mask = torch.empty(shape, dtype=y.dtype, device=y.device)
        mask.bernoulli_(keep, generator=generator)
        return mask.div_(keep) if keep > 0 else mask


@dataclass
class Block:
    """A dense block's constants, in the order of its layers."""

    layers: list[Layer]
    in_channels: int  # c0
    sync: Sync | None = None  # the processes that share batch statistics

    @property
    def growth(self) -> list[int]:
        """K of each layer."""
        return [layer.convs[-1].shape[0] for layer in self.layers]

    @property
    def bottlenecks(self) -> list[int]:
        """B of each layer; empty if the layers have no bottleneck."""
        return [layer.convs[0].shape[0] for layer in self.layers if len(layer.convs) == 2]

    @property
    def out_channels(self) -> int:
        return self.in_channels + sum(self.growth)

    def is_plain(self) -> bool:
        """Whether it is a :class:`PlainBlock`."""
        return self.sync is None and all(
            len(layer.convs) == 2 and not layer.biases and not any(dropout.rate for dropout in layer.dropouts)
            for layer in self.layers
        )

    @property
    def stats_sizes(self) -> list[int]:
        """The channels of each part of the statistics: the input, each layer's output, each bottleneck."""
        return [self.in_channels, *self.growth, *self.bottlenecks]


class PlainBlock(NamedTuple):
    """The parameters of a block that one call can run, for each norm or convolution in the order they run.

    Each layer is a bottleneck of norms and convolutions, without biases or dropout, and the batch statistics
    are those of this process alone. The parameters are those of :class:`PlainBlocks`.
    """

    in_channels: int  # c0
    weights: list[Tensor]  # of the norms [C], accumulation dtype
    biases: list[Tensor]
    eps: list[float]
    frozen: list[bool]
    running_means: list[Tensor]  # of the frozen norms
    running_vars: list[Tensor]
    convs: list[Tensor]

    @property
    def of_frozen(self) -> tuple[list[Any], ...]:
        """The parameters of :class:`FrozenBlocks`; all norms must be frozen."""
        return self.running_means, self.running_vars, self.weights, self.biases, self.eps, self.convs


def norm_starts(out_channels: int, bottlenecks: Sequence[int], layers: int) -> list[int]:
    """The index of each norm's first channel in a block's statistics, for norms in the layers' order."""
    if not bottlenecks:
        return [0] * layers
    starts = itertools.accumulate(bottlenecks[:-1], initial=out_channels)
    return [start for of_z in starts for start in (0, of_z)]


def nhwc(x: Tensor) -> Tensor:
    """The view [N, H, W, C] of a tensor [N, C, H, W], or [N, D, H, W, C] of [N, C, D, H, W]."""
    return x.permute((0, 2, 3, 4, 1) if x.dim() == 5 else (0, 2, 3, 1))


def channels_last(x: Tensor) -> torch.memory_format:
    """The channels-last memory format for images [N, C, H, W] or volumes [N, C, D, H, W]."""
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def empty_like(x: Tensor, channels: int) -> Tensor:
    """An uninitialised tensor in channels_last memory, of x's shape except that it has ``channels``."""
    size = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=channels_last(x))


@dataclass
class BoundNorm:
    """A norm, the statistics that it uses in this step, and the scale and shift that follow from them."""

    norm: Norm
    mean: Tensor  # [C]
    var: Tensor
    scale: Tensor
    shift: Tensor

    def gradient(
        self, ops: Primitives, sums: Tensor, count: int, u: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias [C] from the channel sums; adds to u and v unless frozen."""
        grad_weight, grad_bias = torch.empty_like(self.mean), torch.empty_like(self.mean)
        if self.norm.running is not None:
            u = v = None
        ops.bn_gradient(
            sums, self.mean, self.var, self.norm.weight, self.norm.eps, count, grad_weight, grad_bias, u, v
        )
        return grad_weight, grad_bias


def bind(ops: Primitives, norm: Norm, mean: Tensor, var: Tensor) -> BoundNorm:
    """Compute a norm's scale and shift. A frozen norm ignores ``mean`` and ``var`` [C], the batch's."""
    mean, var = norm.running if norm.running is not None else (mean, var)
    bound = BoundNorm(norm, mean, var, torch.empty_like(mean), torch.empty_like(mean))
    ops.bn_scale_shift(mean, var, norm.weight, norm.bias, norm.eps, bound.scale, bound.shift)
    return bound


def bind_together(ops: Primitives, norms: list[Norm], stats: list[tuple[Tensor, Tensor]]) -> list[BoundNorm]:
    """:func:`bind` for several norms, with one call for all if their ``eps`` is the same."""
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
    """``x[..., :channels]``; as_strided takes half the time of slicing."""
    return x.as_strided((*x.shape[:-1], channels), x.stride())


def pixels(x: Tensor) -> int:
    """M of an NHWC tensor."""
    return math.prod(x.shape[:-1])


def empty_outputs(
    x: Tensor, growth: int, bottlenecks: int, keep_bottleneck: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the outputs of :func:`forward`: X and z uninitialised, the statistics zero.

    ``growth`` and ``bottlenecks`` are the channels that all layers add, and those of all bottlenecks.
    """
    channels = x.shape[1] + growth
    out = empty_like(x, channels)
    stats = x.new_zeros(2, channels + bottlenecks, dtype=accumulate_dtype(x.dtype))
    # Sizes are tuples for MONAI's MetaTensor, which takes no other.
    z = x.new_empty((values_per_channel(x) * bottlenecks if keep_bottleneck else 0,))
    return out, stats, z


# The number of layers whose norms are bound together: enough to save most calls, few enough that their
# vectors are negligible beside X.
_LAYERS_TOGETHER = 16


class Pass:
    """A block's tensors and each layer's part of them, for one forward or backward."""

    def __init__(self, ops: Primitives, block: Block, out: Tensor, stats: Tensor, z_all: Tensor) -> None:
        self.ops, self.block = ops, block
        self.x = nhwc(out)
        self.mean, self.var = stats.unbind()
        # One call makes the views for all layers: making them one by one takes longer than many launches.
        sizes, parts = block.stats_sizes, len(block.layers) + 1
        self.x_parts = self.x.split(sizes[:parts], -1)
        self.reads = list(itertools.accumulate(sizes[: parts - 1]))  # C of each layer
        each = list(zip(self.mean.split(sizes), self.var.split(sizes), strict=True))
        self.x_stats, self.z_stats = each[:parts], each[parts:]
        self.widths = block.bottlenecks
        self.keeps_bottleneck = len(z_all) > 0
        # Each layer's z has its own memory if every z is kept.
        if self.keeps_bottleneck:
            each_z = z_all.split([pixels(self.x) * width for width in self.widths])
            self.z = [part.view(*self.x.shape[:-1], -1) for part in each_z]
        elif self.widths:
            self.z = self.new_bottleneck()
        # The part of X that each layer reads.
        self.sources = [first_channels(self.x, channels) for channels in self.reads]
        self.bound: dict[int, list[BoundNorm]] = {}

    def new_bottleneck(self) -> list[Tensor]:
        """Uninitialised memory that all layers share, as each layer's [N, H, W, B]."""
        *sizes, _ = self.x.shape
        count = pixels(self.x)
        memory = self.x.new_empty((count * max(self.widths),))
        of_width = {width: memory[: count * width].view(*sizes, width) for width in set(self.widths)}
        return [of_width[width] for width in self.widths]

    def batch_stats(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """The batch's mean and variance for each of layer ``index``'s norms."""
        c = self.reads[index]
        first = first_channels(self.mean, c), first_channels(self.var, c)
        return [first, self.z_stats[index]] if self.widths else [first]

    def norms(self, index: int) -> list[BoundNorm]:
        """Layer ``index``'s bound norms; the statistics of its whole group of layers must be known."""
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
        """Write layer ``index``'s z, and z's statistics unless ``mean`` is None."""
        layer, z = self.block.layers[index], self.z[index]
        written = (None, None) if self.finishes(layer, 0) else (mean, var)
        self.ops.bn_relu_conv1x1_forward(
            self.sources[index], norm1.scale, norm1.shift, layer.convs[0], z, *written
        )
        self.finish(layer, 0, z, mean, var)

    @staticmethod
    def finishes(layer: Layer, which: int) -> bool:
        """Whether a bias or dropout follows convolution ``which`` of a layer."""
        return bool(layer.biases) or layer.dropouts[which].rate > 0

    def finish(self, layer: Layer, which: int, y: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
        """Apply what follows convolution ``which`` to its result y, and complete y's statistics."""
        if layer.biases:
            y.add_(layer.biases[which])
        if layer.dropouts[which].rate > 0:
            y.mul_(layer.dropouts[which].mask(y))
        if mean is None or var is None:
            return
        if self.finishes(layer, which):
            self.ops.channel_stats(y, mean, var)
        if self.block.sync is not None:
            self.block.sync.combine(mean, var)


def forward(ops: Primitives, block: Block, x: Tensor, keep_bottleneck: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block.

    Args:
        x: [N, c0, H, W].
        keep_bottleneck: whether to return every layer's z, so that backward need not recompute it.

    Returns:
        The buffer X as [N, Ct, H, W] in channels_last memory, the batch statistics [2, Ct + L*B], and z: the
        memory of every layer's [N, H, W, B] one after another, or an empty tensor if z is not kept. The
        statistics are mean and biased variance, and zero where no norm uses them.
    """
    found = plain_forward(ops, plain_block(block), x, keep_bottleneck) if block.is_plain() else None
    if found is not None:
        return found
    out, stats, z_all = empty_outputs(x, sum(block.growth), sum(block.bottlenecks), keep_bottleneck)
    if x.shape[0] == 0 and block.sync is None:
        return out, stats, z_all
    norms = [norm for layer in block.layers for norm in layer.norms]
    frozen = all(norm.running is not None for norm in norms)
    start_buffer(out, x)
    run = Pass(ops, block, out, stats, z_all)
    # If any layer needs X's statistics, compute all of them: the next transition uses the last layer's too.
    wants_stats = any(layer.norms[0].running is None for layer in block.layers)
    if wants_stats:
        ops.channel_stats(run.x_parts[0], *run.x_stats[0])
        if block.sync is not None:
            block.sync.combine(*run.x_stats[0])
    for i in range(len(block.layers)):
        _layer_forward(run, i, wants_stats, frozen)
    return out, stats, z_all


def start_buffer(out: Tensor, x: Tensor) -> None:
    """Copy the block's input to the first channels of X."""
    first_channels(nhwc(out), x.shape[1]).copy_(nhwc(x))


def _plain_run(
    ops: Primitives, block: PlainBlock, x: Tensor, keep_bottleneck: bool
) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """The call that writes X, z and the statistics [2, S], if there is one."""
    frozen, plain = ops.frozen_blocks, ops.plain_blocks
    if frozen is not None and x.dim() == 4 and not keep_bottleneck and all(block.frozen):
        return lambda out, z, stats: frozen.forward(out, block.in_channels, *block.of_frozen)
    if plain is not None:
        return lambda out, z, stats: plain.forward(out, z, stats, *block)
    return None


def plain_forward(
    ops: Primitives, block: PlainBlock, x: Tensor, keep_bottleneck: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`forward` in one call; None if no backend has one."""
    run = _plain_run(ops, block, x, keep_bottleneck)
    if run is None:
        return None
    growth, bottlenecks = (sum([conv.shape[0] for conv in block.convs[i::2]]) for i in (1, 0))
    out, stats, z_all = empty_outputs(x, growth, bottlenecks, keep_bottleneck)
    if x.shape[0] > 0:
        start_buffer(out, x)
        run(nhwc(out), z_all, stats)
    return out, stats, z_all


def plain_backward(
    run: PlainBlocks,
    block: PlainBlock,
    grad: Tensor,
    out: Tensor,
    z_all: Tensor,
    stats: Tensor,
    needs_conv_grad: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """:func:`backward` in one call.

    Returns:
        The gradient of the block's input, those of the norms' weights, of their biases and of the
        convolutions.
    """
    grad_x = empty_like(out, block.in_channels)
    found = iter(
        run.backward(nhwc(grad), nhwc(out), z_all, stats, nhwc(grad_x), list(needs_conv_grad), *block)
    )
    weights, biases = (list(itertools.islice(found, len(needs_conv_grad))) for _ in range(2))
    return grad_x, weights, biases, [next(found) if needed else None for needed in needs_conv_grad]


def plain_block(block: Block) -> PlainBlock:
    """The parameters of a block for which :meth:`Block.is_plain` is true."""
    norms = [norm for layer in block.layers for norm in layer.norms]
    running = [norm.running for norm in norms if norm.running is not None]
    means, variances = map(list, zip(*running, strict=True)) if running else ([], [])
    return PlainBlock(
        block.in_channels,
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        [norm.eps for norm in norms],
        [norm.running is not None for norm in norms],
        means,
        variances,
        [conv for layer in block.layers for conv in layer.convs],
    )


def _layer_forward(run: Pass, index: int, wants_stats: bool, frozen: bool) -> None:
    """Write layer ``index``'s K channels of X, and their statistics if ``wants_stats``.

    Unless all norms are ``frozen``, each norm is bound only after its statistics have been written.
    """
    ops, layer = run.ops, run.block.layers[index]
    batch = run.batch_stats(index)

    def norm(which: int) -> BoundNorm:
        return run.norms(index)[which] if frozen else bind(ops, layer.norms[which], *batch[which])

    last, source = norm(0), run.sources[index]
    if run.widths:
        run.run_bottleneck(index, last, *(batch[1] if layer.norms[1].running is None else ()))
        last, source = norm(1), run.z[index]
    y = run.x_parts[index + 1]
    stats = run.x_stats[index + 1] if wants_stats else (None, None)
    written = (None, None) if run.finishes(layer, -1) else stats
    ops.bn_relu_conv3x3_forward(source, last.scale, last.shift, layer.convs[-1], y, *written)
    run.finish(layer, -1, y, *stats)


@dataclass
class LayerGradients:
    """The gradients of a layer's norms and convolutions, in their order."""

    norms: list[tuple[Tensor, Tensor]]  # of weight and bias [C]
    convs: list[Tensor | None]  # None where not needed
    conv_biases: list[Tensor]  # empty if the convolutions have no bias


class BackwardPass(Pass):
    """A pass with the gradient buffer G, and with U and V, by which batch norm adds ``U*X + V`` to it."""

    def __init__(
        self, ops: Primitives, block: Block, grad: Tensor, out: Tensor, stats: Tensor, z_all: Tensor
    ) -> None:
        super().__init__(ops, block, out, stats, z_all)
        self.g = nhwc(grad)
        # Several processes divide U and V by the M of all of them once their shares have been added up.
        self.count = 1 if block.sync is not None else pixels(self.x)
        self.u, self.v = stats.new_zeros(2, block.out_channels).unbind()
        sizes = block.stats_sizes[: len(self.x_parts)]
        self.g_parts = self.g.split(sizes, -1)
        self.u_parts, self.v_parts = self.u.split(sizes), self.v.split(sizes)
        # The u and v of each layer's second norm; allocated together, they take one launch to zero.
        z_u, z_v = stats.new_zeros(2, sum(self.widths)).unbind()
        self.z_u, self.z_v = z_u.split(self.widths), z_v.split(self.widths)
        if self.widths:
            self.grad_bn = self.new_bottleneck()

    def complete(self, u: Tensor, v: Tensor) -> None:
        """Complete ``u`` and ``v`` [C], to which every reader of their channels has added its share."""
        if self.block.sync is not None:
            self.block.sync.average(u, v)

    def conv3x3_backward(
        self, index: int, z: Tensor, norm: BoundNorm, grad_bn: Tensor, grads: LayerGradients
    ) -> Tensor:
        """Backward of layer ``index``'s 3x3 convolution: writes grad_bn, returns its channel sums [2, C]."""
        k, layer = index + 1, self.block.layers[index]
        grad, y, u, v = self.g_parts[k], self.x_parts[k], self.u_parts[k], self.v_parts[k]
        self.complete(u, v)
        if self.finishes(layer, -1):
            # A bias or dropout lies between the convolution and X, so its gradient needs its own memory.
            grad = self.x.new_empty(y.shape)
            self.ops.affine_gradient(self.g_parts[k], y, u, v, grad)
            self.unfinish(layer, -1, grad, grads)
            u, v = torch.zeros_like(u), torch.zeros_like(v)
        sums = self.mean.new_empty(2, z.shape[-1])
        self.ops.bn_relu_conv3x3_backward(
            grad, y, u, v, z, norm.mean, norm.scale, norm.shift, layer.convs[-1], grad_bn, sums,
            grads.convs[-1],
        )  # fmt: skip
        return sums

    def unfinish(self, layer: Layer, which: int, grad: Tensor, grads: LayerGradients) -> None:
        """Backward of :meth:`finish`: ``grad`` becomes the gradient of the convolution's own result."""
        if layer.dropouts[which].rate > 0:
            grad.mul_(layer.dropouts[which].mask(grad))
        if layer.biases:
            bias = grad.sum(tuple(range(grad.dim() - 1)), dtype=self.mean.dtype)
            grads.conv_biases.insert(0, bias)


def backward(
    ops: Primitives,
    block: Block,
    grad: Tensor,
    out: Tensor,
    z_all: Tensor,
    stats: Tensor,
    needs_conv_grad: Sequence[bool],
) -> tuple[Tensor, list[LayerGradients]]:
    """Backward of :func:`forward`.

    Args:
        grad: [N, Ct, H, W] in channels_last memory, the gradient of ``out``. **Overwritten**: it is G.
        out: X as :func:`forward` returned it.
        z_all: z as :func:`forward` returned it; if it is empty, each layer's z is recomputed.
        stats: as :func:`forward` returned them.
        needs_conv_grad: for each convolution, whether its weight gradient is needed.

    Returns:
        The gradient of the block's input [N, c0, H, W], and those of each layer.
    """
    if ops.plain_blocks is not None and block.is_plain():
        grad_x, weights, biases, convs = plain_backward(
            ops.plain_blocks, plain_block(block), grad, out, z_all, stats, needs_conv_grad
        )
        norms = list(zip(weights, biases, strict=True))
        return grad_x, [
            LayerGradients(norms[i : i + 2], convs[i : i + 2], []) for i in range(0, len(norms), 2)
        ]
    run = BackwardPass(ops, block, grad, out, stats, z_all)
    needed = iter(needs_conv_grad)
    gradients = [
        LayerGradients([], [torch.empty_like(weight) if next(needed) else None for weight in layer.convs], [])
        for layer in block.layers
    ]
    layer_backward = _bottleneck_layer_backward if run.widths else _plain_layer_backward
    for i in reversed(range(len(block.layers))):
        layer_backward(run, i, gradients[i])
    grad_x = empty_like(out, block.in_channels)
    run.complete(run.u_parts[0], run.v_parts[0])
    ops.affine_gradient(run.g_parts[0], run.x_parts[0], run.u_parts[0], run.v_parts[0], nhwc(grad_x))
    return grad_x, gradients


def _bottleneck_layer_backward(run: BackwardPass, index: int, grads: LayerGradients) -> None:
    """Add layer ``index``'s part to G, U and V, and write its gradients."""
    ops, c, layer = run.ops, run.reads[index], run.block.layers[index]
    norm1, norm2 = run.norms(index)
    z, z_u, z_v, z_scale = run.z[index], run.z_u[index], run.z_v[index], norm2.scale
    if not run.keeps_bottleneck:
        run.run_bottleneck(index, norm1)
    grad_bn = run.grad_bn[index]
    sums2 = run.conv3x3_backward(index, z, norm2, grad_bn, grads)
    norm2_grads = norm2.gradient(ops, sums2, run.count, z_u, z_v)
    run.complete(z_u, z_v)
    if run.finishes(layer, 0):
        ops.affine_gradient(grad_bn.mul_(z_scale), z, z_u, z_v, grad_bn)
        run.unfinish(layer, 0, grad_bn, grads)
        z_scale, z_u, z_v = torch.ones_like(z_u), torch.zeros_like(z_u), torch.zeros_like(z_v)
    sums1 = run.mean.new_empty(2, c)
    ops.bn_relu_conv1x1_backward(
        grad_bn, z, z_scale, z_u, z_v,
        run.sources[index], norm1.mean, norm1.scale, norm1.shift, layer.convs[0],
        first_channels(run.g, c), sums1, grads.convs[0],
    )  # fmt: skip
    norm1_grads = norm1.gradient(ops, sums1, run.count, first_channels(run.u, c), first_channels(run.v, c))
    grads.norms = [norm1_grads, norm2_grads]


def _plain_layer_backward(run: BackwardPass, index: int, grads: LayerGradients) -> None:
    """The same for a layer without a bottleneck, whose 3x3 convolution reads X."""
    c, (norm,) = run.reads[index], run.norms(index)
    source, g = run.sources[index], first_channels(run.g, c)
    grad_bn = run.x.new_empty(source.shape)
    sums = run.conv3x3_backward(index, source, norm, grad_bn, grads)
    run.ops.scaled_accumulate(grad_bn, norm.scale, g)
    u, v = first_channels(run.u, c), first_channels(run.v, c)
    grads.norms = [norm.gradient(run.ops, sums, run.count, u, v)]
