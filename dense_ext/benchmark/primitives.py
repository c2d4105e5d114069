"""The least a primitive has to do, and the shapes on which a DenseNet calls it.

Shapes are those of the arguments in :mod:`dense_ext.backends.base`, by name; an output that is left
out (None there) has none, or None. Needs PyTorch alone, so that tests of kernels can call it too.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backends.base import accumulate_dtype
from ..models import DenseNet
from ..modules import DenseBlock, FusedFeatures, Transition
from .flops import without_memory

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[int] | None]

# The tensor arguments of each primitive: a name, "!" if it is written or "+" if it is added to, and its
# dimensions. A dimension is a number or a letter: p are the pixels (N, H, W) of the input, q those of a
# pool's output, c the channels read, b the bottleneck's, k the channels written.
_ARGUMENTS = {
    "channel_stats": "x:pc mean!:c var!:c",
    "bn_scale_shift": "mean:c var:c weight:c bias:c scale!:c shift!:c",
    "bn_gradient": "sums:2c mean:c var:c weight:c grad_weight!:c grad_bias!:c u+:c v+:c",
    "affine_gradient": "grad:pc x:pc u:c v:c out!:pc",
    "scaled_accumulate": "grad:pc scale:c out+:pc",
    "bn_relu_conv1x1_forward": "x:pc scale:c shift:c weight:bc11 z!:pb mean!:b var!:b",
    "bn_relu_conv1x1_backward": "grad_bn:pb z:pb z_scale:b z_u:b z_v:b x:pc mean:c scale:c shift:c "
    "weight:bc11 grad_x+:pc sums!:2c grad_weight!:bc11",
    "bn_relu_conv3x3_forward": "z:pc scale:c shift:c weight:kc33 y!:pk mean!:k var!:k",
    "bn_relu_conv3x3_backward": "grad:pk y:pk u:k v:k z:pc mean:c scale:c shift:c weight:kc33 grad_bn!:pc "
    "sums!:2c grad_weight!:kc33",
    "bn_relu_pool_conv1x1_forward": "x:pc scale:c shift:c weight:kc11 y!:qk",
    "bn_relu_pool_conv1x1_backward": "grad:qk x:pc mean:c scale:c shift:c weight:kc11 grad_x!:pc sums!:2c "
    "grad_weight!:kc11",
    "bn_relu_pool_conv1x1_norm_backward": "grad:qk x:pc mean:c var:c norm_weight:c scale:c shift:c "
    "grad_norm_weight!:c grad_norm_bias!:c weight:kc11 grad_x!:pc grad_weight!:kc11",
    "bn_relu_maxpool_forward": "x:pc scale:c shift:c y!:qc",
    "bn_relu_maxpool_backward": "grad:qc x:pc mean:c scale:c shift:c grad_x!:pc sums!:2c",
    "bn_relu_maxpool_norm_backward": "grad:qc x:pc mean:c var:c norm_weight:c scale:c shift:c "
    "grad_norm_weight!:c grad_norm_bias!:c grad_x!:pc",
}


def _marked(mark: str) -> dict[str, tuple[str, ...]]:
    """The arguments of each primitive with a mark."""
    return {
        primitive: tuple(re.findall(rf"(\w+)\{mark}:", arguments))
        for primitive, arguments in _ARGUMENTS.items()
    }


WRITES, ACCUMULATES = _marked("!"), _marked("+")

# Operations for each value of an argument, of the primitives without a product: those of the formula.
_OPERATIONS: dict[str, tuple[str, int]] = {
    "channel_stats": ("x", 4),  # difference, mean, square, sum
    "bn_scale_shift": ("scale", 5),
    "bn_gradient": ("grad_weight", 10),
    "affine_gradient": ("out", 4),
    "scaled_accumulate": ("out", 2),
    "bn_relu_maxpool_forward": ("x", 3 + 2),  # norm and ReLU; 9 comparisons an output, a quarter of x
    "bn_relu_maxpool_backward": ("x", 3 + 2 + 5),  # and scale * g, its sums
    "bn_relu_maxpool_norm_backward": ("x", 3 + 2 + 5 + 4),  # and u * x + v
}

# The arguments that are no tensors; their values change nothing about what is measured.
_SCALARS: dict[str, dict[str, float | int]] = {
    "bn_scale_shift": {"eps": 1e-5},
    "bn_gradient": {"eps": 1e-5, "count": 1024},
    "bn_relu_pool_conv1x1_norm_backward": {"eps": 1e-5},
    "bn_relu_maxpool_norm_backward": {"eps": 1e-5},
}


def minimum_bytes(primitive: str, shapes: Shapes, dtype: torch.dtype) -> int:
    """The least bytes a call moves: each input read once, each output written once, sums both.

    Args:
        primitive: a name from ``backends.base.PRIMITIVES`` or ``THROUGH_NORM``.
        shapes: of its tensor arguments, by name. Activations and convolution weights (4 dimensions)
            are of ``dtype``, per-channel vectors of its accumulation dtype.
        dtype: of the activations.
    """
    added_to = ACCUMULATES.get(primitive, ())
    return sum(
        math.prod(shape)
        * (dtype if len(shape) == 4 else accumulate_dtype(dtype)).itemsize
        * (2 if name in added_to else 1)
        for name, shape in shapes.items()
        if shape is not None
    )


def flops(primitive: str, shapes: Shapes) -> int:
    """Floating-point operations of a call.

    Of convolutions 2 per multiply-add, without the norms around them; backward is the data's
    gradient, and the weight's unless ``grad_weight`` is left out. Of the others those of the formula.
    """
    if primitive in _OPERATIONS:
        name, count = _OPERATIONS[primitive]
        return count * math.prod(shapes[name] or ())
    weight = shapes["weight"] or ()
    backward = primitive.endswith("_backward")
    product = next(
        shapes[name] for name in (("grad_bn", "grad") if backward else ("z", "y")) if name in shapes
    )
    if primitive.startswith("bn_relu_conv3x3"):
        product = shapes["z"]  # as many pixels as its output
    pixels = math.prod((product or ())[:-1])
    products = (2 if shapes.get("grad_weight") is not None else 1) if backward else 1
    return 2 * pixels * math.prod(weight) * products


@dataclass(frozen=True)
class PrimitiveCase:
    """One call of a primitive in a DenseNet."""

    primitive: str
    where: str  # in the network, e.g. "block 1, layer 6"
    shapes: dict[str, Shape]  # of its tensor arguments
    widths: dict[str, int] = field(default_factory=dict)  # of buffers that arguments are slices of

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | float | int]:
        """The arguments of a call: random, of order one."""
        generator = torch.Generator(device).manual_seed(0)
        scalars: dict[str, Tensor | float | int] = {**_SCALARS.get(self.primitive, {})}
        return scalars | {name: self._tensor(name, dtype, device, generator) for name in self.shapes}

    def _tensor(
        self, name: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Tensor:
        shape = self.shapes[name]
        if len(shape) < 4:
            vector = torch.rand(shape, device=device, generator=generator, dtype=accumulate_dtype(dtype))
            # Repeated calls may feed on their own output (grad_bn and grad are scratch): it keeps its size.
            small = name in ("z_u", "z_v", "u", "v")
            return torch.ones_like(vector) if name == "z_scale" else vector * 1e-3 if small else vector + 0.5
        wide = (*shape[:-1], self.widths.get(name, shape[-1]))
        values = torch.randn(wide, device=device, generator=generator)
        if name.endswith("weight"):
            values /= math.sqrt(math.prod(shape[1:]))
        return values.to(dtype)[..., : shape[-1]]


def _case(primitive: str, where: str, slices: dict[str, int], **sizes: Shape) -> PrimitiveCase:
    """A call by the sizes of its arguments' dimensions; those in ``slices`` are of buffers so wide."""
    shapes = {}
    for argument in _ARGUMENTS[primitive].split():
        name, dimensions = argument.split(":")
        each = ((int(d),) if d.isdigit() else sizes[d] for d in dimensions)
        shapes[name.rstrip("!+")] = tuple(itertools.chain.from_iterable(each))
    return PrimitiveCase(primitive, where, shapes, slices)


