"""FLOP formulas of the operators for :class:`torch.utils.flop_counter.FlopCounterMode`.

Each multiply-add of a convolution counts 2. The operators' FLOPs are counted as executed. A transition
convolves after its pool, which takes a quarter of eager's FLOPs. A backward includes the bottlenecks that it
recomputes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .arguments import Arguments, BlockOptions, unpack

Shape = Sequence[int]


def _products(pixels: Shape, weights: Sequence[Shape]) -> list[int]:
    """FLOPs of each convolution, for ``pixels`` [N, C, *sizes] and weights [K, C, *window]."""
    return [2 * pixels[0] * math.prod(pixels[2:]) * math.prod(weight) for weight in weights]


def _weights(rest: Sequence[Any]) -> Sequence[Shape]:
    """The shapes of the convolutions' weights, from an operator's arguments after its activations."""
    return unpack(rest, Arguments)[0].conv_weights  # the counter passes shapes


def _gradients(products: Sequence[int], needed: Sequence[bool]) -> int:
    """FLOPs of the backward: the forward's for each data gradient and again for each weight gradient."""
    return sum(flops * (1 + wanted) for flops, wanted in zip(products, needed, strict=True))


def _dense_block(x: Shape, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return sum(_products(x, _weights(rest)))


def _packed_dense_block(
    x: Shape, packed: Shape, widths: Shape, growth: Shape, out_shape: Any = None, **_: Any
) -> int:
    channels = itertools.accumulate(growth[:-1], initial=x[1])
    weights = [
        weight
        for c, b, k in zip(channels, widths, growth, strict=True)
        for weight in ((b, c, 1, 1), (k, b, 3, 3))
    ]
    return sum(_products(x, weights))


def _packed_transition(x: Shape, packed: Shape, out_channels: int, out_shape: Any = None, **_: Any) -> int:
    return sum(_products(out_shape, [(out_channels, x[1], 1, 1)]))


def _dense_block_backward(
    grad: Shape, output: Shape, stats: Shape, z: Shape, *rest: Any, out_shape: Any = None, **__: Any
) -> int:
    args, options, *_, needed = unpack(rest, Arguments, BlockOptions)
    products = _products(output, args.conv_weights)
    again = sum(products[::2]) if options.convs_per_layer == 2 and math.prod(z) == 0 else 0
    return again + _gradients(products, needed)


def _pooling(x: Shape, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return sum(_products(out_shape[0], _weights(rest)))


def _pooling_backward(
    grad: Shape, x: Shape, stats: Shape, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    return _gradients(_products(grad, _weights(rest)), rest[-1])


def register_formulas() -> None:
    """Register the formulas with PyTorch's FLOP counter."""
    ops = torch.ops.dense_ext
    for names, formula in (
        (["dense_block"], _dense_block),
        (["packed_dense_block"], _packed_dense_block),
        (["packed_transition"], _packed_transition),
        (["dense_block_backward", "dense_block_backward_"], _dense_block_backward),
        (["transition", "stem", "activation"], _pooling),
        (["transition_backward", "stem_backward", "activation_backward"], _pooling_backward),
    ):
        # The C++ backend's operators are there only with its library.
        register_flop_formula([getattr(ops, name) for name in names if hasattr(ops, name)])(formula)
