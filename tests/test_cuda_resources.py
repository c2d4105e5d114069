"""benchmarks/cuda_resources.py parses cuobjdump's output for a library."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dense_ext.backends import CUDA

ROOT = Path(__file__).resolve().parent.parent
RENEW = "run: python benchmarks/cuda_resources.py"

USAGE = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN9dense_ext57_GLOBAL__N__12e854e7_18_bn_relu_conv1x1_cu_6a743775_1253415backward_kernelINS0_8\
BackwardINS_10ArithmeticINS_4HalfELb0EEEEELi1EEEvNS0_17BackwardArgumentsINT_1TEEE:
  REG:128 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z5plainv:
  REG:12 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt")


@pytest.fixture
def cuda_resources(benchmark_script: Callable[[str], Any]) -> Any:
    """The script as a module."""
    return benchmark_script("cuda_resources")


@pytest.fixture
def library() -> Path:
    """The CUDA library, if it was built."""
    if CUDA.library.path is None:
        pytest.skip(str(CUDA.library))
    return CUDA.library.path


def test_no_kernel_spills(cuda_resources: Any, library: Path) -> None:
    kernels = cuda_resources.kernels_of(library)
    assert {"bn_relu_conv1x1", "bn_relu_conv3x3", "reduce"} <= {kernel.source for kernel in kernels}
    assert not [kernel for kernel in kernels if kernel.stack]


def committed_rows(page: str) -> list[tuple[str, ...]]:
    return [tuple(line.strip("| ").split(" | ")) for line in page.splitlines() if " | sm_" in line]


def test_every_kernel_was_seen_launched(cuda_resources: Any) -> None:
    """On some chip, as others may run another kernel. That of has_code is never launched."""
    launched: dict[str, bool] = {}
    for source, kernel, _, _, _, threads, *_ in committed_rows(cuda_resources.RESULT.read_text()):
        if source != "has_code":
            name = f"{source} {kernel}"
            launched[name] = launched.get(name, False) or threads != "0"
    assert len(launched) > 50
    assert not [name for name, seen in launched.items() if not seen]


def test_the_committed_table_is_the_librarys(cuda_resources: Any, library: Path) -> None:
    """Kernels built by the same nvcc have the table's registers and stack, though maybe for fewer GPUs."""
    page = cuda_resources.RESULT.read_text()
    committed = committed_rows(page)
    kernels = cuda_resources.kernels_of(library)
    chips = {kernel.architecture for kernel in kernels} & set(cuda_resources.CHIPS)
    length = 5 if f"nvcc {cuda_resources.compiler_of(library)}." in page else 3
    found = [tuple(map(str, kernel[:length])) for kernel in kernels if kernel.architecture in chips]
    assert found == [row[:length] for row in committed if row[2] in chips], RENEW
    assert {row[2] for row in committed} == set(cuda_resources.CHIPS), RENEW


def test_the_tables_chips_are_those_that_setup_compiles_for(cuda_resources: Any) -> None:
    (numbers,) = re.findall(r'ALL_ARCHITECTURES = "([\d.a;]+)\+PTX"', (ROOT / "setup.py").read_text())
    assert {f"sm_{number.replace('.', '')}" for number in numbers.split(";")} == set(cuda_resources.CHIPS)


def test_kernels_are_named_as_in_the_source(cuda_resources: Any) -> None:
    backward = "backward_kernel<Backward<Arithmetic<Half, false>>, 1>"
    kernels = cuda_resources.read(USAGE)
    assert sorted(map(tuple, kernels)) == [
        ("", "plain", "sm_90a", 12, 0, 0, 0),
        ("bn_relu_conv1x1", backward, "sm_90a", 128, 8, 0, 1024),
    ]
    # The registers suffice for two blocks of 256 threads, of at most 2048 threads.
    launched = [kernel._replace(threads=256, shared=70 << 10) for kernel in kernels]
    line = f"| bn_relu_conv1x1 | {backward} | sm_90a | 128 | 8 | 256 | 71680 | 25% |\n"
    assert line in cuda_resources.table(launched, "13.0.88")
