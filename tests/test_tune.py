"""``dense-ext tune``: what it measures, keeps, prints and refuses; a fake clock replaces the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("triton")

from dense_ext.backends import BACKENDS
from dense_ext.backends.triton import configs, launch
from dense_ext.backends.triton.configs import Config, Row, find_config, read_rows, write_rows
from dense_ext.benchmark.suites.primitives import PrimitiveCase
from dense_ext.cli import main
from dense_ext.tuning import triton as tuning

pytestmark = pytest.mark.usefixtures("tiny_model", "table")

FORWARD, BACKWARD = (("bn_relu_conv3x3_" + name, "sm_90", "16bit", "8x8") for name in ("forward", "backward"))
# The keys of the table that are looked up here.
PLACES = {key[0]: key for key in (FORWARD, BACKWARD)}
TUNE = ["tune", "--model", "tiny", "--size", "16", "--batch", "2"]

Seconds = Callable[[tuple[str, ...], Config], float]


def stages(key: tuple[str, ...], config: Config) -> float:
    """Forward takes a millisecond per stage; backward does not depend on the configuration."""
    return 1e-3 * config.num_stages if key == FORWARD else 1e-3


def exact(config: Config) -> float:
    return 1e-3


class Clock:
    """Replaces the kernels and the GPU: a call takes the seconds given for its configuration.

    Args:
        seconds: a call's duration, by key and configuration.
        error: a call's error, by configuration.
    """

    def __init__(self, seconds: Seconds, error: Callable[[Config], float]) -> None:
        self.seconds, self.error_of = seconds, error
        self.device = torch.device("cpu")
        self.measured: list[tuple[tuple[str, ...], Config]] = []

    def __getattr__(self, primitive: str) -> Callable[[], None]:
        return lambda: self.call(primitive)

    def call(self, primitive: str) -> None:
        self.called = primitive
        if primitive in PLACES and launch.looked_up is not None:
            launch.looked_up.append(PLACES[primitive])

    def error(self, backend: str, case: PrimitiveCase, tensors: object) -> float:
        return self.error_of(find_config(*PLACES[case.primitive]))

    def samples(self, call: Callable[[], None], count: int) -> list[float]:
        call()
        key = PLACES[self.called]
        self.measured.append((key, find_config(*key)))
        return [self.seconds(*self.measured[-1])] * count


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Clock]]:
    """Runs the command with a fake clock; returns the exit code and the clock."""

    def run(seconds: Seconds, *options: str, error: Callable[[Config], float] = exact) -> tuple[int, Clock]:
        clock = Clock(seconds, error)
        monkeypatch.setattr("dense_ext.backends.unavailable_reasons", lambda *where: {"triton": None})
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a clock")
        monkeypatch.setattr(PrimitiveCase, "tensors", lambda *where: {})
        monkeypatch.setitem(BACKENDS, "triton", clock)
        monkeypatch.setattr(tuning, "ColdTimer", lambda device: clock)
        monkeypatch.setattr(tuning, "backend_error", clock.error)
        return main([*TUNE, *options]), clock

    return run


def test_what_is_faster_goes_into_the_table(
    run: Callable[..., tuple[int, Clock]], table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows for other keys stay; a key for which no candidate is faster gets no row."""
    other = Row("channel_stats", "sm_80", "16bit", "1x1", Config({"BLOCK_M": 32}), "measured: before")
    write_rows(table, [other])
    shipped = find_config(*FORWARD)
    code, clock = run(stages, "--json")
    assert code == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "1 of 2 configurations measured got faster; wrote " in printed.err
    forward, backward = found.pop("rows")
    assert found == {
        "model": "tiny", "batch": 2, "size": 16, "dtype": "bfloat16", "table": str(table),
        "interrupted": False,
    }  # fmt: skip
    assert (forward["seconds_before"], forward["seconds"], forward["faster"]) == (
        1e-3 * shipped.num_stages, 1e-3, True,
    )  # fmt: skip
    assert forward["config"]["num_stages"] == 1
    assert forward["source"].startswith("measured: a clock, 20")
    assert (backward["kernel"], backward["faster"], backward["seconds"]) == (BACKWARD[0], False, 1e-3)
    kept, row = read_rows(table)
    assert kept == other
    assert {**row.as_json(), "seconds_before": 3e-3, "seconds": 1e-3, "faster": True} == forward
    assert find_config(*FORWARD) == row.config  # the next look-up finds it
    # For each key its configuration comes first, and no candidate comes twice.
    assert len(clock.measured) == len(set(map(repr, clock.measured)))
    assert len(clock.measured) == tuning.ticks([BACKWARD]) + 1 + len(list(tuning.candidates(shipped)))


