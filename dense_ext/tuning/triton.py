"""Measuring candidate configurations of the Triton kernels on the present GPU."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..backends import BACKENDS
from ..backends.triton import launch
from ..backends.triton.configs import Config, Row, find_config, trying
from ..benchmark.suites.primitives import PrimitiveCase, backend_error
from ..benchmark.timing import ColdTimer

Key = tuple[str, str, str, str]

SAMPLES = 7
# A candidate has to be this much faster than what is in the table: less is noise.
GAIN = 0.03


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration found so far in one place of the table.

    Args:
        row: of the table; what it has already, until something is faster.
        before: seconds of a call with what it has.
        seconds: of a call with the row's configuration.
    """

    row: Row
    before: float
    seconds: float

    @property
    def faster(self) -> bool:
        return self.seconds < self.before

    def as_json(self) -> dict[str, Any]:
        return {
            **self.row.as_json(),
            "seconds_before": self.before,
            "seconds": self.seconds,
            "faster": self.faster,
        }


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


def described(config: Config) -> str:
    """A configuration in a line."""
    blocks = (f"{name} {size}" for name, size in config.blocks.items())
    return ", ".join((
        *blocks, f"{config.num_warps} warps", f"{config.num_stages} stages",
        f"{config.programs_per_multiprocessor} programs",
    ))  # fmt: skip


def keys_of(case: PrimitiveCase, dtype: torch.dtype, device: torch.device) -> list[Key]:
    """The places of the table that a call of the primitive looks up."""
    launch.forget_plans()
    launch.looked_up = []
    try:
        getattr(BACKENDS["triton"], case.primitive)(**case.tensors(dtype, device))
        return list(dict.fromkeys(launch.looked_up))
    finally:
        launch.looked_up = None


def find_places(
    cases: Iterable[PrimitiveCase], dtype: torch.dtype, device: torch.device, tick: Callable[[str], None]
) -> dict[Key, PrimitiveCase]:
    """The places of the table that the cases look up, each with the first that does.

    Args:
        tick: told each case before it is called, which compiles its kernels.
    """
    places: dict[Key, PrimitiveCase] = {}
    for case in cases:
        tick(f"compiling {case.primitive}, {case.where}")
        for key in keys_of(case, dtype, device):
            places.setdefault(key, case)
    return places


def ticks(places: Iterable[Key]) -> int:
    """How often :func:`tune` ticks."""
    return sum(1 + len(list(candidates(find_config(*key)))) for key in places)


def tune(
    places: dict[Key, PrimitiveCase],
    dtype: torch.dtype,
    device: torch.device,
    keep: Callable[[Tuned], None],
    tick: Callable[[str], None],
) -> None:
    """Measure each place's configuration, then its candidates.

    Args:
        places: from :func:`find_places`.
        keep: given what a place has, and again whatever is faster, as soon as it is known.
        tick: told each configuration before it is measured.
    """
    timer = ColdTimer(device)
    try:
        for key, case in places.items():
            _tune_place(key, case, dtype, timer, keep, tick)
    finally:
        launch.forget_plans()


def _tune_place(
    key: Key,
    case: PrimitiveCase,
    dtype: torch.dtype,
    timer: ColdTimer,
    keep: Callable[[Tuned], None],
    tick: Callable[[str], None],
) -> None:
    run, tensors = getattr(BACKENDS["triton"], case.primitive), case.tensors(dtype, timer.device)

    def error() -> float:
        launch.forget_plans()
        return backend_error("triton", case, case.tensors(dtype, timer.device))

    def seconds() -> float:
        launch.forget_plans()
        return statistics.median(timer.samples(lambda: run(**tensors), SAMPLES))

    def measuring(config: Config) -> None:
        tick(f"{key[0]}, {key[3]}: {described(config)}")

    config = find_config(*key)
    measuring(config)
    bound, before = 2 * error(), seconds()
    least, source = before, measured(timer.device)
    keep(Tuned(Row(*key, config, source), before, before))
    for candidate in candidates(config):
        measuring(candidate)
        with trying(*key, candidate):
            try:
                time = seconds() if error() <= bound else None
            except Exception:  # a configuration the chip or the compiler refuses
                continue
        if time is not None and time < (1 - GAIN) * least:
            least = time
            keep(Tuned(Row(*key, candidate, source), before, least))


def measured(device: torch.device) -> str:
    """Where a row's figures come from."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"measured: {torch.cuda.get_device_name(device)}, {today}"
