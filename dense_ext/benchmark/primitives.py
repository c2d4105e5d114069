"""The shapes on which a DenseNet calls the primitives.

Needs PyTorch alone, so that tests of kernels can use it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..backends.base import accumulate_dtype
from ..backends.table import TABLE, Shape
from ..models import DenseNet
from ..modules import DenseBlock, FusedFeatures, Transition


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
        scalars: dict[str, Tensor | float | int] = {**TABLE[self.primitive].scalars}
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
    return PrimitiveCase(primitive, where, TABLE[primitive].shapes(**sizes), slices)


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
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # input and output
    with FakeTensorMode(), torch.no_grad():
        model = build()
        for name, module in model.features.named_children():
            if isinstance(module, DenseBlock | Transition) or name == "conv0":
                module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
        model(torch.empty(batch, 3, size, size))
    found: list[PrimitiveCase] = []
    for name, (x, y) in seen.items():
        module = model.features.get_submodule(name)
        if isinstance(module, DenseBlock):
            found += _block_cases(name.replace("denseblock", "block "), module, tuple(x.shape))
        elif isinstance(module, Transition):
            weight = next(p for p in module.parameters() if p.dim() == 4)
            where = name.replace("transition", "transition ")
            found += _pool_cases(where, tuple(x.shape), weight.shape[0])
        elif name == "conv0" and isinstance(model.features, FusedFeatures):
            found += _pool_cases("stem", tuple(y.shape))
    return found
