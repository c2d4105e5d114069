"""The bytes that the kernels move to and from global memory, and their bank conflicts in shared memory.

The tests use bfloat16, and channels and slices that are multiples of 32 bytes, as in a DenseNet.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from ..emulator import SHARED_BYTES, Emulator
from ..primitives import test_affine_gradient as affine
from ..primitives import test_bn_relu_conv1x1 as conv1x1
from ..primitives import test_bn_relu_conv3x3 as conv3x3
from ..primitives import test_bn_relu_maxpool as maxpool
from ..primitives import test_bn_relu_pool_conv1x1 as transition
from ..primitives import test_channel_stats as channel_stats
from ..primitives.common import MakeCase, Size
from ..primitives.harness import Maker
from ..sanitizers import CPU

NARROW, WIDE = 2, 4  # the bytes of an activation or a weight, and of a float32 in vectors and sums
SECTOR = 32
PASS, FRAGMENT = 128, 512  # bytes: what shared memory delivers per cycle, and a product's fragment of 16 x 16


@dataclass
class Traffic:
    """The expected bytes, from the counts in each kernel file's header and what it says is read again.

    Attributes:
        columns: the number of blocks side by side, each with a part of the channels.
        moments: the channels whose moments the kernel completes.
        row: the floats of partial results that each row of blocks writes for a second kernel, which reads
            ``row_read`` floats of them. Each of its blocks takes 32 of ``reduced`` channels or elements.
        block_loads: the further bytes that each row of blocks loads.
        scattered: the elements of a weight gradient, which are stored one by one in the order of the
            partial results, not of the weight.
        passes: the number of kernels with the same grid.
        others: the blocks of further kernels.
    """

    loads: int
    stores: int
    columns: int = 1
    moments: int = 0
    row: int = 0
    row_read: int = 0
    reduced: int = 0
    block_loads: int = 0
    scattered: int = 0
    passes: int = 1
    others: int = 0

    def total(self, blocks: int) -> tuple[int, int]:
        """The bytes that all kernels load and store, for this number of blocks."""
        rows = (blocks - math.ceil(self.reduced / 32) - self.others) // self.columns // self.passes
        loads = self.loads + rows * (self.block_loads + self.row_read * WIDE)
        stores = self.stores + rows * self.row * WIDE
        if self.moments:
            # Each block leaves a row, and each of 16 groups of blocks. A row has one count, which is read for
            # every channel. Blocks and groups count their arrivals, and a counter's last sets it to zero.
            groups = min(16, rows)
            arrivals = self.columns * (rows + groups)
            loads += (arrivals + (rows + groups) * 3 * self.moments) * WIDE
            stores += (2 * arrivals + (rows + groups) * 2 * self.moments) * WIDE
            stores += self.columns * (groups + 1) * WIDE
        return loads, stores


def sums(channels: int, elements: int = 0) -> dict[str, int]:
    """Reads and writes rows of each channel's two sums, and of the elements of a weight gradient."""
    row = 2 * channels + elements
    return {"row": row, "row_read": row, "reduced": channels + elements}


def conv1x1_forward(n: int, h: int, w: int, c: int, b: int) -> Traffic:
    """X is read for each 128 channels of z; each tile reads the weight and two vectors."""
    m, columns, tiles = n * h * w, math.ceil(b / 128), math.ceil(n * h * w / 128)
    return Traffic(
        loads=columns * m * c * NARROW + tiles * (b * c * NARROW + columns * 2 * c * WIDE),
        stores=m * b * NARROW + 2 * b * WIDE,
        columns=columns,
        moments=b,
    )


def conv1x1_backward(n: int, h: int, w: int, c: int, b: int) -> Traffic:
    """grad_bn and z are read for each 64 channels of x; a block reads the weight and the vectors once."""
    m, columns = n * h * w, math.ceil(c / 64)
    return Traffic(
        loads=m * (2 * c + columns * 2 * b) * NARROW,
        stores=m * c * NARROW + 2 * c * WIDE + b * c * NARROW,
        columns=columns,
        block_loads=b * c * NARROW + (columns * 3 * b + 3 * c) * WIDE,
        scattered=b * c,
        **sums(c, b * c),
    )


