"""bn_relu_pool_conv1x1_forward and bn_relu_pool_conv1x1_backward, also the backward through the norm."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dense_ext.backends.base import Backend

from .common import MakeCase, MakeMaker, OptionalOutputTests, PrimitiveTests, VolumeTests
from .harness import Case, Maker, check_refuses, skip_unless_volumes, through_norm

# N, H, W, C, K; an odd last row or column belongs to no window.
SIZES = [
    (1, 2, 2, 5, 12),
    (2, 5, 7, 33, 5),
    (2, 7, 4, 64, 32),
    (3, 2, 19, 130, 65),
    (4, 14, 16, 48, 15),
    (2, 6, 3, 300, 150),
    (2, 4, 4, 1, 1),
]
SMALL = SIZES[1]
# N, D, H, W, C, K
VOLUMES = [(1, 2, 2, 2, 5, 12), (2, 3, 5, 7, 33, 5), (3, 5, 4, 3, 64, 32), (1, 4, 3, 6, 130, 20)]


def forward_case(make: Maker, size: tuple[int, ...]) -> Case:
    n, *sides, c, k = size
    pooled = [side // 2 for side in sides]
    arguments = {
        "x": make.activations(n, *sides, c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "weight": make.weight(k, c, *[1] * len(sides)),
        "y": make.unwritten(n, *pooled, k),
    }
    return Case("bn_relu_pool_conv1x1_forward", arguments, {"y": 2 ** len(sides) * c})


def backward_case(make: Maker, size: tuple[int, ...], weight_gradient: bool = True) -> Case:
    n, *sides, c, k = size
    pooled = [side // 2 for side in sides]
    weight = make.weight(k, c, *[1] * len(sides))
    arguments = {
        "grad": make.gradients(n, *pooled, k),
        "x": make.activations(n, *sides, c),
        "mean": make.vector(c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "weight": weight,
        "grad_x": make.unwritten(n, *sides, c),
        "sums": make.unwritten_vector(2, c),
        "grad_weight": make.unwritten_like(weight) if weight_gradient else None,
    }
    pixels = n * math.prod(sides)
    lengths = {"grad_x": k, "sums": k * pixels, "grad_weight": pixels}
    return Case("bn_relu_pool_conv1x1_backward", arguments, lengths)


def norm_backward_case(make: Maker, size: tuple[int, ...], weight_gradient: bool = True) -> Case:
    return through_norm(backward_case(make, size, weight_gradient), make)


@pytest.mark.parametrize("backward", [backward_case, norm_backward_case])
@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 4, 4)], ids=str)
def test_image_smaller_than_a_window(
    backend: Backend, maker: MakeMaker, shape: tuple[int, ...], backward: MakeCase
) -> None:
    if len(shape) == 3:
        skip_unless_volumes(backend)
    case = backward(maker(torch.float32), (2, *shape, 5, 3))
    for name, output in case.run(backend).items():
        assert not output.any(), f"{name} is not zero"


def test_forward_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = forward_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "y", torch.empty(2, 3, 4, 5), r"y has shape .* \[2, 2, 3, 5\]")


class TestBnReluPoolConv1x1(PrimitiveTests, VolumeTests, OptionalOutputTests):
    cases = (forward_case, backward_case, norm_backward_case)
    optional_cases = (
        functools.partial(backward_case, weight_gradient=False),
        functools.partial(norm_backward_case, weight_gradient=False),
    )
    sizes = SIZES
    volumes = VOLUMES
    small = SMALL
    large = (4, 29, 31, 160, 40)
