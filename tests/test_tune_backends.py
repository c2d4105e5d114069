"""``dense-ext tune --backends``: measured times become the order in which "auto" tries the backends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torchvision")

from dense_ext.backends import preference
from dense_ext.backends.cpu import instruction_set
from dense_ext.backends.table import PRIMITIVES
from dense_ext.benchmark import timing
from dense_ext.benchmark.errors import UsageError
from dense_ext.benchmark.results import Measurement, Results, write_json
from dense_ext.cli import main
from dense_ext.tuning.order import measured_rows


def results(times: dict[str, list[float]], gpu: str | None = "a GPU") -> Results:
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
    found = {"name": gpu, "compute_capability": "9.0"} if gpu else None
    machine = {"gpu": found, "cpu": "a CPU", "cpu_capability": "AVX2"}
    date, versions = "2025-01-31T12:00:00+00:00", {"torch": "2.11.0"}
    return Results("primitives", date, machine, versions, None, {}, interrupted=False, rows=rows)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own table, which does not exist yet."""
    path = tmp_path / "own" / "preference.json"
    monkeypatch.setenv(preference.ENVIRONMENT_VARIABLE, str(path))
    return path


def test_the_fastest_over_all_shapes_comes_first() -> None:
    measured = [results({"triton": [1.0, 4.0], "aten": [0.1, 0.1]}), results({"cuda": [3.0, 1.0]})]
    (row,) = measured_rows(measured)
    assert row["order"] == ["cuda", "triton"]
    assert (row["primitive"], row["on"], row["dtype"]) == ("channel_stats", "sm_90", "bfloat16")
    assert row["measured"] == {"where": "a GPU", "when": "2025-01-31", "torch": "2.11.0"}


def test_a_cpu_is_named_by_its_instruction_set() -> None:
    (row,) = measured_rows([results({"cpu": [1.0], "reference": [2.0]}, gpu=None)])
    assert (row["on"], row["order"], row["measured"]["where"]) == ("AVX2", ["cpu", "reference"], "a CPU")


def test_backends_are_compared_on_the_shapes_that_all_of_them_ran() -> None:
    assert measured_rows([results({"cuda": [1.0]})]) == []
    (row,) = measured_rows([results({"cuda": [2.0, 0.1], "triton": [1.0]})])
    assert row["order"] == ["triton", "cuda"]


def test_results_of_two_machines_or_of_another_suite_are_refused() -> None:
    both = [results({"cuda": [1.0]}), results({"triton": [1.0]}, "another GPU")]
    with pytest.raises(UsageError, match="different machines"):
        measured_rows(both)
    both[0].kind = "step"
    with pytest.raises(UsageError, match="from the suite primitives, not step"):
        measured_rows(both[:1])


def test_result_files_fill_the_table(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new row takes an old one's place."""
    for times in ({"cuda": [1.0], "triton": [2.0]}, {"cuda": [2.0], "triton": [1.0]}):
        files = [str(tmp_path / f"{backend}.json") for backend in times]
        for file, (backend, seconds) in zip(files, times.items(), strict=True):
            write_json(Path(file), results({backend: seconds}))
        assert main(["tune", "--backends", "--from", files[0], "--from", files[1]]) == 0
    assert "triton, cuda" in capsys.readouterr().out
    (row,) = json.loads(own.read_text())
    assert row["order"] == ["triton", "cuda"]


@pytest.mark.usefixtures("tiny_model", "one_thread", "known_rates")
def test_measured_here(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny", "--size", "8", "--batch", "1", "--dtype", "float32", "--device", "cpu"]
    assert main(["tune", "--backends", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = json.loads(own.read_text())
    assert found == {"table": str(own), "interrupted": False, "rows": found["rows"]}
    assert sorted(map(str, found["rows"])) == sorted(map(str, rows))
    # A network for small images has no stem, and one with bottlenecks does not sum over layers.
    assert {row["primitive"] for row in rows} < set(PRIMITIVES)
    for row in rows:
        assert (row["on"], row["dtype"]) == (instruction_set(), "float32")
        assert sorted(row["order"]) == ["cpu", "reference"]


@pytest.mark.usefixtures("tiny_model", "one_thread", "known_rates")
def test_ctrl_c_leaves_the_table_as_it_was(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*of: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timing.ColdTimer, "samples", interrupted)
    assert main(["tune", "--backends", "--model", "tiny", "--size", "8", "--device", "cpu"]) == 130
    assert not own.exists()
    assert "wrote nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "results.json"], "--from needs --backends"),
        (["--dtype", "float32,bfloat16"], "--dtype takes one dtype without --backends"),
        (["--backends", "--from", "missing.json"], "missing.json can't be read"),
        (["--backends", "--dtype", "int8"], "--dtype must be one of float32, "),
        (["--backends", "--table", "."], ". is a folder"),
    ],
)
def test_bad_options(options: list[str], message: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *options]) == 2
    assert message in capsys.readouterr().err
    assert not own.exists()
