"""The emulator catches faults that are planted in the kernels, one at a time.

A fault replaces a text in a source by another. The same cases pass with the unchanged source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from ..compiling import leave_out_dtypes, plant
from ..emulator import Emulator
from ..emulator.build import build
from ..primitives import test_bn_relu_conv1x1 as conv1x1
from ..primitives import test_bn_relu_conv3x3 as conv3x3
from ..primitives import test_bn_relu_maxpool as maxpool
from ..primitives import test_channel_stats as channel_stats
from ..primitives.common import MakeCase, Size
from ..primitives.harness import ALIGNED, Maker, check_values
from ..sanitizers import CPU
from .cases import run_sanitized
from .test_schedules import SCHEDULES


@dataclass(frozen=True)
class Fault:
    """A fault, the case that shows it, and the error that catches it.

    Attributes:
        kernel: the .cu file that shows the fault, in ``case`` with ``size``.
        path: the file that contains the fault.
        text: the text in that file that ``replacement`` replaces; it occurs once.
        caught: a pattern that the error matches.
    """

    kernel: str
    case: MakeCase
    size: Size
    path: str
    text: str
    replacement: str
    caught: str

    def plant(self, folder: Path) -> Path:
        """A copy of csrc/cuda with the fault."""
        return plant(folder, f"cuda/{self.path}", self.text, self.replacement) / "cuda"

    def run(self, gpu: Emulator) -> None:
        """Run the case in several orders of warps; some faults show only if a certain warp runs ahead."""
        for order, seed in SCHEDULES:
            gpu.reset(order=order, seed=seed, multiprocessors=1)  # so that a block has several tiles
            check_values(gpu.backend, self.case(Maker(torch.bfloat16, CPU, guard=ALIGNED), self.size))


forward_1x1 = partial(Fault, "bn_relu_conv1x1.cu", conv1x1.forward_case, (2, 12, 17, 104, 48))
backward_1x1 = partial(Fault, "bn_relu_conv1x1.cu", conv1x1.backward_case, (2, 12, 17, 72, 48))
backward_3x3 = partial(Fault, "bn_relu_conv3x3.cu", conv3x3.backward_case, (2, 5, 7, 40, 32))
pool = partial(Fault, "bn_relu_maxpool.cu", maxpool.backward_case)
stats = partial(Fault, "channel_stats.cu", channel_stats.stats_case, (2, 9, 9, 40))

WRONG_VALUES = "off by|NaN in other places"

FAULTS = {
    # One warp reads too early or too late what another writes.
    "no barrier before reading": forward_1x1(
        "tile.cuh",
        "prepare(step, stage);\n    sync_threads();\n",
        "prepare(step, stage);\n",
        WRONG_VALUES,
    ),
    "no barrier before writing": Fault(
        "bn_relu_conv1x1.cu",
        partial(conv1x1.forward_case, statistics=False),
        (2, 12, 17, 104, 48),
        "bn_relu_conv1x1_forward.cuh",
        "      sync_threads();\n    }\n    if (args.moments.rows) {\n",
        "    }\n    if (args.moments.rows) {\n",
        WRONG_VALUES,
    ),
    "no wait for copies": forward_1x1("tile.cuh", "copy_async_wait<kStages - 2>();", "", WRONG_VALUES),
    "a wait for one group too few": forward_1x1(
        "tile.cuh",
        "copy_async_wait<kStages - 2>();",
        "copy_async_wait<kStages - 1>();",
        WRONG_VALUES,
    ),
    "a block that takes itself for the last": stats(
        "grid_moments.cuh",
        "count_arrival(counter) == count - 1",
        "count_arrival(counter) == count - 2",
        WRONG_VALUES,
    ),
    "copies that nothing waits for": pool(
        (1, 16, 16, 40),
        "strips.cuh",
        "if (i <= lines) {",
        "{",
        "a thread ends with copies under way that nothing waited for",
    ),
    # Producer and consumer warps do not wait for each other.
    "a stage used before it is full": backward_3x3(
        "bn_relu_conv3x3_backward.cuh",
        "      form_dy(to, parity);\n      Barriers::filled(stage);\n",
        "      Barriers::filled(stage);\n      form_dy(to, parity);\n",
        WRONG_VALUES,
    ),
    "a stage filled before it is empty": Fault(
        "bn_relu_conv3x3.cu",
        conv3x3.forward_case,
        (4, 40, 17, 40, 32),  # so that a block has several patches
        "bn_relu_conv3x3_forward.cuh",
        "if (keeps_weight() && step >= 2) Barriers::wait_until_empty(stage);",
        "if (keeps_weight() && step >= 2) Barriers::emptied(stage);",
        f"{WRONG_VALUES}|threads wait for each other",
    ),
    "a weight overwritten before it is read": backward_1x1(
        "bn_relu_conv1x1_backward.cuh",
        "if (tile >= block_y() + (kStages - 1) * grid_y()) Barriers::wait_until_empty",
        "if (tile >= block_y() + (kStages - 1) * grid_y()) Barriers::emptied",
        f"{WRONG_VALUES}|threads wait for each other",
    ),
    "a tile stored after its arrival": backward_1x1(
        "bn_relu_conv1x1_backward.cuh",
        "        store(ahead[n], vectors, stage_at(stage));\n        load(ahead[n], next);\n"
        "        Barriers::filled(stage);\n",
        "        Barriers::filled(stage);\n"
        "        store(ahead[n], vectors, stage_at(stage));\n        load(ahead[n], next);\n",
        WRONG_VALUES,
    ),
    "an arrival that nothing waits for": backward_3x3(
        "bn_relu_conv3x3_backward.cuh",
        "if (step + stage_count() < count) Barriers::emptied",
        "Barriers::emptied",
        "threads arrived at a barrier that nobody waits at",
    ),
    # Threads diverge at a collective operation.
    "a barrier for some": backward_1x1(
        "reduce.cu",
        "    sync_threads();\n    if (warp_index() < half)",
        "    if (warp_index() < half) sync_threads();\n    if (warp_index() < half)",
        "threads wait for each other: .* at reduce.cu:.* at the end of the kernel",
    ),
    "two barriers for one": stats(
        "channel_stats.cu",
        "    sync_threads();\n",
        "    if (group > 0)\n      sync_threads();\n    else\n      sync_threads();\n",
        "threads wait at different barriers: channel_stats.cu:.* and channel_stats.cu:",
    ),
    "a shuffle for some": backward_1x1(
        "product.cuh",
        "      if (at.row > 0) continue;\n",
        "      if (at.row > 0) break;\n",
        "threads wait for each other: 480 at bn_relu_conv1x1_backward.cuh:.* 32 at product.cuh:",
    ),
    # Wrong addresses.
    "one channel too many": pool(
        (1, 16, 16, 33),
        "strips.cuh",
        "if (i < size) store_global(pixel",
        "if (i <= size) store_global(pixel",
        "wrote outside its outputs",
    ),
    "a fragment's quarters exchanged": backward_1x1(
        "product.cuh",
        "lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8, k, further",
        "lane % 16, column + lane / 16 * 8, k, further",
        WRONG_VALUES,
    ),
    "slots without a pixel added up": backward_3x3(
        "bn_relu_conv3x3_weight_gradient.cuh",
        "          keep_rows<T>(b[i], used + slot);\n",
        "",
        WRONG_VALUES,
    ),
    "the line above for its neighbour": backward_3x3(
        "bn_relu_conv3x3_weight_gradient.cuh", "if (l >= 2) add(2);", "if (l >= 2) add(1);", WRONG_VALUES
    ),
    "more shared memory than asked for": stats(
        "channel_stats.cu",
        "bytes_of(kThreads * elements",
        "bytes_of(kThreads / 2 * elements",
        "the block takes .* bytes of shared memory, launched with",
    ),
    # Uninitialised registers.
    "a sum that begins with nothing": backward_1x1(
        "bn_relu_conv1x1_backward.cuh",
        "float da[1][kDataColumns][4] = {};",
        "float da[1][kDataColumns][4];",
        WRONG_VALUES,
    ),
}

# The flags for the fastest build. Files without a fault are compiled only once.
FAST = ("-O0", "-g0")


def planted(name: str, folder: Path) -> Emulator:
    """An emulator that runs a fault's kernel."""
    fault, namespace = FAULTS[name], "dense_ext_fault_" + re.sub(r"\W", "_", name)
    cuda = fault.plant(folder / "csrc")
    leave_out_dtypes(cuda / "tensor.cuh", "Float", "Half")
    leave_out_narrow_accesses(cuda)
    return Emulator(build(cuda, fault.kernel, namespace, FAST), namespace)


