"""Builds the compiled backends; pyproject.toml holds everything else about the package.

The backends are shared libraries that use libtorch's stable ABI and no Python. So one build works with every
version of Python, and with PyTorch 2.10 and later, with or without CUDA. The CPU library is compiled for
several instruction sets. The CUDA library takes minutes per architecture, so it is compiled only for the GPUs
of this machine, and not at all if there are none. ``TORCH_CUDA_ARCH_LIST`` names other architectures;
``DENSE_EXT_CUDA=1`` compiles for all of them, as for wheels. ``DENSE_EXT_CPU=native`` compiles the CPU
library for this machine's instruction set alone, in a quarter of the time.

If a library can't be built, it is left out and the package still installs. ``DENSE_EXT_BUILD=1`` makes a
failed build an error, and ``DENSE_EXT_BUILD=0`` skips building. ``DENSE_EXT_CUDA`` does the same for the CUDA
library alone; with ``1``, a missing nvcc is an error too.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD, CUDA = os.environ.get("DENSE_EXT_BUILD"), os.environ.get("DENSE_EXT_CUDA")
NINJA = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
TORCH = Path(spec.origin).parent if (spec := find_spec("torch")) and spec.origin else None

# Library -> the compiler flags for its instruction set. Other processors build only the default.
CPU_TARGETS = {"_cpu_default": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_TARGETS |= {
        "_cpu_avx2": "-march=x86-64-v3",
        "_cpu_avx512": "-march=x86-64-v4",
        "_cpu_avx512_bf16": "-march=x86-64-v4 -mavx512bf16",
    }
elif platform.machine().lower() == "aarch64":
    CPU_TARGETS |= {"_cpu_neon_bf16": "-march=armv8.2-a+bf16"}

# A GPU runs code for earlier ones of its generation, except code for 9.0a; future generations need the PTX.
ALL_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


class BuildError(RuntimeError):
    """A required build failed."""


def leave_out(what: str, why: object, required: bool) -> None:
    """Raise if the build is required, else print what will be missing, and why."""
    if required:
        raise BuildError(f"can't build {what}: {why}")
    fallback = "the slower reference backend runs where there is no compiled library"
    print(f"\ndense_ext: can't build {what}: {why}\ndense_ext: {fallback}\n", file=sys.stderr)


def cuda_home() -> Path | None:
    """CUDA's folder, which has nvcc: CUDA_HOME, on the path, the default, or among PyTorch's packages."""
    home = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else []
    places = [*home, *os.get_exec_path(), "/usr/local/cuda/bin", *glob(f"{TORCH}/../nvidia/*/bin")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    return Path(nvcc).parent.parent if nvcc else None


def gpus() -> str:
    """The architectures of this machine's GPUs, in the format of TORCH_CUDA_ARCH_LIST."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ";".join(sorted({name.replace("9.0", "9.0a") for name in listed}))


def architectures() -> str:
    """The architectures to compile CUDA for; empty if there is no GPU and no setting names any."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or (ALL_ARCHITECTURES if CUDA == "1" else gpus())


def cuda_target() -> str:
    """The flags for nvcc that select the architectures."""
    flags = []
    for name in architectures().replace(";", " ").split():
        number, _, ptx = name.replace(".", "").partition("+")
        codes = f"sm_{number},compute_{number}" if ptx else f"sm_{number}"
        if re.fullmatch(r"([89]|1\d)\d[af]?", number):  # only numbers from 8.0 on
            flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
    return " ".join(flags)


def native_library() -> str:
    """The CPU library that this machine loads."""
    load = "from dense_ext.backends.cpu import libraries; print(libraries()[0])"
    printed = subprocess.run([sys.executable, "-c", load], check=True, capture_output=True, text=True)
    return printed.stdout.strip()


class Build(build_ext):
    """Builds each library with Ninja and csrc/rules.ninja; a library that fails is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        if os.environ.get("DENSE_EXT_CPU") == "native":
            others = {f"dense_ext.{name}" for name in CPU_TARGETS} - {f"dense_ext.{native_library()}"}
            self.extensions = [ext for ext in self.extensions if ext.name not in others]
        self.extensions = [ext for ext in self.extensions if self.built(ext)]

    def built(self, ext: Extension) -> bool:
        name = ext.name.removeprefix("dense_ext.")
        kind, target = ("cpu", CPU_TARGETS[name]) if name in CPU_TARGETS else ("cuda", cuda_target())
        folder = f"build/{name}"  # it is kept, so that only changed files are compiled again
        objects = {source: f"{folder}/{Path(source).name}.o" for source in ext.sources}
        lines = [f"folder = {folder}", f"cxx = {os.environ.get('CXX') or 'c++'}", f"torch = {TORCH}",
                 f"cuda = {cuda_home()}", f"target = {target}", "include csrc/rules.ninja",
                 *(f"build {objects[source]}: {kind}_compile {source}" for source in objects),
                 f"build {folder}/{name}.so: {kind}_link {' '.join(objects.values())}"]  # fmt: skip
        os.makedirs(folder, exist_ok=True)
        Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([*NINJA, "-f", f"{folder}/build.ninja", *jobs], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            leave_out(name, error, BUILD == "1" or (kind == "cuda" and CUDA == "1"))
            return False
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy2(f"{folder}/{name}.so", path)
        return True


def extensions() -> list[Extension]:
    folders = {} if BUILD == "0" else dict.fromkeys(CPU_TARGETS, "cpu")
    if folders and (TORCH is None or sys.platform == "win32"):
        leave_out("the libraries", "building needs PyTorch, and GCC or Clang", BUILD == "1")
        return []
    if folders and (CUDA == "1" or (CUDA != "0" and os.path.exists(f"{TORCH}/lib/libtorch_cuda.so"))):
        every = "DENSE_EXT_CUDA=1 compiles for every architecture"
        if not architectures():
            print(f"dense_ext: no GPU here, so no CUDA library ({every})", file=sys.stderr)
        elif cuda_home() and cuda_target():
            print(f"dense_ext: CUDA for {architectures()} ({every})", file=sys.stderr)
            folders = {"_cuda": "cuda", **folders}  # the slowest build first
        else:
            leave_out("_cuda", f"no nvcc, or no GPU from 8.0 on among {architectures()}", CUDA == "1")
    sources = {kind: sorted([*glob("csrc/*.cpp"), *glob(f"csrc/{kind}/*.c{end}")])
               for kind, end in (("cpu", "pp"), ("cuda", "u"))}  # fmt: skip
    return [Extension(f"dense_ext.{name}", sources[kind]) for name, kind in folders.items()]


# The libraries do not use Python, so one wheel works with every version from 3.10 on.
abi3 = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(ext_modules=extensions(), cmdclass={"build_ext": Build}, options=abi3)
