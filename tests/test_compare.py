"""Comparing results: which differences are regressions, and which are noise."""

from __future__ import annotations

import copy
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from dense_ext.benchmark.compare import compare
from dense_ext.benchmark.errors import UsageError
from dense_ext.benchmark.results import Measurement, PeerLabel, Results, read_results
from dense_ext.cli import main

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"cpu": "one", "threads": 2, "gpu": None}


def result(
    median: float, samples: int = 15, seed: int = 0, rows: int = 1, **measures: float | None
) -> Results:
    """A step suite's result with samples within 3 % of a median."""
    generator = random.Random(seed)
    made = []
    for i in range(rows):
        seconds = [median * generator.uniform(0.97, 1.03) for _ in range(samples)]
        made.append(Measurement({"model": f"m{i}"}, "dense_ext-none", None, dict(measures), seconds))
    peers = {"dense_ext-none": PeerLabel("ours", ours=True)}
    return Results("step", "", MACHINE, {"torch": "2.11"}, None, {}, False, peers, made)


def test_slower_beyond_noise() -> None:
    (change,) = compare(result(1.0), result(1.2, seed=1)).changes
    assert (change.measure, change.worse) == ("seconds", True)
    assert change.ratio == pytest.approx(1.2, rel=0.05)


def test_faster_is_no_regression() -> None:
    found = compare(result(1.2), result(1.0, seed=1))
    assert [change.worse for change in found.changes] == [False]
    assert found.regressions == []


def test_noise_is_no_change() -> None:
    assert compare(result(1.0, rows=300), result(1.0, seed=1, rows=300)).changes == []


def test_a_small_difference_is_left_to_what_runs_differ_by() -> None:
    old, new = result(1.0), result(1.04, seed=1)
    assert compare(old, new).changes == []
    assert len(compare(old, new, threshold=0.02).changes) == 1


def with_eager(results: Results, seconds: list[float]) -> Results:
    """The result with an additional row for eager."""
    results.peers["eager"] = PeerLabel("eager", ours=False)
    results.rows.append(Measurement(results.rows[0].case, "eager", seconds=seconds))
    return results


def test_a_slower_machine_is_no_regression() -> None:
    """In every round all peers took 1.5 times as long; relative to them dense_ext took as long as before."""
    old, new = result(1.0), result(1.5, seed=1)
    eager = [1.4 * s for s in result(1.0, seed=2).rows[0].seconds]
    slower = [2.1 * s for s in result(1.0, seed=3).rows[0].seconds]
    found = compare(with_eager(old, eager), with_eager(new, slower))
    assert found.changes == []
    assert any(re.search(r"they take 1\.[45]\d times as long", text) for text in found.differences)


def test_slower_beside_others_on_a_faster_machine() -> None:
    old, new = result(1.0), result(0.9, seed=1)
    eager = result(1.4, seed=2).rows[0].seconds
    (change,) = compare(with_eager(old, eager), with_eager(new, [0.7 * s for s in eager])).regressions
    assert change.measure == "time beside others"
    assert change.ratio == pytest.approx(0.9 / 0.7, rel=0.05)


def test_others_of_other_rounds_are_not_set_beside() -> None:
    eager = result(1.4, seed=2).rows[0].seconds
    (change,) = compare(with_eager(result(1.0), eager), with_eager(result(1.2, seed=1), eager[:-1])).changes
    assert change.measure == "seconds"


def test_too_few_samples_say_nothing() -> None:
    found = compare(result(1.0, samples=3), result(2.0, samples=3))
    assert (found.changes, found.undecided) == ([], 1)


@pytest.mark.parametrize(
    ("measure", "old", "new", "worse"),
    [
        ("saved_bytes", 1000, 1002, True),
        ("saved_bytes", 1002, 1000, False),
        ("saved_bytes", 1000, 1000, None),
        ("peak_bytes", 1000, 1010, None),
        ("peak_bytes", 1000, 1030, True),
        ("largest_batch", 100, 90, True),
        ("largest_batch", 90, 100, False),
        ("relative_error", 1e-7, 1.9e-7, None),
        ("relative_error", 1e-7, 2.1e-7, True),
        ("relative_error", 0.0, 1e-7, True),
        ("flops", 1000, 2000, None),
    ],
)
def test_measures_without_samples(measure: str, old: float, new: float, worse: bool | None) -> None:
    found = compare(result(1.0, **{measure: old}), result(1.0, **{measure: new}))
    assert [change.worse for change in found.changes] == ([] if worse is None else [worse])


