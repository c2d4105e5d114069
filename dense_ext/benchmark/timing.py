"""Interleaved timing, so that a slow minute of the machine falls on every peer alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import reason
from .step import synchronize

# On a GPU, steps are queued until a sample lasts about this long.
_SAMPLE_SECONDS = 0.5
_FLUSHED_BYTES = 2**26  # more than the last-level cache of a CPU core's share
_WARM_UP = {"cpu": 1, "cuda": 3}  # calls


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
    entries: Mapping[str, dict[str, Any]],
    device: torch.device,
    rounds: int,
    calls_in_sample: int,
    tick: Callable[[str], None],
) -> None:
    """Time every call once a round, each round beginning with another.

    One that fails has no samples, and from then on no turn.

    Args:
        calls: by name; one is a training step.
        samples: by the same names; gets a round's seconds per call as soon as they are measured.
        entries: by the same names; one's "failure" becomes why its call failed.
        device: to wait for.
        rounds: samples of each.
        calls_in_sample: calls one sample is the mean of.
        tick: told the name before each sample.
    """
    names = list(calls)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            if entries[name].get("failure") is not None:
                continue
            tick(f"{name}, round {i + 1} of {rounds}")
            try:
                samples[name].append(seconds_per_call(calls[name], device, calls_in_sample))
            except Exception as error:  # a GPU tells of a failure when it is waited for
                entries[name]["failure"] = reason(error)
                samples[name].clear()


class ColdTimer:
    """Times single calls that find the caches empty, by CUDA events on a GPU.

    Between two calls a buffer larger than the last-level cache is overwritten. On a GPU that also
    keeps the device busy while the call is launched: what is timed is the device's work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, size = device, _FLUSHED_BYTES
        if device.type == "cuda":
            size = max(size, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def samples(self, call: Callable[[], object], count: int) -> list[float]:
        """Seconds of each of ``count`` calls, after some to warm up."""
        for _ in range(_WARM_UP[self.device.type]):
            call()
        return self._events(call, count) if self.device.type == "cuda" else self._clock(call, count)

    def _clock(self, call: Callable[[], object], count: int) -> list[float]:
        samples = []
        for _ in range(count):
            self.flushed.zero_()
            samples.append(seconds_per_call(call, self.device))
        return samples

    def _events(self, call: Callable[[], object], count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            self.flushed.zero_()
            start.record()
            call()
            end.record()
        synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def spread(samples: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
