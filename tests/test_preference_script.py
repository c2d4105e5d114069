"""benchmarks/preference.py: turns measured times into the order in which backends are tried."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dense_ext.benchmark.results import Measurement, Results


@pytest.fixture
def script(benchmark_script: Callable[[str], Any]) -> Any:
    """The script as a module."""
    return benchmark_script("preference")


def results(times: dict[str, list[float]]) -> Results:
    """The suite's results: a median time for each backend and shape."""
    rows = [
        Measurement(
            {"primitive": "channel_stats", "dtype": "bfloat16", "where": "layer 1", "shape": str(i)},
            peer,
            seconds=[9.0, seconds, 0.0],
        )
        for peer, of_shapes in times.items()
        for i, seconds in enumerate(of_shapes)
    ]
    gpu = {"name": "a GPU", "compute_capability": "9.0"}
    machine = {"gpu": gpu, "cpu": "a CPU", "cpu_capability": "AVX2"}
    date, versions = "2025-01-31T12:00:00+00:00", {"torch": "2.11.0"}
    return Results("primitives", date, machine, versions, None, {}, rows=rows)


def test_the_fastest_over_all_shapes_comes_first(script: Any) -> None:
    measured = [results({"triton": [1.0, 4.0], "aten": [0.1, 0.1]}), results({"cuda": [3.0, 1.0]})]
    (row,) = script.measured_rows(measured)
    assert row["order"] == ["cuda", "triton"]
    assert (row["primitive"], row["on"], row["dtype"]) == ("channel_stats", "sm_90", "bfloat16")
    assert row["measured"] == {"where": "a GPU", "when": "2025-01-31", "torch": "2.11.0"}


def test_a_cpu_is_named_by_its_instruction_set(script: Any) -> None:
    measured = results({"cpu": [1.0], "reference": [2.0]})
    measured.machine["gpu"] = None
    (row,) = script.measured_rows([measured])
    assert (row["on"], row["order"], row["measured"]["where"]) == ("AVX2", ["cpu", "reference"], "a CPU")


def test_backends_are_compared_on_the_shapes_that_all_of_them_ran(script: Any) -> None:
    assert script.measured_rows([results({"cuda": [1.0]})]) == []
    (row,) = script.measured_rows([results({"cuda": [2.0, 0.1], "triton": [1.0]})])
    assert row["order"] == ["triton", "cuda"]


def test_results_of_two_machines_are_not_mixed(script: Any) -> None:
    other = results({"triton": [1.0]})
    other.machine["gpu"]["name"] = "another GPU"
    with pytest.raises(SystemExit, match="different machines"):
        script.measured_rows([results({"cuda": [1.0]}), other])


def test_a_new_row_takes_an_old_ones_place(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "preference.json"
    table.write_text("[]")
    for times in ({"cuda": [1.0], "triton": [2.0]}, {"cuda": [2.0], "triton": [1.0]}):
        monkeypatch.setattr(script, "read_results", lambda path, times=times: results(times))
        monkeypatch.setattr(sys, "argv", ["preference.py", "primitives.json", "--table", str(table)])
        script.main()
    (row,) = json.loads(table.read_text())
    assert row["order"] == ["triton", "cuda"]
