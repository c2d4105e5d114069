"""The host's time for a training step on a GPU, measured without one.

The CUDA library is compiled for the host, and its launches return at once (``tests/emulator``). What is left
of a step is Python, autograd, the schedule and the checks. PyTorch's own operators run on the CPU. Images of
32x32 keep that small, and what runs before and behind the dense parts is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dense_ext.models import MODELS
from dense_ext.schedule import RECOMPUTE
from tests.backends import put_in_place
from tests.emulator import emulator


def milliseconds(run: Callable[[], object], rounds: int) -> str:
    """Median, minimum and maximum of so many calls, after three to warm up."""
    times = []
    for _ in range(rounds + 3):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    kept = times[3:]
    return f"{statistics.median(kept):.2f} ({min(kept):.2f} to {max(kept):.2f})"


def step(network: nn.Module, images: Tensor) -> None:
    network.zero_grad()
    network(images).sum().backward()


def main(options: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="densenet121", choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args(options)
    gpu = emulator()
    put_in_place(gpu.backend)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    print("recompute   launches   forward and backward, ms: median (min to max)")
    for policy in RECOMPUTE:
        network = MODELS[arguments.model](recompute=policy, backend="cuda")
        gpu.reset(execute=False)  # sets the counter to zero
        step(network, images)
        launches = gpu.counters.launches
        time_of_step = milliseconds(partial(step, network, images), arguments.rounds)
        print(f"{policy:<12}{launches:>8}   {time_of_step}")
    features = network.features
    first = partial(step, nn.Sequential(features.conv0), images)
    width = network.classifier.in_features
    behind = nn.Sequential(features[-1], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.classifier)
    last = partial(step, behind, torch.randn(2, width, 1, 1, requires_grad=True))
    print(f"of which PyTorch's first convolution: {milliseconds(first, arguments.rounds)}")
    print(f"and all behind the last block: {milliseconds(last, arguments.rounds)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
