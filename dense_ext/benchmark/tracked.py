"""What a training step of other DenseNets needs, tracked without running it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..memory import TrackedStep, largest
from ..models import DenseNet
from .errors import reason
from .peers import OTHERS

_TICKS = 6  # of a peer, about: to build it, and to look at five batches


def networks(model: DenseNet) -> dict[str, Callable[[], nn.Module]]:
    """How to make each network of the model's shape, by the peer's name.

    Their weights are contiguous: channels_last changes next to nothing about the peak.
    """
    weights, cpu = model.state_dict(), torch.device("cpu")
    plain = [peer for peer in OTHERS.values() if peer.mode == "eager" and not peer.channels_last]
    return {peer.name: functools.partial(peer.build, model, weights, cpu, backend="auto") for peer in plain}


def ticks(model: DenseNet) -> int:
    """How often :func:`track_peers` ticks, about."""
    return _TICKS * len(networks(model))


def track_peers(
    model: DenseNet,
    batch: int,
    size: int,
    budget: int,
    dtype: torch.dtype,
    optimizer: str,
    found: dict[str, dict[str, Any]],
    tick: Callable[[str], None],
) -> None:
    """The peak of each peer's step, and the largest batch whose peak is within the budget.

    Args:
        model: whose shape, float32 and on the CPU.
        batch, size: images, and their height and width in pixels.
        budget: bytes.
        dtype, optimizer: as :class:`dense_ext.memory.TrackedStep`.
        found: gets ``peak_bytes``, ``largest_batch`` and ``failure`` by the peer's name, as they are known;
            None is what is not.
        tick: told what is tracked next.
    """
    for name, make in networks(model).items():
        row = found[name] = {"peak_bytes": None, "largest_batch": None, "failure": None}
        tick(f"{name}, building")
        try:
            step = TrackedStep(make(), (3, size, size), dtype=dtype, optimizer=optimizer)

            @functools.cache
            def peak(batch: int, step: TrackedStep = step, name: str = name) -> int:
                tick(f"{name}, {batch} images")
                return step.peak(batch)

            row["peak_bytes"] = peak(batch)
            row["largest_batch"] = largest(peak, budget, batch)
        except Exception as error:
            row["failure"] = reason(error)
