"""The least a primitive has to do, and the shapes on which a DenseNet calls it.

Shapes are those of the arguments in :mod:`dense_ext.backends.base`, by name; an output that is left
out (None there) has none, or None. Needs PyTorch alone, so that tests of kernels can call it too.
"""

from __future__ import annotations

import math
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

# What each primitive writes, and what it adds to.
WRITES: dict[str, tuple[str, ...]] = {
    "channel_stats": ("mean", "var"),
    "bn_scale_shift": ("scale", "shift"),
    "bn_gradient": ("grad_weight", "grad_bias"),
    "affine_gradient": ("out",),
    "scaled_accumulate": (),
    "bn_relu_conv1x1_forward": ("z", "mean", "var"),
    "bn_relu_conv1x1_backward": ("sums", "grad_weight"),
    "bn_relu_conv3x3_forward": ("y", "mean", "var"),
    "bn_relu_conv3x3_backward": ("grad_bn", "sums", "grad_weight"),
    "bn_relu_pool_conv1x1_forward": ("y",),
    "bn_relu_pool_conv1x1_backward": ("grad_x", "sums", "grad_weight"),
    "bn_relu_maxpool_forward": ("y",),
    "bn_relu_maxpool_backward": ("grad_x", "sums"),
    "bn_relu_pool_conv1x1_norm_backward": ("grad_x", "grad_norm_weight", "grad_norm_bias", "grad_weight"),
    "bn_relu_maxpool_norm_backward": ("grad_x", "grad_norm_weight", "grad_norm_bias"),
}
ACCUMULATES: dict[str, tuple[str, ...]] = {
    "bn_gradient": ("u", "v"),
    "scaled_accumulate": ("out",),
    "bn_relu_conv1x1_backward": ("grad_x",),
}

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
# The vectors of a backward pass through a norm.
_NORM = "mean var norm_weight scale shift grad_norm_weight grad_norm_bias"


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
    """One call of a primitive in a DenseNet.

    Args:
        primitive: its name.
        where: in the network, e.g. "block 1, layer 6".
        shapes: of its tensor arguments.
        widths: channels of the buffers that arguments are slices of; the others are dense.
    """

    primitive: str
    where: str
    shapes: dict[str, Shape]
    widths: dict[str, int] = field(default_factory=dict)

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


def _vectors(names: str, channels: int) -> dict[str, Shape]:
    return dict.fromkeys(names.split(), (channels,))


def _layer_cases(
    where: str, nhw: Shape, channels: int, bottleneck: int, growth: int, width: int
) -> Iterator[PrimitiveCase]:
    """A dense layer's calls: C channels in, K out, both slices of a buffer of ``width`` channels."""
    x, y = (*nhw, channels), (*nhw, growth)
    yield PrimitiveCase("bn_scale_shift", where, _vectors("mean var weight bias scale shift", channels))
    vectors = _vectors("mean var weight grad_weight grad_bias u v", channels)
    yield PrimitiveCase("bn_gradient", where, {"sums": (2, channels), **vectors})
    source, source_width = x, {"z": width}
    if bottleneck:
        z, weight = (*nhw, bottleneck), (bottleneck, channels, 1, 1)
        source, source_width = z, {}
        yield PrimitiveCase(
            "bn_relu_conv1x1_forward", where,
            {"x": x, **_vectors("scale shift", channels), "weight": weight, "z": z,
             **_vectors("mean var", bottleneck)}, {"x": width},
        )  # fmt: skip
        yield PrimitiveCase(
            "bn_relu_conv1x1_backward", where,
            {"grad_bn": z, "z": z, **_vectors("z_scale z_u z_v", bottleneck), "x": x,
             **_vectors("mean scale shift", channels), "weight": weight, "grad_x": x,
             "sums": (2, channels), "grad_weight": weight}, {"x": width, "grad_x": width},
        )  # fmt: skip
    else:
        shapes = {"grad": x, "scale": (channels,), "out": x}
        yield PrimitiveCase("scaled_accumulate", where, shapes, {"out": width})
    inner = source[-1]
    weight = (growth, inner, 3, 3)
    yield PrimitiveCase(
        "bn_relu_conv3x3_forward", where,
        {"z": source, **_vectors("scale shift", inner), "weight": weight, "y": y,
         **_vectors("mean var", growth)}, {**source_width, "y": width},
    )  # fmt: skip
    yield PrimitiveCase(
        "bn_relu_conv3x3_backward", where,
        {"grad": y, "y": y, **_vectors("u v", growth), "z": source, **_vectors("mean scale shift", inner),
         "weight": weight, "grad_bn": source, "sums": (2, inner), "grad_weight": weight},
        {**source_width, "grad": width, "y": width},
    )  # fmt: skip


def _block_cases(where: str, block: DenseBlock, shape: Shape) -> Iterator[PrimitiveCase]:
    """The first, the middle and the last layer, and what a block does once."""
    n, c0, h, w = shape
    parameters = [p for p in next(iter(block.values())).parameters() if p.dim() == 4]
    growth, bottleneck = parameters[-1].shape[0], parameters[0].shape[0] if len(parameters) == 2 else 0
    nhw, width, first = (n, h, w), c0 + len(block) * growth, (n, h, w, c0)
    yield PrimitiveCase("channel_stats", where, {"x": first, **_vectors("mean var", c0)}, {"x": width})
    yield PrimitiveCase(
        "affine_gradient", where, {"grad": first, "x": first, **_vectors("u v", c0), "out": first},
        {"grad": width, "x": width},
    )  # fmt: skip
    for i in sorted({0, len(block) // 2, len(block) - 1}):
        name = f"{where}, layer {i + 1}"
        yield from _layer_cases(name, nhw, c0 + i * growth, bottleneck, growth, width)


def _transition_cases(where: str, shape: Shape, out_channels: int) -> Iterator[PrimitiveCase]:
    n, c, h, w = shape
    x, y, weight = (n, h, w, c), (n, h // 2, w // 2, out_channels), (out_channels, c, 1, 1)
    yield PrimitiveCase(
        "bn_relu_pool_conv1x1_forward", where,
        {"x": x, **_vectors("scale shift", c), "weight": weight, "y": y},
    )  # fmt: skip
    yield PrimitiveCase(
        "bn_relu_pool_conv1x1_norm_backward", where,
        {"grad": y, "x": x, **_vectors(_NORM, c), "weight": weight, "grad_x": x, "grad_weight": weight},
    )  # fmt: skip


def _stem_cases(where: str, shape: Shape) -> Iterator[PrimitiveCase]:
    n, c, h, w = shape
    x, y = (n, h, w, c), (n, (h - 1) // 2 + 1, (w - 1) // 2 + 1, c)
    yield PrimitiveCase("bn_relu_maxpool_forward", where, {"x": x, **_vectors("scale shift", c), "y": y})
    yield PrimitiveCase(
        "bn_relu_maxpool_norm_backward", where, {"grad": y, "x": x, **_vectors(_NORM, c), "grad_x": x}
    )


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
            found += _transition_cases(where.replace("transition", "transition "), shape, weight.shape[0])
        else:
            found += _stem_cases(where, shape)
    return found
