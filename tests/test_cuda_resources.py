"""benchmarks/cuda_resources.py reads what cuobjdump says of a library."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dense_ext.backends import CUDA

ROOT = Path(__file__).resolve().parent.parent

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
def cuda_resources(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "cuda_resources", raising=False)
    import cuda_resources

    return cuda_resources


def test_no_kernel_spills(cuda_resources: Any) -> None:
    if CUDA.library.path is None:
        pytest.skip(str(CUDA.library))
    kernels = cuda_resources.kernels_of(CUDA.library.path)
    assert {"bn_relu_conv1x1", "bn_relu_conv3x3", "reduce"} <= {kernel.source for kernel in kernels}
    assert not [kernel for kernel in kernels if kernel.stack]


def test_kernels_are_named_as_in_the_source(cuda_resources: Any) -> None:
    backward = "backward_kernel<Backward<Arithmetic<Half, false>>, 1>"
    kernels = cuda_resources.read(USAGE)
    assert sorted(map(tuple, kernels)) == [
        ("", "plain", "sm_90a", 12, 0, 0, 0),
        ("bn_relu_conv1x1", backward, "sm_90a", 128, 8, 0, 1024),
    ]
    # By registers two blocks of 256 threads, of the 2048 there can be.
    launched = [kernel._replace(threads=256, shared=70 << 10) for kernel in kernels]
    line = f"| bn_relu_conv1x1 | {backward} | sm_90a | 128 | 8 | 256 | 71680 | 25% |\n"
    assert line in cuda_resources.table(launched)
