"""The Python cost of a Triton launch, without a GPU: ``python benchmarks/triton_launch.py``.

Runs the primitives of a dense layer's forward and backward with everything real (look-ups, alignment
checks, allocation of scratch) but the call into the driver, and says microseconds per launch. The
call into Triton's C launcher itself is measured on a GPU only. ``--out`` keeps the page.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor

from dense_ext import schedule
from dense_ext.backends import BACKENDS, Primitives
from dense_ext.backends.table import PRIMITIVES
from dense_ext.backends.triton import launch
from dense_ext.schedule import Block, Layer, Norm

LAYERS, CHANNELS, GROWTH, BOTTLENECK = 24, 256, 32, 128
ROUNDS = 50


class StubbedKernel:
    """Stands for a compiled kernel whose launcher returns at once; counts its calls."""

    function = packed_metadata = None
    launches = 0

    def run(self, *args: object) -> None:
        StubbedKernel.launches += 1


def norm(channels: int) -> Norm:
    return Norm(torch.ones(channels), torch.zeros(channels), 1e-5, None)


def weight(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def measure() -> tuple[int, list[float]]:
    """Launches of a block's forward and backward, and in each round the seconds of all of them."""
    inputs = [CHANNELS + i * GROWTH for i in range(LAYERS)]
    layers = [
        Layer([norm(c), norm(BOTTLENECK)], [weight(BOTTLENECK, c, 1, 1), weight(GROWTH, BOTTLENECK, 3, 3)])
        for c in inputs
    ]
    block = Block(layers, CHANNELS, GROWTH, BOTTLENECK, 0.0, None)
    ops = Primitives(dict.fromkeys(PRIMITIVES, BACKENDS["triton"]))
    x = torch.zeros(1, CHANNELS, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    hopper = launch.Target(launch.target_of(-1).gpu, 132)
    seconds: list[float] = []
    # The driver's two queries are plain functions, not mocks: a mock takes longer than they do.
    device, stream = (lambda: -1), (lambda device: 0)
    with (
        mock.patch.object(launch, "target_of", return_value=hopper),
        mock.patch.object(launch.Kernel, "compile", return_value=StubbedKernel()),
        mock.patch.object(torch.cuda, "device", mock.MagicMock()),
        mock.patch.object(torch._C, "_cuda_getDevice", device, create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", stream, create=True),
    ):
        for _ in range(ROUNDS):
            StubbedKernel.launches = 0
            started = time.perf_counter()
            out, stats, z = schedule.forward(ops, block, x, True)
            schedule.backward(ops, block, torch.empty_like(out), out, z, stats, [True] * 2 * LAYERS)
            seconds.append(time.perf_counter() - started)
    return StubbedKernel.launches, seconds[ROUNDS // 5 :]


def page() -> str:
    """What was measured."""
    launches, seconds = measure()
    each = [second / launches * 1e6 for second in seconds]
    return (
        "# The Python cost of a Triton launch\n\n"
        f"A dense block of {LAYERS} layers, forward and backward, all real but the call into the driver:\n"
        f"{launches} launches, {statistics.median(each):.1f} us each ({min(each):.1f} to "
        f"{max(each):.1f} over {len(each)} rounds), the schedule's own\nPython and the allocation of scratch "
        f"included. {os.cpu_count()} CPU cores, one thread, PyTorch {torch.__version__},\n"
        f"Triton {triton.__version__}. Triton's launcher and the driver come on top, on a GPU.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the page, which is printed in any case")
    options = parser.parse_args()
    text = page()
    print(text, end="")
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