def with_borders(h: int, w: int, rows: int, columns: int) -> int:
    """The number of pixels that patches read: those of the image, and those at their borders again."""
    return (h + 2 * (h // rows - 1)) * (w + 2 * (w // columns - 1))


def conv3x3_forward(n: int, h: int, w: int, b: int, k: int) -> Traffic:
    """z, with the borders of patches of 16 x 16, and two vectors per patch, for each 32 or 48 channels of y.

    The weight fits into shared memory, so a block reads it once.
    """
    m, columns, patches = n * h * w, min(math.ceil(k / 32), math.ceil(k / 48)), n * (h // 16) * (w // 16)
    return Traffic(
        loads=columns * (n * with_borders(h, w, 16, 16) * b * NARROW + patches * 2 * b * WIDE),
        stores=m * k * NARROW + 2 * k * WIDE,
        columns=columns,
        block_loads=9 * k * b * NARROW,
        moments=k,
    )


def conv3x3_backward(n: int, h: int, w: int, b: int, k: int) -> Traffic:
    """Grad and y, with the borders of patches of 16 x 16, are read for each 32 channels of z."""
    m, columns = n * h * w, math.ceil(b / 32)
    return Traffic(
        loads=columns * 2 * n * with_borders(h, w, 16, 16) * k * NARROW + m * b * NARROW,
        stores=m * b * NARROW + 2 * b * WIDE + 9 * k * b * NARROW,
        columns=columns,
        block_loads=9 * k * b * NARROW + (columns * 2 * k + 3 * b) * WIDE,
        scattered=9 * k * b,
        **sums(b, 9 * k * b),
    )


def maxpool_forward(n: int, h: int, w: int, c: int) -> Traffic:
    """The images have one strip, so no edges are read twice; each of a block's 8 warps reads the vectors."""
    m = n * h * w
    loads, stores = m * c * NARROW, m // 4 * c * NARROW
    return Traffic(loads, stores, columns=math.ceil(c / 64), block_loads=8 * 2 * c * WIDE)


def maxpool_backward(n: int, h: int, w: int, c: int) -> Traffic:
    m = n * h * w
    return Traffic(
        loads=(m + m // 4) * c * NARROW,
        stores=m * c * NARROW + 2 * c * WIDE,
        columns=math.ceil(c / 64),
        block_loads=8 * 3 * c * WIDE,
        **sums(c),
    )


def maxpool_norm_backward(n: int, h: int, w: int, c: int) -> Traffic:
    """Computes the sums and then grad_x, so x and grad are read twice."""
    m = n * h * w
    return Traffic(
        loads=2 * (m + m // 4) * c * NARROW + 7 * c * WIDE,
        stores=m * c * NARROW + (2 + 4) * c * WIDE,
        columns=math.ceil(c / 64),
        block_loads=8 * (3 + 4) * c * WIDE,
        passes=2,
        others=math.ceil(c / 128),
        **sums(c),
    )


def transition_forward(n: int, h: int, w: int, c: int, k: int) -> Traffic:
    """X and two vectors are read for each 256 channels of y; each tile of 64 windows reads the weight."""
    windows, columns = n * h * w // 4, math.ceil(k / 256)
    return Traffic(
        loads=columns * 4 * windows * c * NARROW + windows // 64 * (k * c * NARROW + columns * 2 * c * WIDE),
        stores=windows * k * NARROW,
        columns=columns,
    )


def transition_backward(n: int, h: int, w: int, c: int, k: int) -> Traffic:
    """Two kernels with equal grids.

    The first reads x once and writes p; it reads grad for each 128 channels of x, and the weight for each
    tile of 64 windows. The second reads p for each 128 of K, and grad as the first does. Blocks that run at
    the same time read the same data, so repeated reads come from the L2 cache.
    """
    windows, columns = n * h * w // 4, math.ceil(c / 128)
    return Traffic(
        loads=(4 * windows * c + columns * windows * k + windows // 64 * k * c) * NARROW
        + (math.ceil(k / 128) * windows * c + columns * windows * k) * NARROW,
        stores=(4 * windows * c + windows * c) * NARROW + 2 * c * WIDE + k * c * NARROW,
        columns=columns,
        block_loads=3 * c * WIDE,
        passes=2,
        **sums(c, k * c),
    )


def transition_norm_backward(n: int, h: int, w: int, c: int, k: int) -> Traffic:
    """Runs the first kernel again for grad_x, with the u and v from the sums; x and grad are read twice."""
    traffic, windows, columns = transition_backward(n, h, w, c, k), n * h * w // 4, math.ceil(c / 128)
    again = (4 * windows * c + columns * windows * k + windows // 64 * k * c) * NARROW
    return replace(
        traffic,
        loads=traffic.loads + again + 7 * c * WIDE,
        stores=traffic.stores + 4 * c * WIDE,
        block_loads=(3 + 4) * c * WIDE,
        passes=3,
        others=math.ceil(c / 128),
    )


def stats(n: int, h: int, w: int, c: int) -> Traffic:
    return Traffic(loads=n * h * w * c * NARROW, stores=2 * c * WIDE, moments=c)


def affine_gradient(n: int, h: int, w: int, c: int) -> Traffic:
    """Each of a block's 256 threads reads two vectors of 8 channels."""
    size = n * h * w * c * NARROW
    return Traffic(loads=2 * size, stores=size, block_loads=256 * 2 * 8 * WIDE)


def accumulate(n: int, h: int, w: int, c: int) -> Traffic:
    size = n * h * w * c * NARROW
    return Traffic(loads=2 * size, stores=size, block_loads=256 * 8 * WIDE)


TESTED = {
    "1x1 forward": (conv1x1.forward_case, (2, 24, 16, 96, 160), conv1x1_forward),
    "1x1 backward": (conv1x1.backward_case, (2, 24, 16, 96, 128), conv1x1_backward),
    "3x3 forward": (conv3x3.forward_case, (2, 32, 32, 64, 48), conv3x3_forward),
    "3x3 backward": (conv3x3.backward_case, (2, 32, 32, 96, 32), conv3x3_backward),
    "transition forward": (transition.forward_case, (2, 32, 32, 96, 288), transition_forward),
    "transition backward": (transition.backward_case, (4, 32, 32, 160, 64), transition_backward),
    "transition norm backward": (
        transition.norm_backward_case,
        (4, 32, 32, 160, 64),
        transition_norm_backward,
    ),
    "maxpool forward": (maxpool.forward_case, (4, 28, 28, 96), maxpool_forward),
    "maxpool backward": (maxpool.backward_case, (4, 28, 28, 96), maxpool_backward),
    "maxpool norm backward": (maxpool.norm_backward_case, (4, 28, 28, 96), maxpool_norm_backward),
    "channel_stats": (channel_stats.stats_case, (4, 48, 48, 64), stats),
    "affine_gradient": (affine.affine_case, (8, 48, 48, 64), affine_gradient),
    "scaled_accumulate": (affine.accumulate_case, (8, 48, 48, 64), accumulate),
}


def count(gpu: Emulator, make: MakeCase, size: Size, **settings: object) -> None:
    """Run a case on four multiprocessors and count its accesses."""
    gpu.reset(count=True, multiprocessors=4, **settings)
    make(Maker(torch.bfloat16, CPU, guard=SECTOR // NARROW), size).run(gpu.backend)


@pytest.mark.parametrize("name", TESTED)
def test_bytes(gpu: Emulator, name: str) -> None:
    """The bytes are those of the formula, and accesses leave almost no part of a sector unused."""
    make, size, formula = TESTED[name]
    count(gpu, make, size)
    counters, traffic = gpu.counters, formula(*size)
    moved = counters.global_loads, counters.global_stores
    assert moved == traffic.total(counters.blocks)
    assert counters.global_sectors * SECTOR <= 1.05 * sum(moved) + traffic.scattered * SECTOR


# --- shared memory ---------------------------------------------------------------------------------


def conflicts(gpu: Emulator) -> Counter[str]:
    """The passes beyond the minimum that accesses to shared memory take, by file."""
    files: Counter[str] = Counter()
    for place, extra in gpu.counters.bank_conflicts.items():
        files[place.split(":")[0]] += extra
    return files


@pytest.mark.parametrize("case", [conv1x1.forward_case, conv1x1.backward_case], ids=lambda c: c.__name__)
def test_conv1x1(gpu: Emulator, case: MakeCase) -> None:
    count(gpu, case, (2, 24, 16, 96, 128))
    assert conflicts(gpu) == {}
    if case is conv1x1.backward_case:  # whose tiles are swizzled
        assert gpu.counters.split_sectors == {}


def test_passes_of_conv1x1_backward(gpu: Emulator) -> None:
    """A tile of 32 pixels, 64 channels of x and 128 of z takes 800 passes of shared memory."""
    passes = []
    for images in (1, 2):
        count(gpu, conv1x1.backward_case, (images, 32, 16, 64, 128))
        passes.append(sum(gpu.counters.shared_passes.values()))
    assert passes[1] - passes[0] == 800 * 32 * 16 / 32


def weight_passes(blocks: int, channels: int) -> int:
    """The extra passes of storing all taps of 32 outputs.

    A warp's 32 elements belong to nine taps, which start in only eight different banks.
    """
    return blocks * 9 * 32 * channels // 32


def check_conv3x3(gpu: Emulator, patches: int) -> None:
    """Fragments have no conflicts: a matrix's eight rows are pixels of one line, or repeat its last pixel."""
    found = conflicts(gpu)
    assert set(found) <= {"taps.cuh", "patch.cuh", "tile.cuh"}
    assert found["taps.cuh"] <= weight_passes(patches, 64)
    # Looking up the pixels of slots: of several lines at once, and only of slots that have one.
    lookups = sum(taken for place, taken in gpu.counters.shared_passes.items() if "patch.cuh" in place)
    assert found["patch.cuh"] <= lookups / 8
    # The last iteration of a copy, which only some lanes take part in.
    assert found["tile.cuh"] <= patches * 4


@pytest.mark.parametrize("width", [16, 14])
def test_conv3x3_forward(gpu: Emulator, width: int) -> None:
    count(gpu, conv3x3.forward_case, (2, width, width, 64, 32))
    check_conv3x3(gpu, patches=2)


@pytest.mark.parametrize("width", [16, 14])
def test_conv3x3_backward(gpu: Emulator, width: int) -> None:
    count(gpu, conv3x3.backward_case, (2, width, width, 64, 32))
    check_conv3x3(gpu, patches=4)


def stack_bytes(lines: int, columns: int) -> float:
    """The bytes of fragments per pixel and 16 channels, for a depth of 16 and nine taps.

    A warp with a stack of lines of 16 pixels reads each line, and the two below, once per column of taps.
    It does so for 16 * ``columns`` channels.
    """
    return 3 * (lines + 2 + 3 * columns) * FRAGMENT / (16 * lines * columns)


def weight_gradient_bytes(lines: int) -> float:
    """The same for dW: each line of z with its mask, which takes two passes, and three times that line of dy
    and the two below. Two warps read it, each for 8 channels of z.
    """
    return 2 * ((3 * (lines + 2) + lines) * FRAGMENT + lines * 2 * PASS) / (16 * lines)


FRAGMENT_BYTES = {
    "forward": (conv3x3.forward_case, "sm_90", stack_bytes(4, 2)),
    "forward, small patches": (conv3x3.forward_case, "sm_86", stack_bytes(4, 1)),
    "backward": (conv3x3.backward_case, "sm_90", stack_bytes(4, 2) + weight_gradient_bytes(16)),
    "backward, small patches": (
        conv3x3.backward_case,
        "sm_86",
        stack_bytes(2, 2) + weight_gradient_bytes(8),
    ),
}


@pytest.mark.parametrize("name", FRAGMENT_BYTES)
def test_conv3x3_fragments(gpu: Emulator, name: str) -> None:
    """The passes that bound the 3x3 kernels, plus the few that a block's sums take at its end."""
    make, chip, expected = FRAGMENT_BYTES[name]
    n, h, w, b, k = 8, 16, 16, 128, 32
    count(gpu, make, (n, h, w, b, k), shared_bytes=SHARED_BYTES[chip])
    passes = sum(taken for place, taken in gpu.counters.shared_passes.items() if "product.cuh" in place)
    expected *= n * h * w * (b // 16) * (k // 16) / PASS
    assert expected <= passes <= 1.01 * expected


@pytest.mark.parametrize(
    "case", [transition.forward_case, transition.backward_case], ids=lambda c: c.__name__
)
def test_pool_conv1x1(gpu: Emulator, case: MakeCase) -> None:
    """Of two thousand requests, only a few per block conflict: loading vectors and storing sums."""
    count(gpu, case, (2, 16, 16, 128, 64))
    assert sum(conflicts(gpu).values()) <= gpu.counters.blocks * 40
