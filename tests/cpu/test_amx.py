"""AMX's product equals a plain loop, on an emulation of the instructions."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from ..compiling import CSRC, ROOT, STABLE, TORCH, compiler_with, plant

HERE = Path(__file__).parent
# The vectors are AVX-512's. Each access is checked.
FLAGS = ("-march=x86-64-v4", "-DDENSE_EXT_PAIRS", "-DDENSE_EXT_AMX", "-fsanitize=address,undefined", STABLE)

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this machine has no AVX-512"
)


def run(program: Path, csrc: Path) -> subprocess.CompletedProcess[str]:
    """Compile and run amx.cpp with these kernels."""
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = compiler_with([*FLAGS, "-include", str(HERE / "emulated_amx.h")])
    folders = [f"-I{TORCH / 'include'}", f"-I{csrc / 'cpu'}"]
    subprocess.run(
        [*command, *folders, "-x", "c++", str(HERE / "amx.cpp"), "-o", str(program), *libraries], check=True
    )
    return subprocess.run([program], cwd=ROOT, text=True, capture_output=True)


def test_every_shape(tmp_path: Path) -> None:
    ran = run(tmp_path / "amx", CSRC)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("lower = kTile * p.a_row", "lower = (kTile - 1) * p.a_row"),
        ("written += kTile;", ""),
    ],
)
def test_planted_fault(text: str, replacement: str, tmp_path: Path) -> None:
    csrc = plant(tmp_path / "csrc", "cpu/amx.h", text, replacement)
    assert run(tmp_path / "amx", csrc).returncode != 0
