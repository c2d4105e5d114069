"""What every kernel of the CUDA library takes on every architecture it holds code for; needs no GPU.

``python benchmarks/cuda_resources.py`` reads ``dense_ext/_cuda.so`` and writes
``results/cuda_resources.md``: registers, bytes of a thread's stack, where spilled registers go, and
static shared memory. A kernel with a stack is one that spills: the exit code is 1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from dense_ext.backends import CUDA

RESULT = Path(__file__).with_name("results") / "cuda_resources.md"
HEADER = ("source", "kernel", "chip", "registers", "stack", "static shared")


class Kernel(NamedTuple):
    """One compiled kernel: a line of the table."""

    source: str
    name: str
    architecture: str
    registers: int
    stack: int
    shared: int


def cuobjdump() -> str:
    """The CUDA toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        found = triton.knobs.nvidia.cuobjdump.path
    return found


def demangled(symbols: list[str]) -> list[str]:
    """The kernels' names as in the source, without namespaces and the type of their arguments."""
    names = subprocess.run(["c++filt"], input="\n".join(symbols), text=True, capture_output=True, check=True)
    short = []
    for name in names.stdout.splitlines():
        for noise in ("(anonymous namespace)::", "dense_ext::", "void "):
            name = name.replace(noise, "")
        short.append(re.sub(r" (?=>)|\(.*", "", name))
    return short


def read(usage: str) -> list[Kernel]:
    """The kernels that ``cuobjdump -res-usage`` lists."""
    entry = re.compile(r"arch = (\S+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    architecture, found = "", []
    for match in entry.finditer(usage):
        if match[1]:
            architecture = match[1]
        else:
            registers, stack, shared, local = map(int, match.groups()[2:])
            found.append((match[2], architecture, registers, stack + local, shared))
    # The compiler names a file's anonymous namespace after the file.
    sources = [re.search(r"_GLOBAL__N__\w{8}_\d+_(\w+)_cu_", symbol) for symbol, *_ in found]
    names = demangled([symbol for symbol, *_ in found])
    return sorted(
        Kernel(source[1] if source else "", name, *numbers)
        for source, name, (_, *numbers) in zip(sources, names, found, strict=True)
    )


def table(kernels: list[Kernel]) -> str:
    """The page."""
    head = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * 3 + " ---: |" * (len(HEADER) - 3)]
    title = (
        "# What the CUDA kernels take\n\n"
        "A thread's registers and bytes of stack, a block's bytes of static shared memory (1024 of them are\n"
        "the system's from sm_90 on).\n"
    )
    return "\n".join([title, *head, *("| " + " | ".join(map(str, k)) + " |" for k in kernels)]) + "\n"


def main() -> int:
    """Write the page; 1 if a kernel spills."""
    if CUDA.library.path is None:
        sys.exit(str(CUDA.library))
    command = [cuobjdump(), "-res-usage", str(CUDA.library.path)]
    kernels = read(subprocess.run(command, text=True, capture_output=True, check=True).stdout)
    RESULT.write_text(table(kernels))
    print(f"wrote {RESULT}")
    spilling = [kernel for kernel in kernels if kernel.stack]
    for kernel in spilling:
        print(f"{kernel.source} {kernel.name} on {kernel.architecture}: {kernel.stack} bytes of stack")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
