"""The table of primitives: what each one reads, writes and adds to, and the arithmetic that it takes.

The names of the primitives come from here. So do the least bytes and FLOPs of a call, the shapes with which
the benchmark calls them, and what tests expect of the interface, the C++ schemas and the kernels' accesses.
The arguments' meaning is in the docstrings of :class:`dense_ext.backends.base.Backend`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .base import accumulate_dtype

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Primitive:
    """A row of the table.

    Attributes:
        name: the name in every backend.
        dimensions: those of each tensor argument. A dimension is a number or a letter: p are the pixels
            (N, H, W) of the input, q those of a pool's output, c the channels read, b the bottleneck's,
            k the channels written.
        writes: the arguments that are written.
        adds_to: those that are added to.
        overwrites: those that are read, and may then be overwritten.
        operations: an argument, and the floating-point operations for each of its values, as in the formula.
            Of a convolution the operations are 0: it takes 2 for each multiply-add, without the norm around
            it. The argument has as many pixels as its product.
        scalars: the arguments that are no tensors, with usual values.
        decided_by: the primitive whose backend runs this one, which has a default made of primitives; "" if
            a backend is chosen for this one itself.
    """

    name: str
    dimensions: Mapping[str, str]
    writes: tuple[str, ...]
    adds_to: tuple[str, ...]
    overwrites: tuple[str, ...]
    operations: tuple[str, int]
    scalars: Mapping[str, float | int] = field(default_factory=dict)
    decided_by: str = ""

    def shapes(self, **sizes: Shape) -> dict[str, Shape]:
        """The arguments' shapes, from the sizes of the letters."""
        return {
            name: tuple(
                itertools.chain.from_iterable((int(d),) if d.isdigit() else sizes[d] for d in dimensions)
            )
            for name, dimensions in self.dimensions.items()
        }

    def minimum_bytes(self, shapes: Mapping[str, Sequence[int] | None], dtype: torch.dtype) -> int:
        """The least bytes that a call moves: each input read once, each output written once, sums both.

        Args:
            shapes: those of the tensor arguments, by name; None for an output that is left out.
            dtype: the activations', which convolution weights share. Vectors are in its accumulation dtype.
        """
        wide = accumulate_dtype(dtype).itemsize
        return sum(
            math.prod(shape) * (dtype.itemsize if len(shape) == 4 else wide) * (1 + (name in self.adds_to))
            for name, shape in shapes.items()
            if shape is not None
        )

    def flops(self, shapes: Mapping[str, Sequence[int] | None]) -> int:
        """Floating-point operations of a call.

        A convolution's backward computes both gradients, or without ``grad_weight`` the data's alone.
        """
        argument, count = self.operations
        shape = shapes[argument] or ()
        if count:
            return count * math.prod(shape)
        products = 1 + (shapes.get("grad_weight") is not None)
        return 2 * math.prod(shape[:-1]) * math.prod(shapes["weight"] or ()) * products


def _primitive(
    name: str,
    arguments: str,
    operations: tuple[str, int],
    decided_by: str = "",
    **scalars: float | int,
) -> Primitive:
    """A row, from its tensor arguments as ``name:dimensions``.

    A name ends in "!" if it is written, in "+" if it is added to, and in "~" if it may be overwritten.
    """
    found = re.findall(r"(\w+)([!+~]?):(\w+)", arguments)
    writes, adds_to, overwrites = (tuple(n for n, mark, _ in found if mark == m) for m in "!+~")
    dimensions = {argument: letters for argument, _, letters in found}
    return Primitive(name, dimensions, writes, adds_to, overwrites, operations, scalars, decided_by)


_ROWS = (
    # Difference, mean, square, sum.
    _primitive("channel_stats", "x:pc mean!:c var!:c", ("x", 4)),
    _primitive("bn_scale_shift", "mean:c var:c weight:c bias:c scale!:c shift!:c", ("scale", 5), eps=1e-5),
    _primitive(
        "bn_gradient",
        "sums:2c mean:c var:c weight:c grad_weight!:c grad_bias!:c u+:c v+:c",
        ("grad_weight", 10),
        eps=1e-5,
        count=1024,
    ),
    _primitive("affine_gradient", "grad:pc x:pc u:c v:c out!:pc", ("out", 4)),
    _primitive("scaled_accumulate", "grad:pc scale:c out+:pc", ("out", 2)),
    _primitive("bn_relu_conv1x1_forward", "x:pc scale:c shift:c weight:bc11 z!:pb mean!:b var!:b", ("z", 0)),
    _primitive(
        "bn_relu_conv1x1_backward",
        "grad_bn~:pb z:pb z_scale:b z_u:b z_v:b x:pc mean:c scale:c shift:c weight:bc11 grad_x+:pc sums!:2c "
        "grad_weight!:bc11",
        ("z", 0),
    ),
    _primitive("bn_relu_conv3x3_forward", "z:pc scale:c shift:c weight:kc33 y!:pk mean!:k var!:k", ("z", 0)),
    _primitive(
        "bn_relu_conv3x3_backward",
        "grad:pk y:pk u:k v:k z:pc mean:c scale:c shift:c weight:kc33 grad_bn!:pc sums!:2c grad_weight!:kc33",
        ("z", 0),
    ),
    _primitive("bn_relu_pool_conv1x1_forward", "x:pc scale:c shift:c weight:kc11 y!:qk", ("y", 0)),
    _primitive(
        "bn_relu_pool_conv1x1_backward",
        "grad:qk x:pc mean:c scale:c shift:c weight:kc11 grad_x!:pc sums!:2c grad_weight!:kc11",
        ("grad", 0),
    ),
    # Norm and ReLU, 3 for each value of x; 9 comparisons an output, which has a quarter of them.
    _primitive("bn_relu_maxpool_forward", "x:pc scale:c shift:c y!:qc", ("x", 3 + 2)),
    # And scale * g, and its sums.
    _primitive(
        "bn_relu_maxpool_backward",
        "grad:qc x:pc mean:c scale:c shift:c grad_x!:pc sums!:2c",
        ("x", 3 + 2 + 5),
    ),
    _primitive(
        "bn_relu_pool_conv1x1_norm_backward",
        "grad:qk x:pc mean:c var:c norm_weight:c scale:c shift:c weight:kc11 grad_x!:pc "
        "grad_norm_weight!:c grad_norm_bias!:c grad_weight!:kc11",
        ("grad", 0),
        decided_by="bn_relu_pool_conv1x1_backward",
        eps=1e-5,
    ),
    # And u * x + v.
    _primitive(
        "bn_relu_maxpool_norm_backward",
        "grad:qc x:pc mean:c var:c norm_weight:c scale:c shift:c grad_x!:pc grad_norm_weight!:c "
        "grad_norm_bias!:c",
        ("x", 3 + 2 + 5 + 4),
        decided_by="bn_relu_maxpool_backward",
        eps=1e-5,
    ),
)
TABLE = {row.name: row for row in _ROWS}
# The primitives that every backend has.
PRIMITIVES = tuple(row.name for row in _ROWS if not row.decided_by)
# The primitives that a plain block consists of.
BLOCK_PRIMITIVES = tuple(name for name in PRIMITIVES if "pool" not in name and name != "scaled_accumulate")
# Operations with a default made of primitives, which a backend may override, and the primitive that decides
# which backend runs each.
THROUGH_NORM = {row.name: row.decided_by for row in _ROWS if row.decided_by}


def primitive_of(name: str) -> str:
    """The primitive that decides which backend runs ``name``, a primitive or a key of ``THROUGH_NORM``."""
    return TABLE[name].decided_by or name
