"""Builds the compiled backends; everything else about the package is in pyproject.toml.

The C++ CPU backend is compiled once for each instruction set worth having, into shared libraries
without Python in them (libtorch's stable ABI): one build serves every Python and every later
PyTorch. :mod:`dense_ext.backends.cpu` loads the one that fits the machine.

Without a working compiler the package installs all the same and runs on its reference backend.
``DENSE_EXT_BUILD=1`` makes a failed build an error, ``DENSE_EXT_BUILD=0`` skips building.
"""

from __future__ import annotations

import os
import platform
import sys
from glob import glob
from typing import Any

from setuptools import Extension, setup

REQUESTED = os.environ.get("DENSE_EXT_BUILD")

# Library -> its instruction set's compiler flags; only the default is built elsewhere.
X86_64 = {
    "_cpu_avx512": ["-march=x86-64-v4"],
    "_cpu_avx2": ["-march=x86-64-v3"],
    "_cpu_default": [],
}

FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-Wall"),
    "-fvisibility=hidden",
    # Contracting to FMA, and no errno or traps, change no result that anything relies on;
    # -ffast-math would (NaN, the order of sums).
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # runs on PyTorch 2.10 and later
]


class BuildError(RuntimeError):
    """A build that was asked for failed."""


def explain(what: str, error: object) -> None:
    """Raise if a build was asked for, else say what will be missing, and why."""
    if REQUESTED == "1":
        raise BuildError(f"{what}: {error}")
    print(
        f"\ndense_ext: {what}: {error}\n"
        "dense_ext: installing without it; where no compiled library fits, the reference backend "
        "serves (DENSE_EXT_BUILD=1 makes this an error)\n",
        file=sys.stderr,
    )


def cpu_extensions() -> list[Extension]:
    from torch.utils.cpp_extension import CppExtension

    x86_64 = platform.machine().lower() in ("x86_64", "amd64")
    libraries: dict[str, list[str]] = X86_64 if x86_64 else {"_cpu_default": []}
    return [
        CppExtension(
            f"dense_ext.{name}",
            sorted(["csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]),
            depends=sorted(glob("csrc/cpu/*.h")),
            extra_compile_args={"cxx": [*FLAGS, *isa]},
            py_limited_api=True,
        )
        for name, isa in libraries.items()
    ]


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):  # type: ignore[misc]
        """Builds each library in a folder of its own; one that fails is left out."""

        def build_extensions(self) -> None:
            self.failed: list[Extension] = []
            try:
                super().build_extensions()
            except BuildError:
                raise
            except Exception as error:  # no compiler at all
                explain("can't build the C++ backend", error)
                self.failed = list(self.extensions)
            self.extensions = [e for e in self.extensions if e not in self.failed]

        def build_extension(self, ext: Extension) -> None:
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            try:
                super().build_extension(ext)
            except Exception as error:
                explain(f"can't build {ext.name}", error)
                self.failed.append(ext)
            finally:
                self.build_temp = shared

    return Build.with_options(no_python_abi_suffix=True)  # type: ignore[no-any-return]


def extensions() -> dict[str, Any]:
    if REQUESTED == "0":
        return {}
    if sys.platform == "win32":
        explain("can't build the C++ backend", "it needs GCC's vector extensions, MSVC has none")
        return {}
    try:
        return {"ext_modules": cpu_extensions(), "cmdclass": {"build_ext": build_command()}}
    except ImportError as error:
        explain("can't build the C++ backend", error)
        return {}


# The libraries know nothing of Python: one wheel serves every version from 3.10 on.
setup(options={"bdist_wheel": {"py_limited_api": "cp310"}}, **extensions())
