"""The libraries for instruction sets other than this machine's best also pass the primitives' tests."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dense_ext.backends import CPU

ROOT = Path(__file__).resolve().parent.parent

# Runs in its own process, since a process loads one library: prints the library, then runs the tests.
# The operators' schemas are the same in every library: test_op tests them elsewhere.
RUN = """
import sys, pytest
from dense_ext.backends import CPU
print("library:", CPU.library)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", sys.argv[1], "tests/primitives"]))
"""
# Only its products of bfloat16 differ from those of the library with bfloat16 instructions.
AVX512 = ("avx512", "_cpu_avx512", "bfloat16")
AVX2, DEFAULT = (("avx2", "_cpu_avx2", "not test_op"), ("default", "_cpu_default", "not test_op"))


@pytest.mark.skipif(CPU.library.path is None, reason="the C++ backend is not built")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere there is one library")
@pytest.mark.parametrize(("capability", "library", "tests"), [AVX512, AVX2, DEFAULT])
def test_primitives(capability: str, library: str, tests: str) -> None:
    if capability != "default" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this machine has no AVX2")
    if capability == "avx512" and "bf16" not in str(CPU.library):
        pytest.skip("this machine has no AVX-512 with bfloat16 instructions")
    result = subprocess.run(
        [sys.executable, "-c", RUN, tests],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        text=True,
        capture_output=True,
        check=False,
    )
    assert f"library: {library}.so" in result.stdout
    assert result.returncode == 0, result.stdout[-3000:]
