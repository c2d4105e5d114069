"""Compiles the CUDA kernels for the host, with the emulator in place of the GPU."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..compiling import CSRC, ROOT, STABLE, compile_source, compiler_with, link

HERE = Path(__file__).resolve().parent
CUDA = CSRC / "cuda"

NAMESPACE = "dense_ext_emulator"
# The same as setup.py's for nvcc, but for CPU tensors. The module's own source does not use the stable ABI.
KERNEL_FLAGS = (
    "-DDENSE_EXT_EMULATOR",
    "-DDENSE_EXT_GPU",
    "-DDENSE_EXT_DISPATCH_KEY=CPU",
    STABLE,
)


def build(
    cuda: Path = CUDA, kernels: str = "*.cu", namespace: str = NAMESPACE, flags: Sequence[str] = ()
) -> Path:
    """Compile the changed files, under build/emulator.

    Args:
        cuda: a folder like csrc/cuda.
        kernels: a pattern for its kernel files.
        namespace: the ops' namespace, which a process can register only once.
        flags: compiler flags besides those that are always given.

    Returns:
        The module ``_emulator``: a library of ops, with the emulator's settings and counters.
    """
    folders = [Path(sysconfig.get_paths()["include"]), HERE, cuda.parent]
    results = ROOT / "build" / "emulator"
    results.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        is_kernel = source.parent != HERE
        if source.name == "module.cpp":  # only passes settings and counters on: all builds share one
            command = compiler_with(())
        else:  # every kernel's threads spend their time in the emulator, so it is always optimised
            command = [*compiler_with(flags), *(KERNEL_FLAGS if is_kernel else ("-O2",))]
        return compile_source(source, command, namespace, folders, results)

    sources = [
        *sorted(HERE.glob("*.cpp"), reverse=True),  # the module first: it takes long
        *sorted(cuda.glob(kernels)),
        cuda / "reduce.cu",  # and the other files whose functions the kernels call
        cuda / "batch_norm.cu",
        CSRC / "ops.cpp",
        *([CSRC / "plain_block.cpp"] if kernels == "*.cu" else []),  # it calls most of the kernels
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, dict.fromkeys(sources)))
    return link("_emulator.so", objects, compiler_with(flags), results)
