"""Measuring candidate configurations of the Triton kernels on the present GPU."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..backends import BACKENDS
from ..backends.triton import launch
from ..backends.triton.configs import Config, Row, find_config, trying
from .primitives import PrimitiveCase
from .suites.primitives import backend_error
from .timing import ColdTimer

Key = tuple[str, str, str, str]

SAMPLES = 7
# A candidate has to be this much faster than what is in the table: less is noise.
GAIN = 0.03


def candidates(config: Config) -> Iterator[Config]:
    """Neighbours of a configuration: one block halved or doubled, other warps, stages and programs."""
    for name, size in config.blocks.items():
        for other in (size // 2, size * 2):
            if 16 <= other <= 256:
                yield replace(config, blocks=config.blocks | {name: other})
    for warps in (4, 8):
        if warps != config.num_warps:
            yield replace(config, num_warps=warps)
    for stages in (1, 2, 3, 4):
        if stages != config.num_stages:
            yield replace(config, num_stages=stages)
    for programs in (1, 2, 4):
        if programs != config.programs_per_multiprocessor:
            yield replace(config, programs_per_multiprocessor=programs)


def keys_of(case: PrimitiveCase, dtype: torch.dtype, device: torch.device) -> list[Key]:
    """The places of the table that a call of the primitive looks up."""
    launch.forget_plans()
    launch.looked_up = []
    try:
        getattr(BACKENDS["triton"], case.primitive)(**case.tensors(dtype, device))
        return list(dict.fromkeys(launch.looked_up))
    finally:
        launch.looked_up = None


def tune_case(
    case: PrimitiveCase, dtype: torch.dtype, device: torch.device, done: set[Key], tick: Callable[[str], None]
) -> list[Row]:
    """The kernels of a call that got faster, as rows of a table.

    Args:
        done: keys not to measure again; the call's are added.
        tick: told what comes next.
    """
    timer, tensors = ColdTimer(device), case.tensors(dtype, device)
    run = getattr(BACKENDS["triton"], case.primitive)

    def seconds() -> float:
        launch.forget_plans()
        return statistics.median(timer.samples(lambda: run(**tensors), SAMPLES))

    rows = []
    for key in keys_of(case, dtype, device):
        if key in done:
            continue
        done.add(key)
        tick(f"{key[0]}, {key[3]}")
        config = find_config(*key)
        best, least = config, seconds()
        bound = 2 * backend_error("triton", case, case.tensors(dtype, device))
        for candidate in candidates(config):
            with trying(*key, candidate):
                try:
                    launch.forget_plans()
                    error = backend_error("triton", case, case.tensors(dtype, device))
                    if error <= bound and (time := seconds()) < (1 - GAIN) * least:
                        best, least = candidate, time
                except Exception as failure:  # a configuration the chip or the compiler refuses
                    tick(f"{key[0]}, {key[3]}: {type(failure).__name__}")
        if best is not config:
            rows.append(Row(*key, best, measured(device)))
    launch.forget_plans()
    return rows


def measured(device: torch.device) -> str:
    """Where a row's figures come from."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"measured: {torch.cuda.get_device_name(device)}, {today}"
