"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import dense_ext
from dense_ext.backends.triton import configs

from .backends import put_in_place

ROOT = Path(__file__).resolve().parent.parent
AVAILABLE = dense_ext.available_backends("cpu")

DEVICES = ("cpu", "cuda", "emulator")

# The marks of tests that usually run in few combinations of their parameters, those of fixtures included.
MARKS = {"each_value": "value of each parameter", "each_pair": "pair of two parameters' values"}

# For tests/test_campaign.py: by default a few cases, always the same; with `make fuzz`, many.
_ANY = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=60, derandomize=True, **_ANY)
settings.register_profile("fuzz", print_blob=True, **_ANY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


def pytest_addoption(parser: pytest.Parser) -> None:
    where = "where tests/primitives and tests/gpu run; in the emulator it is the CUDA kernels, on the CPU"
    parser.addoption("--device", default="cpu", choices=DEVICES, help=where)
    every = f"run every combination of parameters, also of tests marked {' or '.join(MARKS)}"
    parser.addoption("--exhaustive", action="store_true", help=every)


def pytest_configure(config: pytest.Config) -> None:
    for mark, what in MARKS.items():
        text = f"without --exhaustive, run few combinations of parameters, in which each {what} occurs"
        config.addinivalue_line("markers", f"{mark}: {text}")
    if config.getoption("--device") == "emulator":
        from .emulator import emulator

        put_in_place(emulator().backend)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the combinations of parameters that ``MARKS`` and ``--exhaustive`` say."""
    if config.getoption("--exhaustive"):
        return
    tests: dict[tuple[object, str, int], list[pytest.Function]] = {}
    for item in items:
        for size, mark in enumerate(MARKS, 1):
            if isinstance(item, pytest.Function) and item.get_closest_marker(mark):
                tests.setdefault((item.parent, item.originalname, size), []).append(item)
    left_out: set[pytest.Item] = set()
    for (_, _, size), combinations in tests.items():
        # By identity, since some values cannot be hashed; combinations share their values.
        rows = [{k: id(value) for k, value in item.callspec.params.items()} for item in combinations]
        chosen = covering(rows, size)
        left_out.update(item for i, item in enumerate(combinations) if i not in chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of later collections of garbage, which would take 0.2 s each."""
    gc.collect()
    gc.freeze()


def covering(rows: Sequence[dict[str, int]], size: int) -> set[int]:
    """Few of the rows, in which all values occur that occur in any; or all pairs of values, for size 2.

    Of rows that add equally many, it takes the first of those whose values have been taken least often.
    """
    parts = [set(itertools.combinations(row.items(), min(size, len(row)))) for row in rows]
    missing = set().union(*parts)
    taken: Counter[tuple[str, int]] = Counter()
    chosen = set()
    while missing:
        uses = [sum(taken[value] for value in row.items()) for row in rows]
        best = max(range(len(rows)), key=lambda i: (len(parts[i] & missing), -uses[i]))
        chosen.add(best)
        missing -= parts[best]
        taken.update(rows[best].items())
    return chosen


def device_of(config: pytest.Config) -> torch.device:
    """The tensors' device."""
    device = config.getoption("--device")
    return torch.device("cpu" if device == "emulator" else device)


def checked_backends(config: pytest.Config) -> list[str]:
    """The backends to compare with the reference in this run; other runs compare the others."""
    device = config.getoption("--device")
    if device == "cpu":
        return ["triton"] if os.environ.get("TRITON_INTERPRET") else ["cpu"]
    return ["cuda"] if device == "emulator" else ["triton", "cuda"]


@pytest.fixture(autouse=True)
def schedule(request: pytest.FixtureRequest) -> None:
    """In the emulator, seed the order of the warps with the test's name."""
    if request.config.getoption("--device") == "emulator":
        from .emulator import emulator

        emulator().reset(seed=zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill uninitialised tensors with NaN, so that reading them is noticed; fix the seed."""
    torch.manual_seed(0)
    # On a GPU some of eager's own operators have no deterministic version, so only warn there.
    on_gpu = device_of(request.config).type == "cuda"
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend that runs here; it is the forced backend during the test."""
    with dense_ext.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["none", "bottleneck", "block"])
def recompute(request: pytest.FixtureRequest) -> str:
    """Each recompute policy."""
    return str(request.param)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: for small tensors, more threads are slower, especially on a busy machine."""
    with _threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Use two threads, where ``make test`` would use one."""
    with _threads(2):
        yield


@pytest.fixture
def benchmark_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a program of ``benchmarks/`` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> Any:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the user's own table of Triton configurations; the file does not exist yet."""
    path = tmp_path / "own" / "triton.json"
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(path))
    configs.forget_tables()
    return path


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a model named "tiny" to dense_ext's models."""

    def tiny(**options: Any) -> dense_ext.DenseNet:
        return dense_ext.DenseNet(**{
            "growth_rate": 8, "block_config": (3, 2), "num_init_features": 16, "small_inputs": True,
            "num_classes": 10, **options,
        })  # fmt: skip

    monkeypatch.setitem(dense_ext.models.MODELS, "tiny", tiny)


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares suites the seconds in which they find out what the machine copies and multiplies."""
    monkeypatch.setattr("dense_ext.benchmark.suites.base.matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("dense_ext.benchmark.suites.base.copy_bandwidth", lambda device: 1e9)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """Records a measurement's progress bar: its length, then its texts."""
    from dense_ext.cli import output

    shown: list[int | str] = []

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[str], None]]:
        shown.append(total)
        yield shown.append

    monkeypatch.setattr(output, "progress", bar)
    return shown


@pytest.fixture
def compiled_fast() -> Iterator[None]:
    """Inductor compiles without optimisation and vectors, in half the time or less.

    It takes the processor's word for its instructions. Otherwise it would first compile and load a program
    for each kind of them, once per process.
    """
    changes = {
        "aot_inductor.debug_compile": True,
        "aot_inductor.precompile_headers": False,
        "cpp.simdlen": 1,
        "cpp.vec_isa_ok": True,
    }
    with torch._inductor.config.patch(changes):
        yield
