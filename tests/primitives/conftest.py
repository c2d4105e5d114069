"""Fixtures of the primitives' tests: every backend except the reference, in every dtype that it supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dense_ext.backends import BACKENDS
from dense_ext.backends.base import PRIMITIVES, STORAGE_DTYPES, Backend

from ..conftest import checked_backends, device_of
from ..emulator import emulator
from .harness import Maker


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize with the backends that run on ``--device``, and with a class's cases and sizes."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", checked_backends(metafunc.config), indirect=True)
    for name, values in (("case", "cases"), ("optional_case", "optional_cases"), ("size", "sizes")):
        if name in metafunc.fixturenames and hasattr(metafunc.cls, values):
            metafunc.parametrize(name, getattr(metafunc.cls, values), ids=_id)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The tensors' device."""
    return device_of(request.config)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Compute float32 products in float32, not in tf32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that is compared with the reference."""
    return BACKENDS[request.param]


@pytest.fixture(params=STORAGE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each storage dtype."""
    dtype: torch.dtype = request.param
    return dtype


@pytest.fixture
def maker(backend: Backend, device: torch.device) -> Callable[..., Maker]:
    """A function that makes a Maker for a dtype, or skips the test with the backend's reason."""

    def make(dtype: torch.dtype, **options: Any) -> Maker:
        for primitive in PRIMITIVES:
            if reason := backend.unavailable_reason(primitive, device, dtype):
                pytest.skip(f"{backend.name}: {reason}")
        return Maker(dtype, device, **options)

    return make


@pytest.fixture(params=[1, 7], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest, backend: Backend, device: torch.device) -> Iterator[int]:
    """One thread, and more threads than cores (often more than tiles); in the emulator, multiprocessors."""
    if request.param > 1 and (backend.name == "triton" or device.type != "cpu"):
        pytest.skip("PyTorch's threads do not run these kernels")
    if request.config.getoption("--device") == "emulator":
        emulator().settings.multiprocessors = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _id(value: object) -> str:
    function = getattr(value, "func", value)  # unwraps a functools.partial
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(function.__name__)
