"""Interleaved timing, so that a slow minute of the machine falls on every peer alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .step import synchronize

# On a GPU, steps are queued until a sample lasts about this long.
_SAMPLE_SECONDS = 0.5


def seconds_per_call(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Wall-clock seconds of one call, the device's work included; mean over ``calls``."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of 30 calls, or of as many as begin within two seconds."""
    best, end = float("inf"), time.perf_counter() + 2
    for _ in range(30):
        best = min(best, seconds_per_call(call, device))
        if time.perf_counter() > end:
            break
    return best


def calls_per_sample(call: Callable[[], object], device: torch.device) -> int:
    """Calls one sample should hold: 1 on a CPU, on a GPU enough for half a second."""
    if device.type != "cuda":
        return 1
    return max(1, round(_SAMPLE_SECONDS / seconds_per_call(call, device, 3)))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    samples: Mapping[str, list[float]],
    device: torch.device,
    rounds: int,
    calls_in_sample: int,
    tick: Callable[[str], None],
) -> None:
    """Time every call once a round, each round beginning with another.

    Args:
        calls: by name; one is a training step.
        samples: by the same names; gets a round's seconds per call as soon as they are measured.
        device: to wait for.
        rounds: samples of each.
        calls_in_sample: calls one sample is the mean of.
        tick: told the name before each sample.
    """
    names = list(calls)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            tick(f"{name}, round {i + 1} of {rounds}")
            samples[name].append(seconds_per_call(calls[name], device, calls_in_sample))


def spread(samples: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
