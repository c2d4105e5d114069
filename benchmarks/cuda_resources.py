"""What every kernel of the CUDA library takes on every architecture it holds code for; needs no GPU.

``python benchmarks/cuda_resources.py`` reads ``dense_ext/_cuda.so`` and writes
``results/cuda_resources.md``: registers, bytes of a thread's stack, where spilled registers go, and, as
the emulator of the tests sees it launched on a DenseNet's layers, shared memory and what follows for
occupancy. A kernel with a stack is one that spills: the exit code is 1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from dense_ext.backends import CUDA

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cuda_resources.md"
HEADER = ("source", "kernel", "chip", "registers", "stack", "threads", "shared", "occupancy")

KIB = 1 << 10
# Of a multiprocessor: shared memory, most threads; and of it what one block may have. 64 Ki registers.
CHIPS = {
    "sm_80": (164 * KIB, 2048, 163 * KIB),
    "sm_86": (100 * KIB, 1536, 99 * KIB),
    "sm_89": (100 * KIB, 1536, 99 * KIB),
    "sm_90a": (228 * KIB, 2048, 227 * KIB),
    "sm_100": (228 * KIB, 2048, 227 * KIB),
    "sm_120": (100 * KIB, 1536, 99 * KIB),
}


class Kernel(NamedTuple):
    """One compiled kernel: a line of the table."""

    source: str
    name: str
    architecture: str
    registers: int
    stack: int
    threads: int
    shared: int

    @property
    def occupancy(self) -> str:
        """Share of a multiprocessor's threads that blocks of it can be, where it was seen launched."""
        if not self.threads or self.architecture not in CHIPS:
            return ""
        memory, most_threads, _ = CHIPS[self.architecture]
        # Registers are given out by the warp, eight a thread at a time; 1 KiB a block is CUDA's.
        registers = -(-self.registers // 8) * 8
        blocks = min(
            (64 * KIB) // (registers * self.threads),
            memory // (self.shared + KIB),
            most_threads // self.threads,
        )
        return f"{blocks * self.threads / most_threads:.0%}"


def cuobjdump() -> str:
    """The CUDA toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        found = triton.knobs.nvidia.cuobjdump.path
    return found


def short(name: str) -> str:
    """A kernel's name as in the source, without namespaces and the type of its arguments."""
    for noise in ("(anonymous namespace)::", "{anonymous}::", "dense_ext::", "void "):
        name = name.replace(noise, "")
    return re.sub(r" (?=>)|\(.*", "", name)


def demangled(symbols: list[str]) -> list[str]:
    """The kernels' short names."""
    names = subprocess.run(["c++filt"], input="\n".join(symbols), text=True, capture_output=True, check=True)
    return [short(name) for name in names.stdout.splitlines()]


def cases() -> Iterator[tuple[str, dict[str, object]]]:
    """Calls of every primitive on few pixels, with the channels of DenseNet-121 and 161, by primitive."""
    import tests.primitives.test_affine_gradient as affine
    import tests.primitives.test_batch_norm as batch_norm
    import tests.primitives.test_bn_relu_conv1x1 as conv1x1
    import tests.primitives.test_bn_relu_conv3x3 as conv3x3
    import tests.primitives.test_bn_relu_maxpool as maxpool
    import tests.primitives.test_bn_relu_pool_conv1x1 as transition
    import tests.primitives.test_channel_stats as stats
    from tests.primitives.harness import ALIGNED, GUARD, Maker

    pixels = (1, 9, 9)  # odd: a transition has pixels at its edges that belong to no window
    # Aligned and not, for there are kernels for both.
    for dtype, guard in product((torch.bfloat16, torch.float16, torch.float32), (ALIGNED, GUARD)):
        maker = Maker(dtype, torch.device("cpu"), guard=guard)
        made = [case(maker, 64) for case in batch_norm.CASES]
        pooled = maxpool.forward_case, maxpool.backward_case, maxpool.norm_backward_case
        one_size = (stats.stats_case, affine.affine_case, affine.accumulate_case, *pooled)
        made += [case(maker, (*pixels, 64)) for case in one_size]
        transitions = transition.forward_case, transition.backward_case, transition.norm_backward_case
        for made_by, sizes in (
            ((conv1x1.forward_case, conv1x1.backward_case), ((256, 48), (256, 128), (256, 192))),
            ((conv3x3.forward_case, conv3x3.backward_case), ((128, 32), (192, 48))),
            (transitions, ((256, 128), (512, 256))),
        ):
            made += [case(maker, (*pixels, *size)) for case in made_by for size in sizes]
        if dtype != torch.float32:  # pixels enough for the large patches of these
            made += [c(maker, (4, 32, 32, 128, 32)) for c in (conv3x3.forward_case, conv3x3.backward_case)]
        for case in made:
            yield case.primitive, case.arguments


def launches(shared_bytes: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Threads and shared memory of a block, by source and kernel, on a chip that gives a block so much."""
    sys.path.insert(0, str(ROOT))
    from tests.emulator import emulator

    gpu = emulator()
    gpu.reset(shared_bytes=shared_bytes)
    for primitive, arguments in cases():
        for tf32 in (False, True):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                getattr(gpu.backend, primitive)(**arguments)
    found = {}
    sources = [path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    for (place, function), numbers in gpu.counters.kernels.items():
        name = re.search(r"kKernel = (.*?); Arguments = ", function)
        assert name is not None, function
        # A launch may stand in a header, whose name begins with that of its source.
        source = max((stem for stem in sources if place.startswith(stem)), key=len)
        found[source, short(name[1])] = numbers
    return found


def read(usage: str) -> list[Kernel]:
    """The kernels that ``cuobjdump -res-usage`` lists."""
    entry = re.compile(r"arch = (\S+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    architecture, found = "", []
    for match in entry.finditer(usage):
        if match[1]:
            architecture = match[1]
        else:
            registers, stack, shared, local = map(int, match.groups()[2:])
            found.append((match[2], architecture, registers, stack + local, 0, shared))
    # The compiler names a file's anonymous namespace after the file.
    sources = [re.search(r"_GLOBAL__N__\w{8}_\d+_(\w+)_cu_", symbol) for symbol, *_ in found]
    names = demangled([symbol for symbol, *_ in found])
    return sorted(
        Kernel(source[1] if source else "", name, *numbers)
        for source, name, (_, *numbers) in zip(sources, names, found, strict=True)
    )


def compiler_of(library: Path) -> str:
    """The version of the nvcc that made a library, as its kernels say."""
    version = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", library.read_bytes())
    return version[1].decode() if version else "unknown"


def kernels_of(library: Path) -> list[Kernel]:
    """The kernels of a library, on each of its chips."""
    command = [cuobjdump(), "-res-usage", str(library)]
    return read(subprocess.run(command, text=True, capture_output=True, check=True).stdout)


def as_launched(kernels: list[Kernel]) -> list[Kernel]:
    """With the threads and the shared memory of their launches."""
    by_chip = {name: launches(shared_bytes) for name, (_, _, shared_bytes) in CHIPS.items()}
    found = []
    for kernel in kernels:
        seen = by_chip.get(kernel.architecture, {}).get((kernel.source, kernel.name))
        found.append(kernel if seen is None else kernel._replace(threads=seen[0], shared=seen[1]))
    return found


def table(kernels: list[Kernel], compiler: str) -> str:
    """The page."""
    head = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * 3 + " ---: |" * (len(HEADER) - 3)]
    title = (
        "# What the CUDA kernels take\n\n"
        "A thread's registers and bytes of stack; a block's threads and bytes of shared memory, the most on\n"
        "the layers of DenseNet-121 and 161; and the share of a multiprocessor's threads they can be.\n"
        f"Compiled by nvcc {compiler}.\n"
    )
    rows = ["| " + " | ".join(map(str, (*k, k.occupancy))) + " |" for k in kernels]
    return "\n".join([title, *head, *rows]) + "\n"


def main() -> int:
    """Write the page; 1 if a kernel spills."""
    if CUDA.library.path is None:
        sys.exit(str(CUDA.library))
    kernels = as_launched(kernels_of(CUDA.library.path))
    RESULT.write_text(table(kernels, compiler_of(CUDA.library.path)))
    print(f"wrote {RESULT}")
    spilling = [kernel for kernel in kernels if kernel.stack]
    for kernel in spilling:
        print(f"{kernel.source} {kernel.name} on {kernel.architecture}: {kernel.stack} bytes of stack")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
