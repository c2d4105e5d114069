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
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not test_op", "tests/primitives"]))
"""


@pytest.mark.skipif(CPU.library.path is None, reason="the C++ backend is not built")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere there is one library")
@pytest.mark.parametrize(("capability", "library"), [("avx2", "_cpu_avx2"), ("default", "_cpu_default")])
def test_primitives(capability: str, library: str) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this machine has no AVX2")
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        text=True,
        capture_output=True,
        check=False,
    )
    assert f"library: {library}.so" in result.stdout
    assert result.returncode == 0, result.stdout[-3000:]
