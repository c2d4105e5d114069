"""bn_relu_conv3x3_forward and bn_relu_conv3x3_backward."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dense_ext.backends.base import Backend

from .common import ConvolutionTests, MakeCase, MakeMaker, OptionalOutputTests, PrimitiveTests, VolumeTests
from .harness import Case, Maker, check_refuses, check_values, skip_unless_volumes

# N, H, W, B, K
SIZES = [
    (1, 1, 1, 5, 12),
    (2, 5, 7, 33, 5),
    (3, 1, 9, 128, 48),
    (2, 9, 1, 15, 32),
    (1, 21, 9, 128, 32),
    (5, 8, 8, 48, 12),
    (2, 4, 4, 300, 12),
    (2, 3, 5, 1, 1),
]
SMALL = SIZES[1]
# N, D, H, W, B, K
VOLUMES = [
    (1, 1, 1, 1, 5, 12),
    (2, 3, 4, 5, 33, 5),
    (2, 2, 1, 3, 48, 32),
    (1, 4, 9, 16, 130, 40),
    (3, 5, 2, 2, 16, 1),
]


def forward_case(
    make: Maker, size: tuple[int, ...], statistics: bool = True, channels_last: bool = False
) -> Case:
    n, *sides, b, k = size
    window = (3,) * len(sides)
    arguments = {
        "z": make.activations(n, *sides, b),
        "scale": make.scale(b),
        "shift": make.shift(b),
        "weight": make.weight(k, b, *window, channels_last=channels_last),
        "y": make.unwritten(n, *sides, k),
        "mean": make.unwritten_vector(k) if statistics else None,
        "var": make.unwritten_vector(k) if statistics else None,
    }
    return Case("bn_relu_conv3x3_forward", arguments, {"y": math.prod(window) * b}, ("mean", "var", "y"))


def backward_case(
    make: Maker, size: tuple[int, ...], weight_gradient: bool = True, channels_last: bool = False
) -> Case:
    n, *sides, b, k = size
    window = (3,) * len(sides)
    weight = make.weight(k, b, *window, channels_last=channels_last)
    arguments = {
        "grad": make.gradients(n, *sides, k),
        "y": make.gradients(n, *sides, k),
        "u": make.vector(k),
        "v": make.vector(k),
        "z": make.activations(n, *sides, b),
        "mean": make.vector(b),
        "scale": make.scale(b),
        "shift": make.shift(b),
        "weight": weight,
        "grad_bn": make.unwritten(n, *sides, b),
        "sums": make.unwritten_vector(2, b),
        "grad_weight": make.unwritten_like(weight) if weight_gradient else None,
    }
    pixels, taps = n * math.prod(sides), math.prod(window)
    lengths = {"grad_bn": taps * k, "sums": taps * k * pixels, "grad_weight": pixels}
    return Case("bn_relu_conv3x3_backward", arguments, lengths, scratch=("grad",))


@pytest.mark.parametrize("case", [forward_case, backward_case])
def test_channels_last_weight(backend: Backend, maker: MakeMaker, case: MakeCase) -> None:
    check_values(backend, case(maker(torch.float32), SMALL, channels_last=True))


@pytest.mark.parametrize("case", [forward_case, backward_case])
def test_many_bands(backend: Backend, maker: MakeMaker, case: MakeCase, quick: bool) -> None:
    """An image too large for the cache is computed in bands of rows, which read each other's edges."""
    if quick:
        pytest.skip("Triton's kernels have no bands")
    check_values(backend, case(maker(torch.float32), (1, 13, 100, 128, 12)))


def test_forward_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = forward_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "y", torch.empty(2, 5, 6, 5), r"y has shape \[2, 5, 6, 5\]")
    check_refuses(backend, case, "weight", torch.empty(5, 32, 3, 3), r"expected \[5, 33, 3, 3\]")
    check_refuses(backend, case, "weight", torch.empty(5, 33, 3, 3, 3), "weight has shape")
    check_refuses(backend, case, "var", None, "mean and var go together")


def test_forward_of_volumes_refuses(backend: Backend, maker: MakeMaker) -> None:
    skip_unless_volumes(backend)
    case = forward_case(maker(torch.float32), VOLUMES[1])
    check_refuses(backend, case, "weight", torch.empty(5, 33, 3, 3), "weight has shape")
    check_refuses(backend, case, "y", torch.empty(3, 2, 4, 5, 5), "volumes of 2 planes, expected 3")


class TestBnReluConv3x3(PrimitiveTests, ConvolutionTests, VolumeTests, OptionalOutputTests):
    cases = (forward_case, backward_case)
    optional_cases = (
        functools.partial(forward_case, statistics=False),
        functools.partial(backward_case, weight_gradient=False),
    )
    sizes = SIZES
    volumes = VOLUMES
    small = SMALL
    large = (3, 33, 17, 40, 32)
