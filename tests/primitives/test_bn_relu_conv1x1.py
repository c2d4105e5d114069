"""bn_relu_conv1x1_forward and bn_relu_conv1x1_backward."""

from __future__ import annotations

import functools

import torch

from dense_ext.backends.base import Backend

from .common import ConvolutionTests, MakeMaker, OptionalOutputTests, PrimitiveTests
from .harness import Case, Maker, check_refuses

# N, H, W, C, B
SIZES = [
    (1, 1, 1, 5, 12),
    (2, 5, 7, 33, 5),
    (3, 1, 9, 130, 48),
    (2, 9, 1, 12, 32),
    (2, 11, 13, 64, 128),
    (2, 9, 9, 300, 15),
    (1, 6, 7, 40, 192),
    (2, 8, 8, 1, 1),
]
SMALL = SIZES[1]


def forward_case(make: Maker, size: tuple[int, ...], statistics: bool = True) -> Case:
    n, h, w, c, b = size
    arguments = {
        "x": make.activations(n, h, w, c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "weight": make.weight(b, c, 1, 1),
        "z": make.unwritten(n, h, w, b),
        "mean": make.unwritten_vector(b) if statistics else None,
        "var": make.unwritten_vector(b) if statistics else None,
    }
    return Case("bn_relu_conv1x1_forward", arguments, {"z": c}, ("mean", "var", "z"))


def backward_case(make: Maker, size: tuple[int, ...], weight_gradient: bool = True) -> Case:
    n, h, w, c, b = size
    weight = make.weight(b, c, 1, 1)
    arguments = {
        "grad_bn": make.gradients(n, h, w, b),
        "z": make.gradients(n, h, w, b),
        "z_scale": make.vector(b),
        "z_u": make.vector(b),
        "z_v": make.vector(b),
        "x": make.activations(n, h, w, c),
        "mean": make.vector(c),
        "scale": make.scale(c),
        "shift": make.shift(c),
        "weight": weight,
        "grad_x": make.gradients(n, h, w, c),
        "sums": make.unwritten_vector(2, c),
        "grad_weight": make.unwritten_like(weight) if weight_gradient else None,
    }
    pixels = n * h * w
    lengths = {"grad_x": b, "sums": b * pixels, "grad_weight": pixels}
    return Case("bn_relu_conv1x1_backward", arguments, lengths, scratch=("grad_bn",))


def test_forward_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = forward_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "z", torch.empty(2, 5, 7, 6), r"z has shape \[2, 5, 7, 6\], expected")
    check_refuses(backend, case, "weight", torch.empty(5, 32, 1, 1), r"expected \[5, 33, 1, 1\]")
    check_refuses(backend, case, "scale", torch.empty(32), r"scale of shape \[32\] must be")
    check_refuses(backend, case, "x", case.arguments["x"].transpose(1, 2), "x of shape .* dense")
    check_refuses(backend, case, "z", case.arguments["z"].double(), "z has dtype Double")


class TestBnReluConv1x1(PrimitiveTests, ConvolutionTests, OptionalOutputTests):
    cases = (forward_case, backward_case)
    optional_cases = (
        functools.partial(forward_case, statistics=False),
        functools.partial(backward_case, weight_gradient=False),
    )
    sizes = SIZES
    small = SMALL
    large = (4, 15, 17, 130, 48)
