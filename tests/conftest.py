"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dense_ext

BACKENDS = dense_ext.available_backends("cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests/primitives and tests/triton run: cpu, cuda")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every uninitialised tensor holds NaN, so that reading one shows; the seed is fixed."""
    torch.manual_seed(0)
    # On a GPU some of eager's own operators have no deterministic form: there, a warning.
    on_gpu = torch.device(request.config.getoption("--device")).type == "cuda"
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend that runs here, in force during the test."""
    with dense_ext.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["none", "bottleneck", "block"])
def recompute(request: pytest.FixtureRequest) -> str:
    """Each recompute policy."""
    return str(request.param)
