"""Fixtures of the tests that run on the GPU backends; see ``--device``."""

from __future__ import annotations

import pytest
import torch

import dense_ext

from ..conftest import checked_backends, device_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize with the GPU backends that run on ``--device``."""
    if "backend" in metafunc.fixturenames:
        names = [name for name in checked_backends(metafunc.config) if name in ("cuda", "triton")]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each GPU backend."""
    return str(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: str) -> torch.device:
    """The tensors' device, if the backend runs there."""
    device = device_of(request.config)
    if reason := dense_ext.backends.unavailable_reasons(device)[backend]:
        pytest.skip(f"{backend}: {reason}")
    return device
