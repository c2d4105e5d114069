"""Fixtures of the tests of the CUDA kernels in the emulator."""

from __future__ import annotations

import pytest

from ..emulator import Emulator, emulator
from ..primitives.conftest import exact_products as exact_products


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Emulator:
    """The emulator; tests change its settings with ``reset``."""
    if request.config.getoption("--device") != "emulator":
        pytest.skip("runs in the emulator (--device emulator)")
    return emulator()
