"""The C++ backend for CPUs.

setup.py compiles the same sources for several instruction sets, or for this machine's alone. The library that
is loaded is the one for the instruction set that PyTorch uses on this machine
(``torch.backends.cpu.get_cpu_capability()``), and for its bfloat16 instructions if it has any.
``ATEN_CPU_CAPABILITY``, which selects PyTorch's instruction set, selects ours too, without those
instructions.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from .base import STORAGE_DTYPES, FrozenBlocks, FrozenTransitions, PlainBlocks, accumulate_dtype
from .compiled import BLOCK_OPS, PACKAGE, CompiledBackend, Library
from .table import PRIMITIVES

# PyTorch's name for the instruction set -> the libraries that such a machine can run, best first.
LIBRARIES = {
    "AVX512_BF16": ("_cpu_avx512_bf16", "_cpu_avx512", "_cpu_avx2", "_cpu_default"),
    "AVX512": ("_cpu_avx512", "_cpu_avx2", "_cpu_default"),
    "AVX2": ("_cpu_avx2", "_cpu_default"),
    "NEON_BF16": ("_cpu_neon_bf16", "_cpu_default"),
}
ELSEWHERE = ("_cpu_default",)
# The ops of frozen blocks and transitions, in the order of their fields; and all ops of a library.
_OF_FROZEN_BLOCKS = ("frozen_block_forward", "pack_frozen_block", "packed_dense_block")
_OF_FROZEN_TRANSITIONS = ("pack_frozen_transition", "packed_transition")
OPS = (*PRIMITIVES, *BLOCK_OPS, *_OF_FROZEN_BLOCKS, *_OF_FROZEN_TRANSITIONS)


def instruction_set() -> str:
    """PyTorch's name for the instruction set to use, or ours for one with bfloat16 instructions."""
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        if torch.cpu._is_avx512_bf16_supported():
            return "AVX512_BF16"
        if platform.machine() == "aarch64" and " bf16" in Path("/proc/cpuinfo").read_text():
            return "NEON_BF16"
    return torch.backends.cpu.get_cpu_capability()


def libraries() -> tuple[str, ...]:
    """The names of the libraries that this machine can run, best first."""
    return LIBRARIES.get(instruction_set(), ELSEWHERE)


def _library() -> Library:
    names = libraries()
    absent = f"the C++ backend is not built: none of {', '.join(names)} is in {PACKAGE}"
    paths = [PACKAGE / f"{name}.so" for name in names]
    return Library(paths, "dense_ext", absent, OPS)


# The widest vector and panel of the matrix product over all instruction sets, in values; see csrc/cpu/gemm.h.
_VECTOR, _PANEL = 16, 32
_POINTS = 16  # of Winograd's algorithm, for the nine taps of a 3x3 window


def _whole(channels: int, width: int) -> int:
    """``channels`` rounded up to a multiple of ``width``."""
    return -(-channels // width) * width


def _takes_points(sizes: Sequence[int]) -> bool:
    """Whether 3x3 convolutions of [N, (D,) H, W] are Winograd's, where operands are not rounded."""
    # csrc/cpu/winograd.h: winograd_pays
    images = sizes[0] if len(sizes) == 3 or sizes[1] == 1 else 1
    tiles = images * math.prod(-(-size // 2) for size in sizes[-2:])
    return 9 * images * math.prod(sizes[-2:]) > 20 * tiles + 90


class CPUBackend(CompiledBackend):
    """Runs the primitives in C++ on the CPU."""

    name = "cpu"
    takes_volumes = True

    def __init__(self, library: Library | None = None) -> None:
        super().__init__(library or _library())
        self.plain_blocks = PlainBlocks(*map(self.library.op, BLOCK_OPS))
        op, size = self.library.op, self._packed_size
        forward, pack, forward_packed = map(op, _OF_FROZEN_BLOCKS)
        self.frozen_blocks = FrozenBlocks(forward, pack, forward_packed, size)
        pack, forward_packed = map(op, _OF_FROZEN_TRANSITIONS)
        self.frozen_transitions = FrozenTransitions(pack, forward_packed, size)

    def rounds_operands(self, dtype: torch.dtype) -> bool:
        # csrc/cpu/vector.h: Operand
        return dtype == torch.bfloat16 and "bf16" in str(self.library)

    def takes_weights(self, dtype: torch.dtype, weights: torch.dtype) -> bool:
        # csrc/cpu/tensor.h: dispatch
        return weights == dtype or (dtype == torch.float32 and self.rounds_operands(weights))

    def _packed_size(self, convs: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        # csrc/cpu/prepared.h: PackedMemory and Prepared. A pair of bfloat16 values counts as one.
        values, size = 2 if self.rounds_operands(dtype) else 1, _PANEL
        for channels_out, channels_in, *window in convs:
            # csrc/cpu/frozen_block.cpp: PreparedLayer. The points stand behind the taps.
            weights = math.prod(window) + (_POINTS if values == 1 and math.prod(window) == 9 else 0)
            elements = weights * _whole(channels_in, values) // values
            size += 2 * _whole(channels_in, _PANEL) + elements * _whole(channels_out, _PANEL)
        return size

    def unavailable_reason(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.library.reason is not None:
            return self.library.reason
        if primitive not in PRIMITIVES:
            return f"there is no primitive {primitive!r}"
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not one of {', '.join(str(d) for d in STORAGE_DTYPES)}"
        return None

    def scratch_bytes(
        self,
        primitive: str,
        sizes: Sequence[int],
        in_channels: int,
        out_channels: int,
        dtype: torch.dtype,
    ) -> int:
        threads, wide = torch.get_num_threads(), accumulate_dtype(dtype).itemsize
        operand = dtype.itemsize if self.rounds_operands(dtype) else wide
        sums = 2 * 8 * threads * max(in_channels, out_channels)  # two float64 per thread and channel
        if "conv" not in primitive:
            return sums
        # Forward packs the weight. Backward packs it transposed, and each thread has its own weight gradient.
        taps = 3 ** (len(sizes) - 1) if "conv3x3" in primitive else 1
        points = _POINTS * taps // 9 if taps > 1 and operand == wide and _takes_points(sizes) else 0
        transposed = (taps + points) * _whole(in_channels, _PANEL) * out_channels
        if primitive.endswith("forward"):
            return sums + operand * (taps + points) * in_channels * _whole(out_channels, _PANEL)
        gradient = max(taps, points) * in_channels * _whole(out_channels, _VECTOR) if taps > 1 else transposed
        return sums + operand * transposed + wide * threads * gradient
