"""channel_stats."""

from __future__ import annotations

import torch

from dense_ext.backends.base import Backend

from .common import MakeMaker, PrimitiveTests
from .harness import Case, Maker, check_refuses, check_values

# N, H, W, C
SIZES = [(1, 1, 1, 5), (2, 5, 7, 33), (3, 1, 9, 1), (2, 9, 1, 12), (4, 33, 17, 130)]
SMALL = SIZES[1]


def stats_case(make: Maker, size: tuple[int, ...]) -> Case:
    arguments = {
        "x": make.activations(*size),
        "mean": make.unwritten_vector(size[-1]),
        "var": make.unwritten_vector(size[-1]),
    }
    return Case("channel_stats", arguments, {}, ("mean", "var", "x"))


def test_large_mean(backend: Backend, maker: MakeMaker) -> None:
    """The variance is 1e-10 of the squared mean; E[x^2] - E[x]^2 would lose all its digits."""
    case = stats_case(maker(torch.float32), (4, 33, 17, 40))
    case.arguments["x"].mul_(0.03).add_(3000)
    check_values(backend, case)


def test_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = stats_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "var", torch.empty(34), r"var of shape \[34\] must be contiguous")
    check_refuses(backend, case, "x", torch.empty(2, 3), r"x must be \[N, H, W, C\]")


class TestChannelStats(PrimitiveTests):
    cases = (stats_case,)
    sizes = SIZES
    small = SMALL
    large = (4, 33, 17, 130)
