"""bn_scale_shift and bn_gradient."""

from __future__ import annotations

import pytest
import torch

from dense_ext.backends.base import Backend

from .common import MakeCase, MakeMaker
from .harness import Case, Maker, check_op, check_refuses, check_repeats, check_values

EPS = 1e-5
CHANNELS = [1, 5, 33, 128]


def scale_shift_case(make: Maker, channels: int) -> Case:
    arguments = {
        "mean": make.vector(channels),
        "var": make.vector(channels, positive=True),
        "weight": make.vector(channels),
        "bias": make.vector(channels),
        "eps": EPS,
        "scale": make.unwritten_vector(channels),
        "shift": make.unwritten_vector(channels),
    }
    return Case("bn_scale_shift", arguments, {"scale": 4, "shift": 6})


def gradient_case(make: Maker, channels: int, statistics: bool = True) -> Case:
    arguments = {
        "sums": make.vector(2, channels),
        "mean": make.vector(channels),
        "var": make.vector(channels, positive=True),
        "weight": make.vector(channels),
        "eps": EPS,
        "count": 77,
        "grad_weight": make.unwritten_vector(channels),
        "grad_bias": make.unwritten_vector(channels),
        "u": make.vector(channels) if statistics else None,
        "v": make.vector(channels) if statistics else None,
    }
    lengths = {"grad_weight": 5, "grad_bias": 1, "u": 9, "v": 12}
    return Case("bn_gradient", arguments, lengths)


CASES = [scale_shift_case, gradient_case]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("case", CASES)
def test_values(
    backend: Backend, maker: MakeMaker, dtype: torch.dtype, case: MakeCase, channels: int
) -> None:
    first = case(maker(dtype), channels)
    check_values(backend, first)
    check_repeats(backend, case(maker(dtype), channels), first)


def test_running_statistics(backend: Backend, maker: MakeMaker) -> None:
    """A norm that used running statistics has no u and v; the other outputs are right all the same."""
    check_values(backend, gradient_case(maker(torch.float32), 5, statistics=False))


@pytest.mark.parametrize("case", CASES)
def test_op(backend: Backend, maker: MakeMaker, case: MakeCase) -> None:
    check_op(backend, case(maker(torch.float32), 5))


def test_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = gradient_case(maker(torch.float32), 5)
    check_refuses(backend, case, "sums", torch.empty(5), r"sums of shape \[5\] must be contiguous")
    check_refuses(backend, case, "var", torch.empty(5).double(), "var has dtype Double")
