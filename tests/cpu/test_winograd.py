"""3x3 convolutions by Winograd's algorithm: as exact as PyTorch's, and where their rule says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dense_ext.backends import CPU
from dense_ext.benchmark.memory import allocation_levels
from dense_ext.benchmark.suites.primitives import relative_error

from ..conftest import checked_backends
from ..primitives import test_bn_relu_conv3x3 as conv3x3
from ..primitives.harness import Maker

pytestmark = pytest.mark.skipif(CPU.library.path is None, reason="the C++ backend is not built")

CASES = {"forward": conv3x3.forward_case, "backward": conv3x3.backward_case}
# [N, H, W] or [N, D, H, W] on either side of the rule: few pixels, and sizes that whole tiles do not fit.
SIZES = [
    (1, 4, 4), (1, 4, 6), (1, 5, 5), (2, 5, 5), (40, 3, 3), (40, 1, 40), (9, 2, 2), (1, 7, 7),
    (4, 2, 4, 4), (4, 4, 4, 6), (4, 1, 4, 4), (1, 1, 3, 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def only_on_a_cpu(request: pytest.FixtureRequest) -> None:
    if checked_backends(request.config) != ["cpu"]:
        pytest.skip("Winograd's algorithm is the C++ backend's")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scratch_is_what_the_planner_counts(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """The points of a weight are more than a fifth of it, so this also tells which algorithm ran."""
    b, k = 128, 32
    case = CASES[name](Maker(dtype, torch.device("cpu")), (*sizes, b, k))
    taken = max(allocation_levels(lambda: case.run(CPU) and None))
    counted = CPU.scratch_bytes(case.primitive, sizes, b, k, dtype)
    assert counted == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("sizes", [(2, 28, 28), (4, 7, 7), (1, 16, 16, 16)], ids=str)
def test_float32_is_as_exact_as_eager(sizes: tuple[int, ...]) -> None:
    """A sum over 128 channels is more exact than one over 1152 values; but a weight gradient's is as long.

    Its transforms round too: it has up to 1.3 times eager's error.
    """
    n, *sides = sizes
    b, k, dims = 128, 32, len(sides)
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, b, *sides, generator=g).abs()
    weight = torch.randn(k, b, *[3] * dims, generator=g) / math.sqrt(3**dims * b)
    grad = torch.randn(n, k, *sides, generator=g)
    convolution: Callable[..., Tensor] = F.conv2d if dims == 2 else F.conv3d
    memory_format = torch.channels_last if dims == 2 else torch.channels_last_3d

    def eager(dtype: torch.dtype) -> list[Tensor]:
        x, w, grad_y = (t.to(dtype, memory_format=memory_format) for t in (a, weight, grad))
        y = convolution(x.requires_grad_(), w.requires_grad_(), padding=1)
        return [y.detach(), *torch.autograd.grad(y, (x, w), grad_y)]

    def nhwc(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous()

    zero, one = torch.zeros(b), torch.ones(b)  # a norm that changes nothing
    y, grad_a, grad_weight = torch.empty(n, *sides, k), torch.empty(n, *sides, b), torch.empty_like(weight)
    CPU.bn_relu_conv3x3_forward(nhwc(a), one, zero, weight, y, None, None)
    CPU.bn_relu_conv3x3_backward(
        nhwc(grad), y, torch.zeros(k), torch.zeros(k), nhwc(a), zero, one, zero, weight, grad_a,
        torch.empty(2, b), grad_weight,
    )  # fmt: skip
    found = zip((y.movedim(-1, 1), grad_a.movedim(-1, 1), grad_weight), (1.0, 1.0, 1.5), strict=True)
    for (ours, most), exact, theirs in zip(found, eager(torch.float64), eager(torch.float32), strict=True):
        assert relative_error([ours], [exact]) < most * relative_error([theirs], [exact])
