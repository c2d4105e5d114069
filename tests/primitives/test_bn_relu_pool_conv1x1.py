"""bn_relu_pool_conv1x1_forward and bn_relu_pool_conv1x1_backward, also the backward through the norm."""

from __future__ import annotations

import functools

import pytest
import torch

from dense_ext.backends.base import Backend

from .common import MakeCase, MakeMaker, OptionalOutputTests, PrimitiveTests
from .harness import Case, Maker, check_refuses, through_norm

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


def forward_case(make: Maker, size: tuple[int, ...]) -> Case:
    n, h, w, c, k = size
    arguments = {
        "x": make.activations(n, h, w, c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "weight": make.weight(k, c, 1),
        "y": make.unwritten(n, h // 2, w // 2, k),
    }
    return Case("bn_relu_pool_conv1x1_forward", arguments, {"y": 4 * c})


def backward_case(make: Maker, size: tuple[int, ...], weight_gradient: bool = True) -> Case:
    n, h, w, c, k = size
    weight = make.weight(k, c, 1)
    arguments = {
        "grad": make.gradients(n, h // 2, w // 2, k),
        "x": make.activations(n, h, w, c),
        "mean": make.vector(c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "weight": weight,
        "grad_x": make.unwritten(n, h, w, c),
        "sums": make.unwritten_vector(2, c),
        "grad_weight": make.unwritten_like(weight) if weight_gradient else None,
    }
    lengths = {"grad_x": k, "sums": k * n * h * w, "grad_weight": n * h * w}
    return Case("bn_relu_pool_conv1x1_backward", arguments, lengths)


def norm_backward_case(make: Maker, size: tuple[int, ...], weight_gradient: bool = True) -> Case:
    return through_norm(backward_case(make, size, weight_gradient), make)


@pytest.mark.parametrize("backward", [backward_case, norm_backward_case])
@pytest.mark.parametrize("shape", [(1, 5), (4, 1)], ids=str)
def test_image_smaller_than_a_window(
    backend: Backend, maker: MakeMaker, shape: tuple[int, int], backward: MakeCase
) -> None:
    case = backward(maker(torch.float32), (2, *shape, 5, 3))
    for name, output in case.run(backend).items():
        assert not output.any(), f"{name} is not zero"


def test_forward_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = forward_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "y", torch.empty(2, 3, 4, 5), r"y has shape .* \[2, 2, 3, 5\]")


class TestBnReluPoolConv1x1(PrimitiveTests, OptionalOutputTests):
    cases = (forward_case, backward_case, norm_backward_case)
    optional_cases = (
        functools.partial(backward_case, weight_gradient=False),
        functools.partial(norm_backward_case, weight_gradient=False),
    )
    sizes = SIZES
    small = SMALL
    large = (4, 29, 31, 160, 40)
