"""affine_gradient and scaled_accumulate."""

from __future__ import annotations

import torch

from dense_ext.backends.base import Backend, accumulate_dtype
from dense_ext.backends.reference import ReferenceBackend

from .common import MakeMaker, PrimitiveTests
from .harness import Case, Maker, assert_close, check_refuses, tolerance

# N, H, W, C
SIZES = [(1, 1, 1, 5), (2, 5, 7, 33), (3, 1, 9, 1), (2, 9, 1, 12), (2, 33, 17, 130)]
SMALL = SIZES[1]


def affine_case(make: Maker, size: tuple[int, ...]) -> Case:
    arguments = {
        "grad": make.gradients(*size),
        "x": make.activations(*size),
        "u": make.vector(size[-1]),
        "v": make.vector(size[-1]),
        "out": make.unwritten(*size),
    }
    return Case("affine_gradient", arguments, {"out": 3})


def accumulate_case(make: Maker, size: tuple[int, ...]) -> Case:
    arguments = {
        "grad": make.activations(*size),
        "scale": make.vector(size[-1]),
        "out": make.gradients(*size),
    }
    return Case("scaled_accumulate", arguments, {"out": 2})


def test_in_place(backend: Backend, maker: MakeMaker, dtype: torch.dtype) -> None:
    """``out`` may be ``grad`` itself."""
    case = affine_case(maker(dtype), SMALL)
    expected = case.copy(torch.float64).run(ReferenceBackend())["out"]
    case.arguments["out"] = case.arguments["grad"]
    out = case.run(backend)["out"]
    assert_close("affine_gradient in place", out.cpu(), expected, tolerance(dtype, 3))


def test_rounds_to_nearest(backend: Backend, maker: MakeMaker, dtype: torch.dtype) -> None:
    """A sum that is exact before it is stored must round to nearest, ties to even."""
    case = accumulate_case(maker(dtype), SIZES[-1])
    case.arguments["scale"].fill_(1)
    exact = case.arguments["out"].double() + case.arguments["grad"].double()
    out = case.run(backend)["out"]
    assert torch.equal(out, exact.to(accumulate_dtype(dtype)).to(dtype))


def test_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = affine_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "out", torch.empty(2, 5, 7, 32), r"out has shape \[2, 5, 7, 32\]")
    check_refuses(backend, case, "v", torch.empty(33).half(), "v has dtype Half, expected Float")


class TestAffineGradient(PrimitiveTests):
    cases = (affine_case, accumulate_case)
    sizes = SIZES
    small = SMALL
    large = (2, 33, 17, 130)
