"""Compiles the CUDA kernels for the host, with the emulator in the GPU's place.

    python tests/emulator/build.py [--sanitize] [--define NAME]

The result is kept under build/emulator, and made anew when a source has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "ops.cpp"]
EMULATOR = [HERE / "emulator.cpp", HERE / "module.cpp"]
HEADERS = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh"), *HERE.glob("*.h")]

FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall"]
KERNEL_FLAGS = [
    "-DDENSE_EXT_EMULATOR",
    "-DDENSE_EXT_TF32",
    "-DDENSE_EXT_NAMESPACE=dense_ext_emulator",
    "-DDENSE_EXT_DISPATCH_KEY=CPU",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def build(flags: tuple[str, ...] = ()) -> Path:
    """The compiled module, ``_emulator.so``.

    Args:
        flags: for the compiler, beside those it always gets.
    """
    flags = (*FLAGS, *flags)
    includes = [*include_paths(), sysconfig.get_paths()["include"], str(HERE), str(ROOT / "csrc")]
    command = ["g++", *flags, *(f"-I{path}" for path in includes)]
    common = hashlib.sha256(" ".join([*command, *KERNEL_FLAGS, torch.__version__]).encode())
    for header in sorted(HEADERS):
        common.update(header.read_bytes())
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        target = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            own = KERNEL_FLAGS if source in KERNELS else []
            subprocess.run([*command, *own, "-x", "c++", "-c", str(source), "-o", str(partial)], check=True)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*KERNELS, *EMULATOR]))
    name = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    module = folder / name / "_emulator.so"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        libraries = [f"-L{path}" for path in library_paths()]
        partial = module.with_suffix(f".{os.getpid()}")
        link = ["g++", "-shared", *flags, *map(str, objects), *libraries, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        subprocess.run([*link, "-o", str(partial)], check=True)
        partial.rename(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    arguments = parser.parse_args()
    print(build(tuple(SANITIZE) if arguments.sanitize else ()))
