"""benchmarks/gpu_cost.py counts the instructions of a library's kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from dense_ext.backends import CUDA

RENEW = "run: python benchmarks/gpu_cost.py"

pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt")


@pytest.fixture
def gpu_cost(benchmark_script: Callable[[str], Any]) -> Any:
    """The script as a module."""
    return benchmark_script("gpu_cost")


def test_the_committed_counts_are_the_librarys(gpu_cost: Any) -> None:
    """A loop with more instructions changes the table; only the same nvcc gives the same counts."""
    if CUDA.library.path is None:
        pytest.skip(str(CUDA.library))
    page = gpu_cost.RESULT.read_text()
    if f"nvcc {gpu_cost.compiler_of(CUDA.library.path)}," not in page:
        pytest.skip("another nvcc made the table")
    try:
        found = gpu_cost.counts(CUDA.library.path, ("cuda",))
    except LookupError as error:  # the library is for other GPUs
        pytest.skip(str(error))
    assert (
        found
        == [line for line in page.splitlines() if line.startswith("|") and "| cuda | " in line][: len(found)]
    ), RENEW


def test_a_loop_counts_without_the_loops_inside_it(gpu_cost: Any) -> None:
    code = [
        (0x00, "MOV R1, R2"),
        (0x10, "LDG.E.128 R4, desc[UR4][R2.64]"),  # the outer loop begins
        (0x20, "HMMA.16816.F32.BF16 R4, R8, R10, R4"),  # the inner loop
        (0x30, "@P0 BRA 0x20"),
        (0x40, "@!P1 FFMA R1, R2, R3, R4"),
        (0x50, "@!UP0 BRA 0x10"),
        (0x60, "IADD3 R1, R1, 0x1, RZ"),  # a loop that multiplies nothing
        (0x70, "@P0 BRA 0x60"),
        (0x80, "EXIT"),
    ]
    outer, inner = gpu_cost.main_loops(code)
    assert outer == {"global": 1, "float32": 1, "branches": 1}
    assert inner == {"products": 1, "branches": 1}


def test_patches_are_those_of_the_kernels(gpu_cost: Any) -> None:
    """512 slots with a border of 736 pixels hold eight images of 8 x 8, or a seventh of 56 x 56."""
    assert gpu_cost.patches(8, 512, 4, 736) == (gpu_cost.BATCH // 8, 8, 64)
    assert gpu_cost.patches(56, 512, 4, 736).number == gpu_cost.BATCH * 7
    assert gpu_cost.patches(16, 256, 4, 336) == (gpu_cost.BATCH, 16, 16)
