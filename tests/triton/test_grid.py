"""Grids with more tiles than one axis can have."""

from __future__ import annotations

import pytest
import torch

from dense_ext.backends import BACKENDS
from dense_ext.backends.triton import launch

from ..primitives.harness import Maker
from ..primitives.test_bn_relu_pool_conv1x1 import backward_case, forward_case


@pytest.mark.parametrize("tiles", [0, 1, 65535, 65536, 10**6, 2**26])
def test_two_axes_hold_all_tiles_and_hardly_more(tiles: int) -> None:
    columns, rows = launch.two_axes(tiles)
    assert max(columns, rows) <= 65535
    assert tiles <= columns * rows < tiles + rows + (tiles == 0)


@pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("make", [forward_case, backward_case])
def test_transition_on_two_axes(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    case = make(Maker(torch.float32, torch.device("cpu")), (3, 26, 22, 9, 7))
    expected = case.copy().run(BACKENDS["triton"])
    monkeypatch.setattr(launch, "MAX_ON_AXIS", 3)
    launch.forget_plans()
    found = case.run(BACKENDS["triton"])
    launch.forget_plans()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