def test_tables_without_json(
    run: Callable[..., tuple[int, Clock]], table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(stages)[0] == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("conv3x3_forward" in line and "3000.0" in line and "1 stages" in line for line in lines)
    assert any("conv3x3_backward" in line and "as it was" in line for line in lines)


@pytest.mark.parametrize("after", ["a faster one", "nothing"])
def test_ctrl_c_keeps_what_is_faster(
    run: Callable[..., tuple[int, Clock]], table: Path, capsys: pytest.CaptureFixture[str], after: str
) -> None:
    """In the middle of a key, the fastest configuration until then is kept."""
    shipped = find_config(*FORWARD)

    def interrupted(key: tuple[str, ...], config: Config) -> float:
        if key == BACKWARD or after == "nothing" or config.num_stages == 2:
            raise KeyboardInterrupt
        return stages(key, config)

    code, _ = run(interrupted, "--json")
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert code == 130
    assert found["interrupted"]
    assert "interrupted: these are the results until then" in printed.err
    if after == "nothing":
        assert found["rows"] == []
        assert not table.exists()
        assert "wrote nothing" in printed.err
    else:
        (row,) = read_rows(table)
        assert row.config.num_stages == 1 < shipped.num_stages
        assert [r["config"]["num_stages"] for r in found["rows"]] == [1]


def test_a_crash_keeps_what_is_faster(run: Callable[..., tuple[int, Clock]], table: Path) -> None:
    def crashing(key: tuple[str, ...], config: Config) -> float:
        if key == BACKWARD:
            raise RuntimeError("an illegal memory access")
        return stages(key, config)

    with pytest.raises(RuntimeError, match="illegal"):
        run(crashing)
    assert [row.key for row in read_rows(table)] == [FORWARD]


def test_a_candidate_that_cannot_run_is_passed_over(
    run: Callable[..., tuple[int, Clock]], table: Path
) -> None:
    def seconds(key: tuple[str, ...], config: Config) -> float:
        if config.num_stages == 1:
            raise RuntimeError("out of resource: shared memory")
        return stages(key, config)

    assert run(seconds)[0] == 0
    assert [row.config.num_stages for row in read_rows(table)] == [2]


def test_a_candidate_that_computes_worse_is_not_timed(
    run: Callable[..., tuple[int, Clock]], table: Path
) -> None:
    code, clock = run(stages, error=lambda config: 1.0 if config.num_stages == 1 else 1e-3)
    assert code == 0
    assert all(config.num_stages > 1 for _, config in clock.measured)
    assert [row.config.num_stages for row in read_rows(table)] == [2]


def test_progress_says_which_configuration(
    run: Callable[..., tuple[int, Clock]], shown: list[int | str]
) -> None:
    _, clock = run(stages)
    total, *texts = shown
    assert total == len(texts) == len(clock.measured)
    for text, (key, config) in zip(texts, clock.measured, strict=True):
        assert text == f"{key[0]}, {key[3]}: {tuning.described(config)}"


def test_another_table_is_what_has_to_be_beaten(
    run: Callable[..., tuple[int, Clock]], table: Path, tmp_path: Path
) -> None:
    """A candidate replaces a row of that table if it is faster than this row, whatever other tables hold."""
    good = Row(*FORWARD, Config(find_config(*FORWARD).blocks, num_stages=1), "measured: before")
    other = tmp_path / "new" / "other.json"
    write_rows(other, [good])
    code, clock = run(stages, "--table", str(other))
    assert code == 0
    assert clock.measured[0] == (FORWARD, good.config)
    assert list(read_rows(other)) == [good]
    assert not table.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.json", "not JSON", "table.json is not a table of Triton configurations"),
        ("table.json", '{"kernel": "x"}', "table.json is not a table of Triton configurations"),
        ("folder", None, "folder is a folder"),
        ("file/table.json", "", "file is not a folder"),
    ],
)
def test_a_table_that_is_none_is_refused_and_kept(
    run: Callable[..., tuple[int, Clock]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    message: str,
) -> None:
    there = tmp_path / name.partition("/")[0]
    there.mkdir() if content is None else there.write_text(content)
    code, clock = run(stages, "--table", str(tmp_path / name))
    assert code == 2
    assert message in capsys.readouterr().err
    assert not clock.measured
    assert content is None or there.read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet50"], "model must be one of "),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--size", "1"], "--size 1: transition: input "),
        (["--dtype", "int8"], "--dtype must be one of float32, "),
        ([], "the Triton backend can't run here: "),
    ],
)
def test_bad_options_and_no_gpu(
    table: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if not options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([*TUNE, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert not table.exists()


PROGRAM = """
import sys
import torch
from dense_ext.benchmark.suites import primitives
from dense_ext.tuning import triton as tuning
from dense_ext.cli import main

torch.cuda.get_device_name = lambda device: "the interpreter"
cases, samples = primitives.model_cases, tuning.ColdTimer.samples
primitives.model_cases = lambda *of: [c for c in cases(*of) if c.primitive == "bn_relu_conv1x1_forward"][:1]
tuning.ColdTimer.samples = lambda *of: print("timed", file=sys.stderr) or samples(*of)
sys.exit(main(sys.argv[1:]))
"""


def test_the_kernels_themselves(table: Path) -> None:
    """In Triton's interpreter: look up, run each candidate, check its error, time it, and write the table."""
    arguments = ["tune", "--model", "densenet_bc_40_12", "--batch", "1", "--size", "8", "--dtype", "float32",
                 "--device", "cpu"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments, "--json"], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    key = row["kernel"], row["architecture"], row["precision"], row["shape"]
    assert key == ("bn_relu_conv1x1_forward", "sm_90", "tf32", "64x32x64")
    assert 0 < row["seconds"] <= row["seconds_before"]
    written = list(read_rows(table)) if table.exists() else []
    assert [r.key for r in written] == ([key] if row["faster"] else [])
    table.unlink(missing_ok=True)
    configs.forget_tables()
    assert done.stderr.count("timed") == tuning.ticks([key])
