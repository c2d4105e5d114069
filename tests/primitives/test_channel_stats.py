"""channel_stats."""

from __future__ import annotations

import pytest
import torch

from dense_ext.backends.base import Backend

from .common import MakeCase, MakeMaker, PrimitiveTests
from .harness import Case, Maker, assert_as_exact_as_eager, check_refuses, check_values
from .test_bn_relu_conv1x1 import forward_case as conv1x1_case
from .test_bn_relu_conv3x3 import forward_case as conv3x3_case

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


def skip_unless_sums_are_double(backend: Backend) -> None:
    """On a GPU eager's sums are float32, as ours are."""
    if backend.name != "cpu":
        pytest.skip(f"{backend.name} sums in float32")


@pytest.mark.parametrize("mean", [0, 10, 1e4])
@pytest.mark.parametrize("std", [0, 0.01, 1], ids=lambda std: f"std{std}")
@pytest.mark.parametrize("size", [(1, 1, 3, 70), (1, 7, 7, 130), (4, 16, 16, 6), (2, 512, 512, 1)])
def test_as_exact_as_eager(
    backend: Backend, maker: MakeMaker, size: tuple[int, ...], mean: float, std: float
) -> None:
    """Few rows and many, in one vector and several; a constant channel has std 0."""
    skip_unless_sums_are_double(backend)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = stats_case(maker(dtype), size)
        x = case.arguments["x"]
        x.copy_(torch.randn(size, generator=torch.Generator().manual_seed(0)).mul_(std).add_(mean + 1 / 3))
        assert_as_exact_as_eager(f"{dtype}", *case.run(backend).values(), x)


@pytest.mark.parametrize("case", [conv1x1_case, conv3x3_case])
@pytest.mark.parametrize("size", [(2, 5, 7, 33, 40), (1, 3, 700, 12, 8)], ids=["few pixels", "many pixels"])
def test_convolutions_as_exact_as_eager(
    backend: Backend, maker: MakeMaker, case: MakeCase, size: tuple[int, ...]
) -> None:
    """The convolutions take the statistics of their output; a large shift gives it a large mean."""
    skip_unless_sums_are_double(backend)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = case(maker(dtype), size)
        made.arguments["shift"].add_(1000)
        made.arguments["weight"].abs_()
        out, mean, var = made.run(backend).values()
        assert_as_exact_as_eager(f"{dtype}", mean, var, out)


@pytest.mark.parametrize("large", [1e19, 3e38])
def test_large_values_do_not_overflow(backend: Backend, maker: MakeMaker, large: float) -> None:
    """Their sum overflows float32, their mean does not; nor does the variance of the first."""
    skip_unless_sums_are_double(backend)
    case = stats_case(maker(torch.float32), (2, 24, 24, 33))
    x = case.arguments["x"]
    x.fill_(large)
    x[..., 0] = 1
    x[0, ..., 1] = -large
    mean, var = case.run(backend).values()
    true_var, true_mean = torch.var_mean(x.double().flatten(0, -2), dim=0, correction=0)
    tol = torch.finfo(torch.float32).eps
    torch.testing.assert_close(mean, true_mean.float(), rtol=tol, atol=tol * large)
    torch.testing.assert_close(var, true_var.float(), rtol=tol, atol=0)


def test_refuses(backend: Backend, maker: MakeMaker) -> None:
    case = stats_case(maker(torch.float32), SMALL)
    check_refuses(backend, case, "var", torch.empty(34), r"var of shape \[34\] must be contiguous")
    check_refuses(backend, case, "x", torch.empty(2, 3), r"x must be \[N, H, W, C\]")


class TestChannelStats(PrimitiveTests):
    cases = (stats_case,)
    sizes = SIZES
    small = SMALL
    large = (4, 33, 17, 130)
