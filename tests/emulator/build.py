"""Compiles the CUDA kernels for the host, with the emulator in the GPU's place."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"

NAMESPACE = "dense_ext_emulator"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-ftrivial-auto-var-init=pattern",  # registers begin with a value that shows
)
# As setup.py's for nvcc, but on CPU tensors. The module's own file is not of the stable ABI.
KERNEL_FLAGS = (
    "-DDENSE_EXT_EMULATOR",
    "-DDENSE_EXT_GPU",
    "-DDENSE_EXT_DISPATCH_KEY=CPU",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
# Undefined behaviour ends the program with what it was and where, as an invalid access does.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def build(
    cuda: Path = CUDA, kernels: str = "*.cu", namespace: str = NAMESPACE, flags: Sequence[str] = ()
) -> Path:
    """Compile what has changed, under build/emulator.

    Args:
        cuda: a folder as csrc/cuda.
        kernels: which of its files.
        namespace: of the ops, which a process can have once.
        flags: for the compiler, beside those it always gets.

    Returns:
        The module ``_emulator``: a library of ops, and what tests set and read of the emulator.
    """
    torch_folder = Path(torch.__file__).parent
    folders = [torch_folder / "include", sysconfig.get_paths()["include"], HERE, cuda.parent]
    compiler = [os.environ.get("CXX", "g++"), *FLAGS, *flags]
    including = [f"-I{folder}" for folder in folders]
    headers = sorted(HERE.glob("*.h"))
    kernel_headers = [*headers, *sorted((ROOT / "csrc").glob("*.h")), *sorted(cuda.glob("*.cuh"))]
    results = ROOT / "build" / "emulator"
    results.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        """The object file, whose name is of all that went into it, so that builds share what they can."""
        is_kernel = source.parent != HERE
        options = [*compiler, *(KERNEL_FLAGS if is_kernel else ())]
        if b"DENSE_EXT_NAMESPACE" in source.read_bytes():
            options.append(f"-DDENSE_EXT_NAMESPACE={namespace}")
        key = hashlib.sha256(" ".join((*options, torch.__version__)).encode())
        for path in (*(kernel_headers if is_kernel else headers), source):
            key.update(path.read_bytes())
        target = results / f"{source.stem}-{key.hexdigest()[:16]}.o"
        _make(target, [*options, *including, "-x", "c++", "-c", str(source)])
        return target

    sources = [
        *sorted(cuda.glob(kernels)),
        cuda / "reduce.cu",  # and what else other files call
        cuda / "batch_norm.cu",
        ROOT / "csrc" / "ops.cpp",
        *HERE.glob("*.cpp"),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compiled, dict.fromkeys(sources))]
    folder = results / hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    libraries = [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    _make(folder / "_emulator.so", [*compiler, "-shared", *objects, *libraries])
    return folder / "_emulator.so"


def _make(target: Path, command: list[str]) -> None:
    """Run the compiler if its result is not there, so that an interrupted or parallel run does no harm."""
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)
