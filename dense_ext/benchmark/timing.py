"""Interleaved timing, so that a slow minute of the machine falls on every peer alike; the machine's rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .results import Measurement, Tick
from .step import synchronize

# On a GPU, steps are queued until a sample lasts about this long.
_SAMPLE_SECONDS = 0.5
_FLUSHED_BYTES = 2**26  # more than the last-level cache of a CPU core's share
_LAUNCH_CYCLES = 4_000_000  # of a GPU, some 2 ms: longer than the host takes to launch a call
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


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a square matrix product in operations per second, 2 per multiply-add.

    Of 1024x1024 matrices on a CPU, 8192x8192 on a GPU.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / best_seconds(lambda: torch.mm(a, b, out=out), device)


def copy_bandwidth(device: torch.device) -> float:
    """Best rate of copying 256 MiB (2 GiB on a GPU): bytes read plus bytes written, per second."""
    count = 2**29 if device.type == "cuda" else 2**26
    source = torch.zeros(count, device=device)
    target = torch.zeros(count, device=device)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def calls_per_sample(call: Callable[[], object], device: torch.device) -> int:
    """Calls one sample should hold: 1 on a CPU, on a GPU enough for half a second."""
    if device.type != "cuda":
        return 1
    return max(1, round(_SAMPLE_SECONDS / seconds_per_call(call, device, 3)))


def interleave(
    calls: Sequence[tuple[Measurement, Callable[[], object]]],
    device: torch.device,
    rounds: int,
    tick: Tick,
    settles: bool = False,
) -> None:
    """Time every call once a round, each round beginning with another; ``tick`` is told which before each.

    A call's row gets the seconds as soon as they are measured. One that fails has no samples, and no turn
    from then on. With ``settles`` a call that is not timed comes before each that is.
    """
    for i in range(rounds if calls else 0):
        start = i % len(calls)
        for row, call in (*calls[start:], *calls[:start]):
            if row.failure is None:
                tick(f"{row.peer}, round {i + 1} of {rounds}")
                with row.failing():  # a GPU tells of a failure when it is waited for
                    if settles:
                        call()
                    row.seconds.append(seconds_per_call(call, device, row.calls_per_sample))


class ColdTimer:
    """Times single calls that find the caches empty, by CUDA events on a GPU.

    Between two calls a buffer larger than the last-level cache is overwritten. A GPU sleeps until all
    calls are launched: what is timed is its work, not how long the host takes to launch it.
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
        if self.device.type == "cuda":
            return self._events(call, count)
        samples = []
        for _ in range(count):
            self.flushed.zero_()
            samples.append(seconds_per_call(call, self.device))
        return samples

    def _events(self, call: Callable[[], object], count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda._sleep(count * _LAUNCH_CYCLES)
        for start, end in pairs:
            self.flushed.zero_()
            start.record()
            call()
            end.record()
        synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]