def test_an_error_that_is_not_finite_is_worse() -> None:
    old, new = result(1.0, relative_error=1e-7), result(1.0, relative_error=None)
    (change,) = compare(old, new).regressions
    assert (change.measure, change.old, change.new) == ("relative_error", 1e-7, "not finite")
    assert compare(new, new).changes == []


def test_a_row_that_fails_now() -> None:
    old = result(1.0)
    new = copy.deepcopy(old)
    new.rows[0].fail("out of memory")
    (change,) = compare(old, new).regressions
    assert (change.measure, change.new) == ("failure", "out of memory")


@pytest.mark.parametrize("lost", ["row", "samples", "measures"])
def test_what_dense_ext_has_no_more_is_worse(lost: str) -> None:
    old = result(1.0, rows=2, saved_bytes=1000)
    new = copy.deepcopy(old)
    if lost == "row":
        del new.rows[1]
    else:
        getattr(new.rows[1], "seconds" if lost == "samples" else lost).clear()
    (change,) = compare(old, new).regressions
    assert (change.case, change.measure, change.new) == ("model m1", lost, "missing")
    assert compare(new, old).regressions == []
    old.peers["dense_ext-none"] = PeerLabel("other", ours=False)
    assert compare(old, new).regressions == []


def test_a_row_that_had_failed_is_not_missed() -> None:
    old = result(1.0, rows=2)
    old.rows[1].fail("out of memory")
    assert compare(old, result(1.0)).regressions == []


def test_what_else_differs() -> None:
    old, new = result(1.0, rows=2), result(1.0, rows=2)
    new.machine = {**MACHINE, "cpu": "another"}
    new.versions = {"torch": "2.12"}
    new.rows[1].case = {"model": "other"}
    new.interrupted = True
    found = compare(old, new)
    assert found.differences == [
        "new result was interrupted, and lacks what came after",
        "machine's cpu: one, now another",
        "version of torch: 2.11, now 2.12",
    ]
    assert found.only_old == ["model m1: dense_ext-none"]
    assert found.only_new == ["model other: dense_ext-none"]


def test_results_that_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="different kinds: step and memory"):
        compare(result(1.0), replace(result(1.0), kind="memory"))
    with pytest.raises(UsageError, match="no row in common"):
        compare(result(1.0), result(1.0, rows=0))
    models = read_results(ROOT / "benchmarks" / "results" / "family.json")
    with pytest.raises(UsageError, match="dense-ext models has nothing to compare"):
        compare(models, models)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = ROOT / "benchmarks" / "results" / "cpu.json"
    results = json.loads(old.read_text())
    for row in results["rows"]:
        if row["peer"] == "dense_ext-none":
            row["seconds"] = [1.3 * s for s in row["seconds"]]
    new = tmp_path / "new.json"
    new.write_text(json.dumps(results))
    assert main(["bench", "--compare", str(old), str(old)]) == 0
    assert f"{len(results['rows'])} rows compared, 0 measures got worse" in capsys.readouterr().err
    assert main(["bench", "--compare", str(old), str(new)]) == 1
    printed = capsys.readouterr()
    assert "dense_ext-none" in printed.out
    assert "1.300" in printed.out
    assert "is worse than" in printed.err
    assert main(["bench", "--compare", str(old), str(new), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["changes"][0]["peer"] == "dense_ext-none"
    assert main(["bench", "--compare", str(old), str(new), "--threshold", "0.5"]) == 0
    results["rows"] = [row for row in results["rows"] if row["peer"] != "dense_ext-none"]
    new.write_text(json.dumps(results | {"interrupted": True}))
    assert main(["bench", "--compare", str(old), str(new)]) == 1
    assert "the new result was interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "bench"}'])
def test_files_that_are_no_results(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["bench", "--compare", str(path), str(path)]) == 2
    assert "is no result file" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing.json"), "--out", str(tmp_path / "r.html")]) == 2
    assert "can't be read: No such file" in capsys.readouterr().err
