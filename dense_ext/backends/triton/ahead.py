"""Compiles the table's kernels ahead of time, also for GPUs this machine lacks, and reports their resources.

The registers, spilled bytes and shared memory of a kernel decide whether a configuration is worth shipping.
They are known without a GPU.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from .configs import Row
from .launch import Kernel, Variant, dot_precision

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory per multiprocessor, and the maximum per block (CUDA C++ Programming Guide,
# "Compute capabilities"; AMD CDNA3 has 64 KiB of LDS). Compute capabilities 8.6, 8.9 and 12.0 use sm_80's
# rows, so the maximum per block is theirs.
SHARED = {
    "sm_80": (164 << 10, 99 << 10),
    "sm_90": (228 << 10, 227 << 10),
    "sm_100": (228 << 10, 227 << 10),
    "gfx942": (64 << 10, 64 << 10),
}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32

_MODULES = {
    "channel_stats": "channel_stats",
    "affine_gradient": "affine_gradient",
    "scaled_accumulate": "affine_gradient",
}


@dataclass(frozen=True)
class Resources:
    """The resources a compiled kernel uses.

    Attributes:
        registers: registers per thread.
        spilled: bytes of stack per thread to which registers spill.
        shared: bytes of shared memory per block.
        occupancy: blocks that fit on one multiprocessor at a time (NVIDIA only, else None).
        tensor_core_instructions: the number of matrix instructions in the code.
        accesses: the number of loads and stores of global memory by width in bytes (NVIDIA only).
    """

    registers: int
    spilled: int
    shared: int
    occupancy: int | None
    tensor_core_instructions: int
    accesses: dict[str, int]


def kernel_of(name: str) -> Kernel:
    """The kernel of that name in the table."""
    module = _MODULES.get(name) or re.sub(r"_(forward|backward|sums|weight|data)(_\w+)?$", "", name)
    functions = importlib.import_module(f".{module}", __package__)
    return Kernel(getattr(functions, f"{name}_kernel"))


def dtypes_of(precision: str) -> list[torch.dtype]:
    """The storage dtypes to which a row of that precision applies."""
    sixteen = [torch.bfloat16, torch.float16]
    return {"16bit": sixteen, "any": [*sixteen, torch.float32]}.get(precision, [torch.float32])


def variant_of(row: Row, dtype: torch.dtype, alignment: int = 16) -> Variant:
    """How the row's kernel is compiled in the common case: with every output, and 16-byte alignment."""
    names = kernel_of(row.kernel).function.arg_names
    constants = {
        "UNIT": alignment // dtype.itemsize,
        "PRECISION": dot_precision(row.precision),
        "WEIGHT": True,
        **row.config.blocks,
    }
    pointers = [name for name in names if name.endswith(("_ptr", "_vec"))]
    fixed = tuple((name, constants[name]) for name in names if name in constants)
    numbers = len(names) - len(pointers) - len(fixed)
    types = tuple(dtype if name.endswith("_ptr") else torch.float32 for name in pointers)
    return Variant(types, ("i32",) * numbers, alignment, fixed, row.config.options)


def compile_row(row: Row, dtype: torch.dtype, alignment: int = 16) -> tuple[CompiledKernel, Resources]:
    """Compile a row's kernel for its architecture, and measure its resources."""
    kernel = kernel_of(row.kernel).compile(variant_of(row, dtype, alignment), GPUS[row.architecture])
    measure = _amd_resources if row.architecture.startswith("gfx") else _nvidia_resources
    return kernel, measure(row, kernel)


def _amd_resources(row: Row, kernel: CompiledKernel) -> Resources:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])
        return int(found.group(1)) if found else 0

    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    instructions = kernel.asm["amdgcn"].count("v_mfma")
    return Resources(number("vgpr_count"), spilled, kernel.metadata.shared, None, instructions, {})


def _nvidia_resources(row: Row, kernel: CompiledKernel) -> Resources:
    registers, spilled = _registers_and_stack(kernel.asm["cubin"])
    shared, threads = kernel.metadata.shared, row.config.num_warps * 32
    available, _ = SHARED[row.architecture]
    # Registers are allocated in multiples of 8 per thread, and the system reserves 1 KiB of shared memory
    # per block.
    occupancy = min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        available // (shared + 1024),
        THREADS // threads,
        BLOCKS,
    )
    instructions = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", kernel.asm["ptx"]))
    return Resources(registers, spilled, shared, occupancy, instructions, _accesses(kernel.asm["ptx"]))


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump did not report the kernel's registers and stack: {report!r}")
    return int(found.group(1)), int(found.group(2))


def _accesses(ptx: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for width in _widths(ptx):
        counts[str(width)] = counts.get(str(width), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _widths(ptx: str) -> Iterator[int]:
    for vector, bits in re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx):
        yield int(vector or 1) * int(bits) // 8
    for size in re.findall(
        r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx
    ):
        yield int(size, 0)
