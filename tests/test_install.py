"""Without a compiler the package installs, warns once, and computes the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dense_ext.backends import CPU, CUDA
from dense_ext.backends.cpu import libraries
from tests.wheel import unstable_symbols

ROOT = Path(__file__).resolve().parent.parent

# Prints the package's path, each backend's reason, the warnings of two forwards, and the output's mean.
USE = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, dense_ext
    torch.manual_seed(0)
    block = dense_ext.DenseBlock(2, 6, 4)
    x = torch.randn(2, 6, 8, 8)
    y = block(x); block(x.double().float())
ours = [str(w.message) for w in caught if "dense_ext" in str(w.message)]
reasons = dense_ext.backends.unavailable_reasons()
print(json.dumps([dense_ext.__file__, reasons, ours, y.detach().mean().item()]))
"""


def copy_of_the_sources(target: Path) -> Path:
    for name in ("csrc", "dense_ext"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


WHEEL = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", ".")
LIBRARIES = ("setup.py", "build_ext")  # what pip runs for the libraries, in half the time


def build(source: Path, what: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    command = [sys.executable, *what]
    return subprocess.run(command, cwd=source, env=environment, text=True, capture_output=True, check=False)


NO_COMPILER = {"CXX": "/nonexistent/c++", "DENSE_EXT_CUDA": ""}


def test_installs_without_a_compiler_and_runs_on_the_reference(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    result = build(source, WHEEL, **NO_COMPILER, DENSE_EXT_BUILD="")
    assert result.returncode == 0, result.stderr
    assert (
        "the slower reference backend runs where there is no compiled library"
        in result.stdout + result.stderr
    )
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = {
            "py.typed",
            "benchmark/results.schema.json",
            "benchmark/report.html.jinja",
            "backends/preference.json",
        }
        assert {f"dense_ext/{name}" for name in data} <= set(archive.namelist())
        assert not [n for n in archive.namelist() if n.endswith(".so") or n.startswith("tests")]
        archive.extractall(tmp_path / "site")
    output = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "site")],
        cwd=tmp_path, text=True, capture_output=True, check=True,
    )  # fmt: skip
    file, backends, warned, mean = json.loads(output.stdout)
    assert str(tmp_path) in file
    assert "is not built" in backends["cpu"]
    assert "is not built" in backends["cuda"]
    assert "DENSE_EXT_CUDA=1" in backends["cuda"]
    assert backends["reference"] is None
    assert len(warned) == 1
    assert "reference backend: the C++ backend is not built" in warned[0]
    installed = subprocess.run(
        [sys.executable, "-c", USE, str(ROOT)], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert json.loads(installed.stdout)[3] == pytest.approx(mean, abs=1e-6)


def test_a_required_build_must_not_fail(tmp_path: Path) -> None:
    result = build(copy_of_the_sources(tmp_path), WHEEL, **NO_COMPILER, DENSE_EXT_BUILD="1")
    assert result.returncode != 0
    assert "BuildError: can't build" in result.stdout + result.stderr


def test_a_required_cuda_library_must_not_fail(tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    asked = {"DENSE_EXT_BUILD": "", "DENSE_EXT_CUDA": "1", "CUDA_HOME": str(nvcc.parent.parent)}
    architectures = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX"}
    environment = NO_COMPILER | asked | architectures
    result = build(copy_of_the_sources(tmp_path / "sources"), LIBRARIES, **environment)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "BuildError: can't build _cuda" in output
    compile, codes = f"'{nvcc}' -ccbin /nonexistent/c++", "-gencode=arch=compute_80,code=[sm_80]"
    assert compile in output
    assert f"{codes} -gencode=arch=compute_90a,code=[sm_90a,compute_90a]" in output


def says(folder: Path, nvidia_smi: str) -> str:
    """The output of a build, which compiles nothing, with this script as ``nvidia-smi``."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    settings = {"DENSE_EXT_BUILD": "", "TORCH_CUDA_ARCH_LIST": "", "PATH": path}
    result = build(copy_of_the_sources(folder), LIBRARIES, **NO_COMPILER | settings)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is without CUDA")
def test_cuda_is_compiled_for_the_gpus_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    output = says(tmp_path / "two", "echo 9.0; echo 8.6; echo 9.0")
    assert "CUDA for 8.6;9.0a" in output or "no nvcc, or no GPU from 8.0 on among 8.6;9.0a" in output
    (tmp_path / "none").mkdir()
    output = says(tmp_path / "none", "exit 6")
    assert "no GPU here, so no CUDA library (DENSE_EXT_CUDA=1 compiles for every architecture)" in output


def test_the_cpu_library_of_this_machine_alone(tmp_path: Path) -> None:
    settings = {"DENSE_EXT_BUILD": "", "DENSE_EXT_CPU": "native"}
    result = build(copy_of_the_sources(tmp_path), LIBRARIES, **NO_COMPILER | settings)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"can't build (\w+):", result.stdout + result.stderr) == [libraries()[0]]


@pytest.mark.parametrize("path", [CPU.library.path, CUDA.library.path], ids=["cpu", "cuda"])
def test_a_library_serves_every_python_and_pytorch(path: Path | None) -> None:
    if path is None or shutil.which("nm") is None:
        pytest.skip("there is no library, or no nm")
    assert not unstable_symbols(path)
