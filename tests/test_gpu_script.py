"""benchmarks/gpu.py: everything that it runs exists and runs; tested on a CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import setuptools

from dense_ext.benchmark import peers
from dense_ext.benchmark.results import read_results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(benchmark_script: Callable[[str], Any]) -> Any:
    """The script as a module."""
    return benchmark_script("gpu")


def test_peers_and_parts_exist(script) -> None:  # type: ignore[no-untyped-def]
    for names in script.PEERS.values():
        chosen = {peer.name for peer in peers.choose(names, script.POLICIES)}
        assert chosen == {*names, *(f"dense_ext-{policy}" for policy in script.POLICIES)}
    parts = script.parts()
    assert set(script.PEERS) < {part.name for part in parts}
    for part in parts:
        arguments = [argument for command in part.commands for argument in command]
        paths = [a for a in arguments if a.endswith(".py") or a.startswith("tests/")]
        assert paths
        assert all((ROOT / path).exists() for path in paths), paths


def test_a_run_leaves_few_files(script) -> None:  # type: ignore[no-untyped-def]
    """The log and a result of each suite: what is copied from a machine is seen at a glance."""
    names = [part.name for part in script.parts() if script.SUITE[0] in part.commands[0]]
    assert len({*names} - {"machine", *script.ON_REQUEST} | {"log"}) <= 8
    assert {*script.ON_REQUEST} <= {*names}


def test_every_file_of_tests_is_run_for_each_backend(script, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(script, "NVCC", "nvcc")
    files = {f"tests/primitives/{path.name}" for path in (ROOT / "tests" / "primitives").glob("test_*.py")}
    for backend in ("cuda", "triton"):
        found = {(command[len(script.PYTEST)], command[-1]) for command in script.tests(backend)}
        whole = {file for file, expression in found if expression == backend}
        halves = [{file for file, expression in found if expression == f"{backend} and {half}"}
                  for half in ("backward", "not backward")]  # fmt: skip
        assert halves[0] == halves[1]
        assert whole | halves[0] == files | {"tests/gpu"}
        assert not whole & halves[0]


def test_nvcc_is_looked_for_where_setup_looks(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages = tmp_path / "nvidia" / "cu13" / "bin"
    packages.mkdir(parents=True)
    (tmp_path / "torch").mkdir()
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else None)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("DENSE_EXT_BUILD", "0")
    monkeypatch.setenv("CUDA_HOME", "/home")
    monkeypatch.setenv("PATH", "/path")
    looked: list[list[str]] = []
    setup = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(shutil, "which", lambda name, path: looked.append([name, *path.split(os.pathsep)]))
    assert setup["cuda_home"]() is script.toolkit("nvcc") is None
    assert looked[0] == looked[1]
    assert looked[0][:4] == ["nvcc", "/home/bin", "/path", "/usr/local/cuda/bin"]
    assert [Path(place).resolve() for place in looked[0][4:]] == [packages]


def test_a_suite_fills_a_result(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "primitives.json"
    script.run_suite("primitives", "primitives_cpu", ("densenet_bc_40_12",), 1, path, "cpu", "cpu")
    results = read_results(path)
    assert not results.interrupted
    assert {row.peer for row in results.timed()} == {"aten", "cpu"}


def ends(process: int) -> bool:
    """Whether a killed process is gone within ten seconds; an orphan stays until it is waited for."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_part_that_takes_too_long_is_ended(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """So are the processes that it started: a compiler would slow down the next part."""
    sleep = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', '{}'])"
    slow = ["-c", sleep.format("import os, time; print(os.getpid(), flush=True); time.sleep(60)")]
    (line,) = script.run_part(script.Part("slow", 9, [slow]), 3, tmp_path)
    assert "ended after 3 s" in line
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    begun, child, *_ = (tmp_path / "log.txt").read_text().splitlines()[1:]
    assert begun == "begun"
    assert ends(int(child))


def test_commands_that_do_not_end_are_ended_together(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    deaf = ["-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"]
    script.TO_END = 1
    begun = time.monotonic()
    *lines, quick = script.run_part(script.Part("tests", 9, [deaf, deaf, ["-c", "pass"]]), 3, tmp_path)
    assert time.monotonic() - begun < 15
    assert all(": killed after 3 s" in line for line in lines)
    assert ": exit 0, " in quick


def test_an_interrupt_ends_what_was_started(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code = f"""
import sys
sys.path.insert(0, "benchmarks")
import gpu
sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
gpu.parts = lambda: [gpu.Part("slow", 60, [["-c", sleep]])]
sys.argv = ["gpu.py", "--out", {str(tmp_path)!r}]
sys.exit(gpu.main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log = tmp_path / "slow-0.log"
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    child = int(log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert "slow: interrupted" in (tmp_path / "log.txt").read_text()
    assert ends(child)


def test_resuming_passes_over_what_succeeded(script, tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """Parts of which a command failed run again, and so does everything without --resume."""
    count = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(len(sys.argv) - 2)"
    files = {name: tmp_path / name for name in ("good", "good_too", "bad")}
    commands = {name: [["-c", count, str(path)]] for name, path in files.items()}
    commands["bad"].append([*commands["bad"][0], "fail"])
    parts = [script.Part(name, 60, commands[name]) for name in files]
    monkeypatch.setattr(script, "parts", lambda: parts)
    out = tmp_path / "out"
    for options in ([], ["--resume"]):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *options])
        script.main()
    assert {name: path.read_text() for name, path in files.items()} == {
        "good": "x",
        "good_too": "x",
        "bad": "xxxx",
    }
    lines = capsys.readouterr().out.splitlines()
    assert [re.split("[: ]", line)[0] for line in lines] == ["good", "good_too", "bad", "bad"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), "--only", "good"])
    script.main()
    assert files["good"].read_text() == "xx"


def test_tests_that_are_all_skipped_are_no_success(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    nothing = [*script.PYTEST, "tests/gpu", "-k", "offsets"]
    (line,) = script.run_part(script.Part("tests", 60, [nothing]), 60, tmp_path)
    assert line.startswith("tests: no test ran")


def test_the_suites_parts_need_no_more_than_the_docstring_says(tmp_path: Path) -> None:
    """They run without the packages of the command line and the report."""
    code = """
import sys
absent = "rich typer matplotlib jinja2 jsonschema scipy sklearn timm ninja".split()
sys.modules.update(dict.fromkeys(absent))  # an import of None fails
sys.path.insert(0, "benchmarks")
import gpu
from pathlib import Path
gpu.PEERS["inference"] = ["eager-cl"]  # to compile takes a minute
gpu.run_suite("inference", "inference", ("densenet_bc_40_12",), 1, Path(sys.argv[1]), "cpu")
"""
    path = tmp_path / "inference.json"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True, capture_output=True)
    measured = {row.peer for row in read_results(path).timed()}
    assert {"eager-cl", "dense_ext-none"} <= measured
