"""Tensors whose last pixels begin beyond 2^31 elements; memory is reserved, but few pages are touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense_ext.backends import BACKENDS

from ..primitives.common import MakeCase
from ..primitives.groups import GROUPS
from ..primitives.harness import Maker, assert_close, tolerance

STRIDE = 2**29 + 8  # elements from one pixel to the next; the sixth begins beyond 2^31
CASES = [(case, (1, 2, 3, 16, 8)[: len(group.small)]) for group in GROUPS for case in group.cases]


class FarApart(Maker):
    """Makes activations and gradients whose pixels are far apart in memory."""

    def _slice(self, values: Tensor) -> Tensor:
        n, h, w, _ = values.shape
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            room = torch.empty(n * h * w * STRIDE, dtype=self.dtype)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        strides = (h * w * STRIDE, w * STRIDE, STRIDE, 1)
        return room.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(("make", "size"), CASES)
def test_offsets_beyond_32_bits(
    device: torch.device, backend: str, make: MakeCase, size: tuple[int, ...]
) -> None:
    if device.type == "cuda":
        pytest.skip("on a GPU it would need the memory")
    case = make(FarApart(torch.float16, device), size)
    expected = case.copy(torch.float64).run(BACKENDS["reference"])
    found = case.run(BACKENDS[backend])
    for output, length in case.lengths.items():
        tol = tolerance(found[output].dtype, length, torch.float16)
        assert_close(f"{case.primitive} {output}", found[output], expected[output], tol)
