"""Fixtures of the primitives' tests: every backend except the reference, in every dtype that it supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dense_ext.backends import BACKENDS
from dense_ext.backends.base import STORAGE_DTYPES, Backend
from dense_ext.backends.table import PRIMITIVES

from ..conftest import checked_backends, device_of
from ..emulator import emulator
from .harness import Maker


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize with the backends that run on ``--device``, and with a class's cases and sizes."""
    backends = checked_backends(metafunc.config)
    if {"backend", "case", "dtype", "size"} <= set(metafunc.fixturenames) and hasattr(metafunc.cls, "sizes"):
        rows = [
            (backend, case, types[n % len(types)], size)
            for backend in backends
            for m, case in enumerate(metafunc.cls.cases)
            for n, size in enumerate(metafunc.cls.sizes)
            for types in _in_turn(_widths(backend, metafunc.config), m + n, metafunc.config)
        ]
        names = ("backend", "case", "dtype", "size")
        metafunc.parametrize(names, rows, indirect=["backend"], ids=_id)
        return
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends, indirect=True)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", STORAGE_DTYPES, ids=_id)
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


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether to leave out large sizes, which take the interpreter seconds; others have several tiles too."""
    return _interpreted(request.config) and not request.config.getoption("--exhaustive")


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


def _widths(backend: str, config: pytest.Config) -> list[list[torch.dtype]]:
    """The storage dtypes, those of equal width together: they share a kernel's sizes.

    Those that the backend does not support are left out, unless it supports none, which is a skip.
    """
    device = device_of(config)
    found = [d for d in STORAGE_DTYPES if not BACKENDS[backend].unavailable_reason(PRIMITIVES[0], device, d)]
    widths: dict[int, list[torch.dtype]] = {}
    for dtype in found or STORAGE_DTYPES:
        widths.setdefault(dtype.itemsize, []).append(dtype)
    return list(widths.values())


def _interpreted(config: pytest.Config) -> bool:
    return checked_backends(config) == ["triton"]


def _in_turn(widths: list[list[torch.dtype]], number: int, config: pytest.Config) -> list[list[torch.dtype]]:
    """All widths, but in the interpreter only one, which the sizes and cases take in turn."""
    if _interpreted(config) and not config.getoption("--exhaustive"):
        return [widths[number % len(widths)]]
    return widths


def _id(value: object) -> str:
    if isinstance(value, (str, torch.dtype)):
        return str(value).removeprefix("torch.")
    function = getattr(value, "func", value)  # unwraps a functools.partial
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(function.__name__)
