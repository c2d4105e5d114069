"""Fixtures of the primitives' tests: every backend but the reference, every dtype it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from dense_ext.backends import BACKENDS
from dense_ext.backends.base import PRIMITIVES, STORAGE_DTYPES, Backend

from .harness import Maker


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The backends that run on ``--device``; the cases and sizes of a PrimitiveTests class."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _checked(metafunc.config.getoption("--device")), indirect=True)
    for name, values in (("case", "cases"), ("optional_case", "optional_cases"), ("size", "sizes")):
        if name in metafunc.fixturenames and hasattr(metafunc.cls, values):
            metafunc.parametrize(name, getattr(metafunc.cls, values), ids=_id)


def _checked(device: str) -> list[str]:
    """The backend to compare with the reference: one a run, so that none repeats another run's work."""
    on_gpu = torch.device(device).type == "cuda"
    return ["triton"] if on_gpu or os.environ.get("TRITON_INTERPRET") else ["cpu"]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors live: ``--device``."""
    return torch.device(request.config.getoption("--device"))


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

    def make(dtype: torch.dtype, special: bool = False) -> Maker:
        for primitive in PRIMITIVES:
            if reason := backend.can_run(primitive, device, dtype):
                pytest.skip(f"{backend.name}: {reason}")
        return Maker(dtype, device, special)

    return make


@pytest.fixture(params=[1, 7], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, and more than there are cores or, often, tiles."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _id(value: object) -> str:
    function = getattr(value, "func", value)  # of a functools.partial
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(function.__name__)
