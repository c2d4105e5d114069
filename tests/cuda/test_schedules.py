"""Results depend neither on which block or warp runs ahead nor on the size of shared memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..emulator import SHARED_BYTES, Emulator
from ..primitives import test_bn_relu_conv1x1 as conv1x1
from ..primitives import test_bn_relu_conv3x3 as conv3x3
from ..primitives import test_channel_stats as channel_stats
from ..primitives.common import MakeCase, Size
from ..primitives.harness import ALIGNED, Case, Maker, base_of, check_values, equal_bits
from ..sanitizers import CPU

# Several tiles, the last partly filled; with one multiprocessor, several per block.
CONVOLUTIONS = {
    "1x1 forward": (conv1x1.forward_case, (4, 15, 17, 72, 48)),
    "1x1 backward": (conv1x1.backward_case, (4, 15, 17, 72, 48)),
    "3x3 forward": (conv3x3.forward_case, (2, 33, 17, 40, 32)),
    "3x3 backward": (conv3x3.backward_case, (2, 33, 17, 40, 32)),
    "3x3 forward, large patches": (conv3x3.forward_case, (2, 33, 30, 40, 32)),
    "3x3 backward, large patches": (conv3x3.backward_case, (2, 30, 14, 40, 32)),
    "3x3 forward, a weight that does not fit": (conv3x3.forward_case, (1, 9, 36, 200, 48)),
    "3x3 backward, K > 32": (conv3x3.backward_case, (1, 9, 36, 40, 48)),
}
# Images whose patches are: several images side by side, fewer in the last; parts of one; bands of several.
IMAGES = [(11, 7, 7), (7, 8, 8), (3, 14, 14), (5, 28, 28), (2, 19, 45), (70, 1, 1), (9, 3, 2), (3, 2, 65)]
SCHEDULES = [("FIRST", 0), ("LAST", 0), *(("RANDOM", seed) for seed in range(4))]


def same_bits(a: Case, b: Case) -> bool:
    """Whether two calls left the same bits in all their tensors."""
    return all(
        equal_bits(base_of(value), base_of(b.arguments[name]))
        for name, value in a.arguments.items()
        if isinstance(value, Tensor)
    )


@pytest.mark.parametrize(("make", "size"), CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_order_of_warps(gpu: Emulator, make: MakeCase, size: Size) -> None:
    done: list[Case] = []
    for order, seed in SCHEDULES:
        gpu.reset(order=order, seed=seed, multiprocessors=1)
        done.append(make(Maker(torch.bfloat16, CPU, guard=ALIGNED), size))
        check_values(gpu.backend, done[-1])
        assert same_bits(done[-1], done[0]), f"{order} {seed}: the bits differ"


# At least 33 blocks, of one or two chunks of channels: some of their 16 groups have two blocks, some three.
MOMENTS = {
    "channel_stats": (channel_stats.stats_case, (4, 33, 17, 300)),
    "1x1": (conv1x1.forward_case, (4, 33, 33, 16, 200)),
    "3x3": (conv3x3.forward_case, (3, 50, 50, 8, 50)),
}


@pytest.mark.parametrize(("make", "size"), MOMENTS.values(), ids=list(MOMENTS))
def test_order_of_blocks(gpu: Emulator, make: MakeCase, size: Size) -> None:
    """Whichever block is the last, it merges the moments in the same order."""
    done: list[Case] = []
    for order, seed in SCHEDULES[:4]:
        gpu.reset(order=order, seed=seed, multiprocessors=80)
        done.append(make(Maker(torch.bfloat16, CPU, guard=ALIGNED), size))
        check_values(gpu.backend, done[-1])
        assert gpu.counters.launched_blocks > 32
        assert same_bits(done[-1], done[0]), f"{order} {seed}: the bits differ"


# The two types of 16 bits take as much shared memory: each kernel runs with every chip's in one of them.
CHIPS = {
    torch.float32: tuple(SHARED_BYTES),
    torch.float16: ("sm_80", "sm_90"),
    torch.bfloat16: ("sm_86",),
}


@pytest.mark.parametrize("dtype", CHIPS, ids=str)
@pytest.mark.parametrize(("make", "size"), CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_shared_memory(gpu: Emulator, make: MakeCase, size: Size, dtype: torch.dtype) -> None:
    """Each kernel uses the shared memory there is, if it can; ``run`` refuses a launch that requests more.

    Chips on which the same kernels have as many blocks and as much memory compute the same: one of them does.
    """
    computed = []
    for chip in CHIPS[dtype]:
        gpu.reset(shared_bytes=SHARED_BYTES[chip], execute=False)
        case = make(Maker(dtype, CPU, guard=ALIGNED), size)
        case.copy().run(gpu.backend)
        launched = gpu.counters.kernels, gpu.counters.launched_blocks
        if launched not in computed:
            computed.append(launched)
            gpu.reset(shared_bytes=SHARED_BYTES[chip])
            check_values(gpu.backend, case)


@pytest.mark.each_pair
@pytest.mark.parametrize("make", [conv3x3.forward_case, conv3x3.backward_case])
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("setting", [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 16)])
def test_patches(gpu: Emulator, make: MakeCase, images: Size, setting: tuple[torch.dtype, int]) -> None:
    """Patches of every shape; they are small or large depending on how many there are per multiprocessor."""
    dtype, multiprocessors = setting
    gpu.reset(multiprocessors=multiprocessors)
    check_values(gpu.backend, make(Maker(dtype, CPU, guard=ALIGNED), (*images, 24, 16)))
