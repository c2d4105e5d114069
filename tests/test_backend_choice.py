"""The backend that "auto" takes, and the reasons why others can't run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dense_ext.backends import BACKENDS, PREFERENCE, preference, select
from dense_ext.backends.base import STORAGE_DTYPES
from dense_ext.backends.cpu import instruction_set
from dense_ext.backends.cuda import HAS_CODE, OPS, PRODUCTS, CUDABackend, _gpu_unavailable_reason, _multiply
from dense_ext.backends.table import PRIMITIVES

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MEASURED = {"where": "a machine", "when": "2025-01-31", "torch": "2.11.0"}

SetTable = Callable[..., None]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SetTable]:
    """Replaces the shipped table by one with a single row."""

    def forget() -> None:
        preference._measured.cache_clear()
        select.cache_clear()

    def put(**row: Any) -> None:
        path = tmp_path / "preference.json"
        path.write_text(json.dumps([row]))
        monkeypatch.setattr(preference, "SHIPPED", path)
        forget()

    yield put
    monkeypatch.undo()
    forget()


def row(**changes: Any) -> dict[str, Any]:
    return {
        "primitive": "channel_stats", "on": instruction_set(), "dtype": "float32", "order": ["reference"],
        "measured": MEASURED, **changes,
    }  # fmt: skip


def test_shipped_table() -> None:
    rows = json.loads(preference.SHIPPED.read_text())
    assert len({(r["primitive"], r["on"], r["dtype"]) for r in rows}) == len(rows)
    for r in rows:
        assert r["primitive"] in PRIMITIVES
        assert getattr(torch, r["dtype"]) in STORAGE_DTYPES
        assert set(r["order"]) <= set(BACKENDS)
        assert r["measured"].keys() == MEASURED.keys()


def test_a_measured_row_decides_for_its_primitive_device_and_dtype(table: SetTable) -> None:
    table(**row())
    assert preference.order("channel_stats", CPU, torch.float32) == ("reference", "cpu", "cuda", "triton")
    assert select("auto", "cpu", torch.float32).table["channel_stats"].name == "reference"
    for primitive, device, dtype in (
        ("bn_gradient", CPU, torch.float32),
        ("channel_stats", GPU, torch.float32),
        ("channel_stats", CPU, torch.float64),
    ):
        assert preference.order(primitive, device, dtype) == PREFERENCE


def test_the_users_own_table_comes_first(
    table: SetTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(**row())
    own = tmp_path / "own.json"
    monkeypatch.setenv(preference.ENVIRONMENT_VARIABLE, str(own))
    preference.write_rows(own, [row(order=["cpu"])])
    assert preference.order("channel_stats", CPU, torch.float32)[0] == "cpu"


@pytest.mark.parametrize("content", ["not JSON", "7", '[{"order": ["cpu"]}]', '[{"order": ["gpu"]}]'])
def test_a_table_that_is_none_is_an_error_that_names_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json is not a table of orders of backends"):
        preference.write_rows(path, [row()])
    assert path.read_text() == content


@pytest.mark.parametrize(("hip", "architecture"), [(None, "sm_90"), ("6.4", "gfx942")], ids=["nvidia", "amd"])
def test_a_gpu_is_identified_by_its_architecture(
    hip: str | None, architecture: str, table: SetTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        major, minor, gcnArchName = 9, 0, "gfx942:sramecc+:xnack-"  # noqa: N815

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    table(**row(on=architecture, dtype="bfloat16", order=["cuda"]))
    assert preference.order("channel_stats", GPU, torch.bfloat16)[0] == "cuda"


# --- the CUDA backend --------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CUDABackend]:
    """A CUDA backend that behaves as if its library were loaded."""
    backend = CUDABackend()
    monkeypatch.setattr(backend.library, "reason", None)
    monkeypatch.setitem(backend.ops, HAS_CODE, lambda device: True)
    _gpu_unavailable_reason.cache_clear()
    yield backend
    _gpu_unavailable_reason.cache_clear()


def test_cuda_without_its_library(tmp_path: Path) -> None:
    backend = CUDABackend(tmp_path / "_cuda.so", "nothing")
    reason = backend.unavailable_reason("channel_stats", GPU, torch.float32)
    assert reason == str(backend.library)
    assert f"_cuda.so is not in {tmp_path}" in reason
    with pytest.raises(RuntimeError, match="bn_relu_conv1x1_forward: the CUDA library is not built"):
        backend.bn_relu_conv1x1_forward(*[torch.ones(1)] * 7)


def test_cuda_library_that_is_not_a_library(tmp_path: Path) -> None:
    path = tmp_path / "_cuda.so"
    path.write_text("not a library")
    reason = CUDABackend(path, "nothing").unavailable_reason("channel_stats", GPU, torch.float32)
    assert reason is not None
    assert reason.startswith("_cuda.so can't be loaded: ")


def test_cuda_runs_on_supported_devices_and_dtypes(
    cuda: CUDABackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
        _gpu_unavailable_reason.cache_clear()
        return cuda.unavailable_reason("channel_stats", device, dtype)

    assert cuda.unavailable_reason("convolution", GPU, torch.float32) == "there is no primitive 'convolution'"
    assert reason(CPU) == "runs on cuda, not on cpu"
    assert "dtype torch.float64 is not one of torch.float32" in str(reason(GPU, torch.float64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason(GPU) == "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert reason(GPU) == "needs compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert reason(GPU) is None
    monkeypatch.setitem(cuda.ops, HAS_CODE, lambda device: device != 1)
    assert reason(torch.device("cuda:0")) is None
    assert "TORCH_CUDA_ARCH_LIST containing 9.0" in str(reason(torch.device("cuda:1")))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in str(reason(GPU))


def test_an_emulated_gpu_has_tensors_on_the_cpu(cuda: CUDABackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_type", "cpu")
    assert cuda.unavailable_reason("channel_stats", CPU, torch.bfloat16) is None


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_round_to_tf32_where_pytorch_would(allowed: bool, dtype: torch.dtype) -> None:
    told = []
    x = torch.ones(1, dtype=dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        _multiply(lambda *args, tf32: told.append(tf32), x, x)
        _multiply(lambda tf32, **kwargs: told.append(tf32), weight=x, x=x)
    assert told == [allowed and dtype == torch.float32] * 2


def test_only_products_take_the_tf32_argument(cuda: CUDABackend) -> None:
    if cuda.library.path is None:
        pytest.skip(str(cuda.library))
    schemas = {name: [a.name for a in cuda.library.op(name)._schema.arguments] for name in OPS}
    assert [name for name in OPS if "tf32" in schemas[name]] == list(PRODUCTS)
