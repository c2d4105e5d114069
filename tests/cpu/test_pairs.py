"""Products of pairs of bfloat16 equal a plain loop, with each kind of instructions that can run here."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ..compiling import COMPILER, CSRC, FLAGS, STABLE, TORCH, plant

HERE = Path(__file__).parent
LINKED = (f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
EMULATED = ("-include", str(HERE / "emulated_amx.h"), "-DDENSE_EXT_AMX", "-fsanitize=address,undefined")


@dataclass(frozen=True)
class Instructions:
    """Options of a compiler, what to compile, what runs its programs, and whether this processor can."""

    options: tuple[str, ...]
    source: str = "gemm.cpp"
    compiler: str = COMPILER
    runner: tuple[str, ...] = ()
    here: bool = True


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
KINDS = {
    "none": Instructions(("-DDENSE_EXT_PAIRS",)),
    "AVX512-BF16": Instructions(
        ("-march=x86-64-v4", "-mavx512bf16", *LINKED), here=torch.cpu._is_avx512_bf16_supported()
    ),
    "AMX": Instructions(
        ("-march=x86-64-v4", "-DDENSE_EXT_PAIRS", *EMULATED, *LINKED), source="amx.h", here=AVX512
    ),
    "NEON": Instructions(
        ("-march=armv8.2-a+bf16", "-static"),
        compiler="aarch64-linux-gnu-g++",
        runner=("qemu-aarch64", "-cpu", "max"),
    ),
}


def run(kind: Instructions, program: Path, csrc: Path = CSRC) -> subprocess.CompletedProcess[str]:
    """Compile and run pairs.cpp with these kernels."""
    tools = (kind.compiler, *kind.runner[:1])
    if not kind.here or not all(map(shutil.which, tools)):
        pytest.skip(f"needs {' and '.join(tools)}, and a processor with the instructions")
    included = f'-DDENSE_EXT_TESTED="{csrc / "cpu" / kind.source}"'
    # The libraries come after the source.
    command = [kind.compiler, *FLAGS, STABLE, included, f"-I{TORCH / 'include'}", str(HERE / "pairs.cpp")]
    subprocess.run([*command, "-o", str(program), *kind.options], check=True)
    return subprocess.run([*kind.runner, str(program)], text=True, capture_output=True)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_shape(kind: Instructions, tmp_path: Path) -> None:
    ran = run(kind, tmp_path / "pairs")
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
    assert run(KINDS["AMX"], tmp_path / "pairs", csrc).returncode != 0
