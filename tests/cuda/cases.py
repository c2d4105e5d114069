"""Every primitive's cases and sizes, and a network; as a program, through a sanitized build of the kernels.

A sanitizer ends the process at the first thing it finds, hence a process for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import dense_ext
from dense_ext.backends import BACKENDS, select
from dense_ext.backends.cuda import STORAGE_DTYPES

from ..emulator import Emulator
from ..emulator.build import ROOT, SANITIZE, build
from ..helpers import small_densenet
from ..primitives import test_batch_norm
from ..primitives.common import MakeCase
from ..primitives.groups import GROUPS
from ..primitives.harness import ALIGNED, GUARD, Maker, check_values

CPU = torch.device("cpu")
# Small ones of ragged slices, and one of several tiles.
CASES: list[tuple[MakeCase, Any, int]] = [
    *((case, size, GUARD) for group in GROUPS for case in group.cases for size in group.sizes),
    *((case, group.large, ALIGNED) for group in GROUPS for case in group.cases),
    *((case, size, 0) for case in test_batch_norm.CASES for size in test_batch_norm.CHANNELS),
]
# -O1: compiling takes about as long as running.
SANITIZED = (*SANITIZE, "-O1")


def run_sanitized(primitives: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the cases of the primitives whose names begin so through a build with these options."""
    namespace = options.setdefault("namespace", "dense_ext_sanitized")
    library = build(flags=SANITIZED, **options)
    # What a library of Python's must find in the process before all others.
    preloaded = (_compilers_file("libasan.so"), _compilers_file("libstdc++.so"))
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        # Python leaves memory to its end; fibers have no fake stacks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", __name__, str(library), namespace, primitives]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _compilers_file(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


def main(library: str, namespace: str, primitives: str) -> None:
    gpu = Emulator(Path(library), namespace)
    gpu.reset(multiprocessors=1)  # several tiles a block
    for dtype in STORAGE_DTYPES:
        for make, size, guard in CASES:
            torch.backends.cudnn.allow_tf32 = guard == ALIGNED  # each way of multiplying float32
            case = make(Maker(dtype, CPU, guard=guard), size)
            if case.primitive.startswith(primitives):
                print(case.primitive, dtype, size, flush=True)
                check_values(gpu.backend, case)
    if not primitives:
        train_a_network(gpu)


def train_a_network(gpu: Emulator) -> None:
    """Two steps of a whole swapped DenseNet, in 16 bits, recomputing as much as can be."""
    BACKENDS["cuda"] = gpu.backend
    select.cache_clear()
    model = dense_ext.swap(small_densenet(growth_rate=6).half(), recompute="block", backend="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        print("a training step", flush=True)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 33, 32, dtype=torch.float16)).float().square().sum().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])
