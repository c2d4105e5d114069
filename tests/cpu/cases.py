"""Runs every primitive's cases, and networks, through a sanitized build of the CPU kernels."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from dense_ext.backends.compiled import Library
from dense_ext.backends.cpu import OPS, CPUBackend

from ..backends import put_in_place
from ..compiling import CSRC, ROOT, STABLE, compile_source, compiler_with, link
from ..primitives import test_frozen_block
from ..sanitizers import Sanitizer, run_cases, train_a_network

NAMESPACE = "dense_ext_cpu_sanitized"
# No instruction set beyond the compiler's default, so that masked vectors are loaded value by value and a
# sanitizer checks each value. bfloat16 is multiplied in pairs, as with AVX512-BF16; float16 is widened.
FLAGS = (STABLE, "-DDENSE_EXT_DISPATCH_KEY=CPU", "-DDENSE_EXT_PAIRS")
THREADS = 4


def build(sanitizer: Sanitizer, csrc: Path = CSRC, kernels: str = "*.cpp") -> Path:
    """Compile these files of csrc/cpu under build/sanitized, if changed, with threads.cpp's threads."""
    command = compiler_with([*FLAGS, *sanitizer.flags])
    results = ROOT / "build" / "sanitized"
    results.mkdir(parents=True, exist_ok=True)
    compiled = partial(compile_source, command=command, namespace=NAMESPACE, folders=(), results=results)
    # All of csrc if all kernels are asked for: plain_block.cpp calls most of them.
    general = sorted(csrc.glob("*.cpp")) if kernels == "*.cpp" else [csrc / "ops.cpp"]
    sources = [*sorted((csrc / "cpu").glob(kernels)), *general, Path(__file__).parent / "threads.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    # Otherwise calls to parallel_for would find libtorch's first.
    return link("_cpu_bf16.so", objects, [*command, "-Wl,-Bsymbolic-functions"], results)


def run_sanitized(
    sanitizer: Sanitizer,
    dtypes: Sequence[torch.dtype],
    primitives: str = "",
    csrc: Path = CSRC,
    kernels: str = "*.cpp",
) -> subprocess.CompletedProcess[str]:
    """Run the cases of the primitives whose names begin with this prefix through a build of these files."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return sanitizer.run(__name__, str(build(sanitizer, csrc, kernels)), primitives, *names)


def main(library: str, primitives: str, *dtypes: str) -> None:
    torch.set_num_threads(THREADS)
    backend = CPUBackend(Library([Path(library)], NAMESPACE, "it is not built", OPS))
    assert backend.library.reason is None, backend.library.reason
    # After a pixel's last channel comes no channel of a neighbour or a guard, so that reading there is
    # noticed.
    run_cases(backend, [getattr(torch, name) for name in dtypes], primitives, guard=0)
    if not primitives:
        from ..test_threads import train_together  # imported late, since it imports torchvision

        # Several bands take seconds in each dtype, and are divided in the same way in all: one for each size.
        banded = list(zip(test_frozen_block.BANDED, itertools.cycle(dtypes), strict=False))
        small = [size for size in test_frozen_block.SIZES if size not in test_frozen_block.BANDED]
        for size, dtype in (*itertools.product(small, dtypes), *banded):
            print("a frozen block", size, dtype, flush=True)
            test_frozen_block.check_bits(backend, size, getattr(torch, dtype))
        put_in_place(backend)
        train_together(backend.name)
        train_a_network(backend, getattr(torch, dtypes[-1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