def _block_cases(where: str, block: DenseBlock, shape: Shape) -> Iterator[PrimitiveCase]:
    """The first, the middle and the last layer, and what a block does once."""
    *p, c0 = shape[0], *shape[2:], shape[1]
    parameters = [p for p in next(iter(block.values())).parameters() if p.dim() == 4]
    growth, bottleneck = parameters[-1].shape[0], parameters[0].shape[0] if len(parameters) == 2 else 0
    width = c0 + len(block) * growth  # of the buffer that layers read slices of, and write one to

    def case(primitive: str, slices: str = "", layer: str = "", **sizes: int) -> PrimitiveCase:
        channels = {name: (size,) for name, size in sizes.items()}
        return _case(primitive, where + layer, dict.fromkeys(slices.split(), width), p=tuple(p), **channels)

    yield case("channel_stats", "x", c=c0)
    yield case("affine_gradient", "grad x", c=c0)
    for i in sorted({0, len(block) // 2, len(block) - 1}):
        layer, c = f", layer {i + 1}", c0 + i * growth
        yield case("bn_scale_shift", layer=layer, c=c)
        yield case("bn_gradient", layer=layer, c=c)
        if bottleneck:
            yield case("bn_relu_conv1x1_forward", "x", layer, c=c, b=bottleneck)
            yield case("bn_relu_conv1x1_backward", "x grad_x", layer, c=c, b=bottleneck)
        else:
            yield case("scaled_accumulate", "out", layer, c=c)
        read, inner = ("", bottleneck) if bottleneck else ("z ", c)
        yield case("bn_relu_conv3x3_forward", read + "y", layer, c=inner, k=growth)
        yield case("bn_relu_conv3x3_backward", read + "grad y", layer, c=inner, k=growth)


def _pool_cases(where: str, shape: Shape, out_channels: int | None = None) -> Iterator[PrimitiveCase]:
    """A transition's calls, or without ``out_channels`` the stem's."""
    n, c, h, w = shape
    if out_channels is None:
        pool, q = "bn_relu_maxpool", (n, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    else:
        pool, q = "bn_relu_pool_conv1x1", (n, h // 2, w // 2)
    for direction in ("forward", "norm_backward"):
        yield _case(f"{pool}_{direction}", where, {}, p=(n, h, w), q=q, c=(c,), k=(out_channels or c,))


def model_cases(build: Callable[[], DenseNet], batch: int, size: int) -> list[PrimitiveCase]:
    """The calls of a training step's primitives, of the first, middle and last layer of each block.

    Args:
        build: makes the network, which is run on tensors without memory to see its shapes.
        batch, size: images, and their height and width in pixels.
    """
    inputs: list[tuple[str, nn.Module, Shape]] = []
    with without_memory(), torch.no_grad():
        model = build()
        for name, module in model.features.named_children():
            if isinstance(module, (DenseBlock, Transition)):
                module.register_forward_pre_hook(
                    lambda module, args, name=name: inputs.append((name, module, tuple(args[0].shape)))
                )
            elif name == "conv0" and isinstance(model.features, FusedFeatures):
                module.register_forward_hook(
                    lambda module, args, y: inputs.append(("stem", module, tuple(y.shape)))
                )
        model(torch.empty(batch, 3, size, size))
    found: list[PrimitiveCase] = []
    for name, module, shape in inputs:
        where = name.replace("dense", "")
        if isinstance(module, DenseBlock):
            found += _block_cases(where.replace("block", "block "), module, shape)
        elif isinstance(module, Transition):
            weight = next(p for p in module.parameters() if p.dim() == 4)
            found += _pool_cases(where.replace("transition", "transition "), shape, weight.shape[0])
        else:
            found += _pool_cases(where, shape)
    return found
