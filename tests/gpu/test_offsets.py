"""Tensors whose last pixels begin beyond 2^31 elements: memory reserved, and only a few pages touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dense_ext
from dense_ext.backends.base import Backend

from ..conftest import checked_backends, device_of
from ..primitives import (
    test_affine_gradient,
    test_bn_relu_conv1x1,
    test_bn_relu_conv3x3,
    test_bn_relu_maxpool,
    test_bn_relu_pool_conv1x1,
    test_channel_stats,
)
from ..primitives.common import MakeCase
from ..primitives.harness import Maker, assert_close, tolerance

STRIDE = 2**29 + 8  # elements from one pixel to the next: the sixth begins beyond 2^31
CASES: list[tuple[MakeCase, tuple[int, ...]]] = [
    *((case, (1, 1, 6, 16)) for case in test_affine_gradient.TestAffineGradient.cases),
    *((case, (1, 1, 6, 16)) for case in test_channel_stats.TestChannelStats.cases),
    *((case, (1, 1, 6, 16, 8)) for case in test_bn_relu_conv1x1.TestBnReluConv1x1.cases),
    *((case, (1, 1, 6, 16, 8)) for case in test_bn_relu_conv3x3.TestBnReluConv3x3.cases),
    *((case, (1, 2, 3, 16)) for case in test_bn_relu_maxpool.TestBnReluMaxpool.cases),
    *((case, (1, 2, 3, 16, 8)) for case in test_bn_relu_pool_conv1x1.TestBnReluPoolConv1x1.cases),
]


class FarApart(Maker):
    """Makes activations and gradients with almost nothing but room between their pixels."""

    def _slice(self, values: Tensor) -> Tensor:
        n, h, w, _ = values.shape
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            room = torch.empty(n * h * w * STRIDE, dtype=self.dtype)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        strides = (h * w * STRIDE, w * STRIDE, STRIDE, 1)
        return room.as_strided(values.shape, strides).copy_(values)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The GPU backends that run on ``--device``."""
    names = [name for name in checked_backends(metafunc.config) if name in ("cuda", "triton")]
    metafunc.parametrize("name", names)


@pytest.mark.parametrize(("make", "size"), CASES)
def test_offsets_beyond_32_bits(
    request: pytest.FixtureRequest, name: str, make: MakeCase, size: tuple[int, ...]
) -> None:
    if device_of(request.config).type == "cuda":
        pytest.skip("on a GPU it would need the memory")
    backend: Backend = dense_ext.backends.BACKENDS[name]
    case = make(FarApart(torch.float16, torch.device("cpu")), size)
    expected = case.copy(torch.float64).run(dense_ext.backends.BACKENDS["reference"])
    found = case.run(backend)
    for output, length in case.lengths.items():
        tol = tolerance(found[output].dtype, length, torch.float16)
        assert_close(f"{case.primitive} {output}", found[output], expected[output], tol)
