"""A failure in the middle of a benchmark loses only the figures of the row that failed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from dense_ext.cli import main

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from dense_ext.benchmark import bench, depth, timing

pytestmark = pytest.mark.usefixtures("tiny_model", "one_thread")

OPTIONS = ["--model", "tiny", "--size", "16", "--batch", "2", "--rounds", "3", "--recompute", "none"]
FOR_MEMORY = ["--memory-size", "16", "--memory-batch", "2"]


def run(suite: str, out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["bench", "--suite", suite, *OPTIONS, *arguments, "--out", str(out)]) == code
    return json.loads((out / ("bench.json" if suite == "quick" else f"{suite}.json")).read_text())


def fail_when_timed(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the sample of this number fail; each of the others takes a second."""
    samples = itertools.count()

    def seconds(*arguments: Any) -> float:
        if next(samples) == number:
            raise RuntimeError("too hot")
        return 1.0

    monkeypatch.setattr(timing, "seconds_per_call", seconds)


def test_a_defect_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: bench.Bench) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(bench.Bench, "measure_speed", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run("quick", tmp_path, *FOR_MEMORY, "--peers", "eager")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["interrupted"]
    assert set(results["memory"]) == {"eager", "dense_ext-none"}


def test_a_peer_that_fails_when_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    fail_when_timed(monkeypatch, 3)  # the first sample of the second round, which begins with the second peer
    results = run("quick", tmp_path, *FOR_MEMORY, "--no-depth", "--peers", "eager,eager-cl")
    failures = {name: peer.get("failure") for name, peer in results["peers"].items()}
    assert failures == {"eager": None, "eager-cl": "RuntimeError: too hot", "dense_ext-none": None}
    assert {name: len(samples) for name, samples in results["speed"]["seconds"].items()} == {
        "eager": 3, "eager-cl": 0, "dense_ext-none": 3,
    }  # fmt: skip
    assert results["memory"].keys() == failures.keys()


def test_a_peer_that_fails_in_a_deep_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_one = depth.block_bytes

    def block_bytes(peer: Any, layers: int, *rest: Any) -> int:
        if peer.ours and layers == 50:
            raise RuntimeError("too deep")
        return of_one(peer, layers, *rest)

    monkeypatch.setattr(depth, "block_bytes", block_bytes)
    monkeypatch.setattr(depth, "DEPTHS", (25, 50))
    results = run("quick", tmp_path, *FOR_MEMORY, "--peers", "eager")
    assert results["peers"]["dense_ext-none"]["failure"] == "RuntimeError: too deep"
    assert set(results["depth"]["peers"]) == {"eager"}
    assert len(results["speed"]["seconds"]["dense_ext-none"]) == 3
    assert not results["interrupted"]


def test_a_row_that_fails_when_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense_ext.benchmark.suites.speed.matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("dense_ext.benchmark.suites.speed.copy_bandwidth", lambda device: 1e9)
    fail_when_timed(monkeypatch, 1)
    rows = run("step", tmp_path, "--peers", "eager,eager-cl")["rows"]
    assert [row["failure"] for row in rows] == [None, "RuntimeError: too hot", None]
    assert [len(row["seconds"]) for row in rows] == [3, 0, 3]


@pytest.mark.parametrize("suite", ["step", "inference"])
def test_a_reference_that_cannot_run(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(suite, tmp_path, "--peers", "graph", code=1)["rows"]
    assert "compared with nothing, as no other peer ran" in capsys.readouterr().err
    ours = [row for row in rows if row["peer"] == "dense_ext-none"]
    assert ours
    for row in ours:
        assert row["failure"].startswith("nothing to compare with")
        assert row["seconds"] == []
        assert row["measures"]["peak_bytes"] > 0
