"""Fixtures of the primitives' tests: every backend but the reference, every dtype it runs."""

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
    """The backends that run on ``--device``; the cases and sizes of a PrimitiveTests class."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", checked_backends(metafunc.config), indirect=True)
    for name, values in (("case", "cases"), ("optional_case", "optional_cases"), ("size", "sizes")):
        if name in metafunc.fixturenames and hasattr(metafunc.cls, values):
            metafunc.parametrize(name, getattr(metafunc.cls, values), ids=_id)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors live."""
    return device_of(request.config)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products in float32, not in tf32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that is checked against the reference."""
    return BACKENDS[request.param]


@pytest.fixture(params=STORAGE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each storage dtype."""
    dtype: torch.dtype = request.param
    return dtype


@pytest.fixture
def maker(backend: Backend, device: torch.device) -> Callable[..., Maker]:
    """Makes a Maker for a dtype, or skips with the reason why the backend doesn't run it."""

    def make(dtype: torch.dtype, **options: Any) -> Maker:
        for primitive in PRIMITIVES:
            if reason := backend.unavailable_reason(primitive, device, dtype):
                pytest.skip(f"{backend.name}: {reason}")
        return Maker(dtype, device, **options)

    return make


@pytest.fixture(params=[1, 7], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest, backend: Backend, device: torch.device) -> Iterator[int]:
    """One thread, and more than there are cores or, often, tiles; in the emulator multiprocessors."""
    if request.param > 1 and (backend.name == "triton" or device.type != "cpu"):
        pytest.skip("PyTorch's threads do not run these kernels")
    if request.config.getoption("--device") == "emulator":
        emulator().settings.multiprocessors = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _id(value: object) -> str:
    function = getattr(value, "func", value)  # of a functools.partial
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(function.__name__)
