"""Each kernel moves the bytes that its launch counts, and a training step's total is near the minimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense_ext import schedule, transition
from dense_ext.backends import BACKENDS, Primitives
from dense_ext.backends.table import PRIMITIVES
from dense_ext.backends.triton import launch
from dense_ext.schedule import Block, Dropout, Layer, Norm
from dense_ext.transition import Pooling

from ..primitives.common import MakeCase
from ..primitives.groups import GROUPS
from ..primitives.harness import Maker, check_values
from .traffic import recorded

TESTED = [(case, group.small) for group in GROUPS for case in group.cases]


@pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize(("case", "size"), TESTED, ids=lambda v: getattr(v, "__name__", None))
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_bytes_of_a_launch(
    monkeypatch: pytest.MonkeyPatch, case: MakeCase, size: tuple[int, ...], architecture: str
) -> None:
    """The bytes that the interpreter loads and stores, address by address, are those that are counted.

    The values are right with each chip's blocks; the other tests of values take Hopper's.
    """
    monkeypatch.setattr(launch.Target, "architecture", architecture)
    with recorded(monkeypatch, runs=True) as calls:
        check_values(BACKENDS["triton"], case(Maker(torch.float16, torch.device("cpu")), size))
    assert calls
    for call, seen in calls:
        assert seen == call.bytes(), f"{call.kernel}: {seen} bytes moved, {call.bytes()} counted"


# --- DenseNet-121, 224 x 224, bfloat16 ------------------------------------------------------------

BATCH, SIDE, GROWTH, BOTTLENECK = 256, 224, 32, 128
MB = 1e6
# The schedule's minimum per training step and image, counted by hand from its table of reads and writes:
# per pixel and layer C + 2b + k forward and 3C + 4b + 2k backward, plus the parts between the blocks. It
# is C + b more if the bottleneck is recomputed, and the whole forward more if X is recomputed too.
LEAST = {"none": 153, "bottleneck": 180, "block": 218}


def norm(channels: int) -> Norm:
    return Norm(torch.ones(channels), torch.zeros(channels), 1e-5, None)


def block(layers: int, channels: int) -> Block:
    inputs = [channels + i * GROWTH for i in range(layers)]
    return Block(
        [
            Layer(
                [norm(c), norm(BOTTLENECK)],
                [weight(BOTTLENECK, c, 1), weight(GROWTH, BOTTLENECK, 3)],
                [],
                [Dropout(0.0), Dropout(0.0)],
            )
            for c in inputs
        ],
        channels,
    )


def weight(out: int, channels: int, size: int) -> Tensor:
    shape = (out, channels, size, size)
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)


def activations(channels: int, side: int) -> Tensor:
    shape = (BATCH, channels, side, side)
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)


def densenet121_step(ops: Primitives, recompute: str) -> int:
    """Run the operators of a training step; returns the bytes that operators other than primitives move."""
    size = torch.bfloat16.itemsize
    side, channels = SIDE // 2, 64
    others = 0

    def pool(weight: Tensor | None, channels: int, side: int, known: Tensor | None = None) -> None:
        x = activations(channels, side)
        pooling = Pooling(norm(channels), weight, None, Dropout(0.0), False, (2, 2), None)
        y, stats = transition.forward(ops, pooling, x, known)
        transition.backward(ops, pooling, torch.empty_like(y), x, stats, True)

    # The first convolution, in cuDNN: forward image and output, backward image and gradient.
    others += 2 * (3 * SIDE * SIDE + channels * side * side) * size * BATCH
    pool(None, channels, side)
    side //= 2
    for index, layers in enumerate((6, 12, 24, 16)):
        dense = block(layers, channels)
        x = activations(channels, side)
        others += 2 * x.nbytes  # x is copied into the block's buffer
        out, stats, z = schedule.forward(ops, dense, x, recompute == "none")
        if recompute == "block":
            out, _, z = schedule.forward(ops, dense, x, False)
            others += 2 * x.nbytes
        schedule.backward(ops, dense, torch.empty_like(out), out, z, stats, [True] * 2 * layers)
        channels = dense.out_channels
        if index < 3:
            pool(weight(channels // 2, channels, 1), channels, side, stats[:, :channels])
            channels, side = channels // 2, side // 2
    # The last norm, ReLU and mean, forward and backward: statistics, normalisation, activation and pool.
    return others + 12 * channels * side * side * size * BATCH


@pytest.mark.skipif(launch.INTERPRETED, reason="runs no kernel")
@pytest.mark.parametrize("recompute", list(LEAST))
def test_training_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recompute: str
) -> None:
    """As on an H200: 132 multiprocessors of sm_90. No kernel is launched, and memory is only reserved."""
    hopper = launch.Target(launch.target_of(-1).gpu, 132)
    monkeypatch.setattr(launch, "target_of", lambda device: hopper)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    ops = Primitives(dict.fromkeys(PRIMITIVES, BACKENDS["triton"]))
    with recorded(monkeypatch, runs=False) as calls:
        others = densenet121_step(ops, recompute)
    moved = others + sum(call.bytes() for call, _ in calls)
    by_kernel: dict[str, int] = {"outside the primitives": others}
    for call, _ in calls:
        by_kernel[call.kernel] = by_kernel.get(call.kernel, 0) + call.bytes()
    with capsys.disabled():
        print(f"\n{recompute}: {moved / BATCH / MB:.1f} MB an image, {len(calls)} launches")
        for kernel, count in sorted(by_kernel.items(), key=lambda item: -item[1]):
            print(f"  {kernel.removesuffix('_kernel'):40} {count / BATCH / MB:6.2f}")
    assert moved / BATCH <= 1.15 * LEAST[recompute] * MB
