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

from dense_ext.benchmark import timing
from dense_ext.benchmark.suites import quick, speed

pytestmark = pytest.mark.usefixtures("tiny_model", "one_thread", "known_rates")

OPTIONS = ["--model", "tiny", "--size", "16", "--batch", "2", "--rounds", "3", "--recompute", "none"]


def run(suite: str, out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["bench", "--suite", suite, *OPTIONS, *arguments, "--out", str(out)]) == code
    return json.loads((out / f"{suite}.json").read_text())


def fail_when_timed(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the sample of this number fail; each of the others takes a second."""
    samples = itertools.count()

    def seconds(*arguments: Any) -> float:
        if next(samples) == number:
            raise RuntimeError("too hot")
        return 1.0

    monkeypatch.setattr(timing, "seconds_per_call", seconds)


def test_a_defect_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(speed, "interleave", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run("quick", tmp_path, "--peers", "eager")
    results = json.loads((tmp_path / "quick.json").read_text())
    assert results["interrupted"]
    assert [row["peer"] for row in results["rows"] if row["measures"]] == ["eager", "dense_ext-none"]


def test_a_peer_that_fails_when_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_when_timed(monkeypatch, 3)  # the first sample of the second round, which begins with the second peer
    rows = run("quick", tmp_path, "--no-depth", "--peers", "eager,eager-cl")["rows"]
    assert {row["peer"]: row["failure"] for row in rows} == {
        "eager": None, "eager-cl": "RuntimeError: too hot", "dense_ext-none": None,
    }  # fmt: skip
    assert [len(row["seconds"]) for row in rows] == [3, 0, 3]
    assert all(row["measures"]["peak_bytes"] > 0 for row in rows)


def test_a_peer_that_fails_in_a_deep_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_one = quick.block_bytes

    def block_bytes(peer: Any, layers: int, *rest: Any) -> int:
        if peer.ours and layers == 50:
            raise RuntimeError("too deep")
        return of_one(peer, layers, *rest)

    monkeypatch.setattr(quick, "block_bytes", block_bytes)
    monkeypatch.setattr(quick, "DEPTHS", (25, 50))
    results = run("quick", tmp_path, "--peers", "eager")
    found = {(row["peer"], row["case"].get("layers")): row for row in results["rows"]}
    assert found["dense_ext-none", 50]["failure"] == "RuntimeError: too deep"
    assert all(found["eager", layers]["measures"]["saved_bytes"] > 0 for layers in (25, 50))
    assert len(found["dense_ext-none", None]["seconds"]) == 3
    assert not results["interrupted"]


def test_a_row_that_fails_when_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
