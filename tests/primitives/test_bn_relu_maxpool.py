"""bn_relu_maxpool_forward and bn_relu_maxpool_backward, also the backward through the norm."""

from __future__ import annotations

import math

import pytest
import torch

from dense_ext.backends.base import Backend

from .common import MakeMaker, PrimitiveTests, VolumeTests
from .harness import Case, Maker, check_refuses, check_values, skip_unless_volumes, through_norm

# N, H, W, C. Activations are multiples of 1/64, so that windows often have equal maxima.
SIZES = [
    (1, 1, 1, 5),
    (2, 5, 7, 33),
    (3, 1, 9, 64),
    (2, 9, 1, 12),
    (2, 16, 16, 130),
    (1, 33, 17, 1),
]
SMALL = SIZES[1]
# N, D, H, W, C
VOLUMES = [(1, 1, 1, 1, 5), (2, 3, 5, 7, 33), (3, 4, 1, 6, 64), (1, 9, 8, 4, 130)]


def forward_case(make: Maker, size: tuple[int, ...]) -> Case:
    n, *sides, c = size
    pooled = [(side - 1) // 2 + 1 for side in sides]
    arguments = {
        "x": make.activations(n, *sides, c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "y": make.unwritten(n, *pooled, c),
    }
    return Case("bn_relu_maxpool_forward", arguments, {"y": 1})


def backward_case(make: Maker, size: tuple[int, ...]) -> Case:
    n, *sides, c = size
    pooled = [(side - 1) // 2 + 1 for side in sides]
    arguments = {
        "grad": make.gradients(n, *pooled, c),
        "x": make.activations(n, *sides, c),
        "mean": make.vector(c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "grad_x": make.unwritten(n, *sides, c),
        "sums": make.unwritten_vector(2, c),
    }
    windows = 2 ** len(sides)  # that a pixel may be in
    lengths = {"grad_x": windows, "sums": windows * n * math.prod(sides)}
    return Case("bn_relu_maxpool_backward", arguments, lengths)


def norm_backward_case(make: Maker, size: tuple[int, ...]) -> Case:
    return through_norm(backward_case(make, size), make)


@pytest.mark.parametrize("size", [SMALL, VOLUMES[1]], ids=str)
def test_equal_maxima(backend: Backend, maker: MakeMaker, size: tuple[int, ...]) -> None:
    """Among a window's equal maxima, the first in row-major order takes the gradient."""
    if size != SMALL:
        skip_unless_volumes(backend)
    case = backward_case(maker(torch.float32), size)
    case.arguments["x"].fill_(1)
    case.arguments["scale"].fill_(1)
    check_values(backend, case)


def test_many_bands(backend: Backend, maker: MakeMaker, quick: bool) -> None:
    """An image too large for the cache is computed in bands, and windows across an edge belong to both."""
    if quick:
        pytest.skip("Triton's kernels have no bands")
    check_values(backend, backward_case(maker(torch.float32), (1, 61, 50, 130)))


def test_forward_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = forward_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "y", torch.empty(2, 2, 4, 33), r"y has shape .* \[2, 3, 4, 33\]")


class TestBnReluMaxpool(PrimitiveTests, VolumeTests):
    cases = (forward_case, backward_case, norm_backward_case)
    sizes = SIZES
    volumes = VOLUMES
    small = SMALL
    large = (3, 33, 34, 40)