def leave_out_narrow_accesses(cuda: Path) -> None:
    """Compile a copy of csrc/cuda for accesses of 16 bytes alone, which all cases here have."""
    path = cuda / "tile.cuh"
    narrow, error = "body(std::false_type{});", 'STD_TORCH_CHECK(false, "left out");'
    source = path.read_text()
    if source.count(narrow) != 1:
        raise LookupError("tile.cuh has changed: leave narrow accesses out anew")
    path.write_text(source.replace(narrow, error))


@pytest.mark.parametrize("name", FAULTS)
def test_fault(gpu: Emulator, name: str, tmp_path: Path) -> None:
    FAULTS[name].run(gpu)
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[name].caught):
        FAULTS[name].run(planted(name, tmp_path))


def test_after_a_failure(tmp_path: Path) -> None:
    """A failed launch does not affect the next one."""
    name = "a shuffle for some"
    gpu = planted(name, tmp_path)
    with pytest.raises(RuntimeError, match="threads wait for each other"):
        FAULTS[name].run(gpu)
    FAULTS["no wait for copies"].run(gpu)  # its fault is not planted here, so it passes


# Faults that only a sanitizer catches: accesses beyond an array in shared memory, or beyond a tensor.
INVALID_ACCESSES = {
    "beyond an array": stats(
        "channel_stats.cu",
        "shared.take<Moments>(kThreads * V::kSize)",
        "shared.take<Moments>(kThreads * V::kSize - 1)",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "beyond the last pixel": stats(
        "channel_stats.cu",
        "      if (next + k * distance >= pixels) continue;\n      x[k]",
        "      if (next + k * distance > pixels) continue;\n      x[k]",
        "AddressSanitizer: heap-buffer-overflow",
    ),
}


@pytest.mark.parametrize("name", INVALID_ACCESSES)
def test_invalid_access(name: str, tmp_path: Path) -> None:
    """The sanitizer catches them; test_sanitizers.py shows that the unchanged source passes."""
    fault = INVALID_ACCESSES[name]
    ran = run_sanitized("channel_stats", cuda=fault.plant(tmp_path / "csrc"), kernels=fault.kernel)
    assert ran.returncode != 0
    assert fault.caught in ran.stderr
    assert fault.path in ran.stderr, "the report names the file"
