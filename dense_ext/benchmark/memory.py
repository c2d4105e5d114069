"""How much memory a training step takes: what autograd keeps for backward, and the allocator's peak.

Of steps that run, and of other DenseNets' steps tracked without running them.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..memory import TrackedStep, largest
from ..models import DenseNet
from .errors import reason
from .peers import OTHERS
from .step import Step

_TICKS = 6  # of a peer, about: to build it, and to look at five batches


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages autograd holds between ``forward`` and its backward.

    Each storage counts once and in whole; the model's parameters and buffers do not count. Runs on
    any device, and on fake tensors without memory.

    Args:
        model: whose parameters and buffers to leave out.
        forward: returns the loss. Called once.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}  # keeps the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        # Not the tensor itself: as an output kept by its own node it would keep that, and all of it for good.
        tensor = tensor.detach()
        held.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
    del loss
    return total


def step_peaks(step: Step, images: Tensor, labels: Tensor) -> dict[str, int]:
    """The :func:`peaks` of forward and backward.

    The parameters' gradients are allocated beforehand. What a library allocates behind PyTorch's
    allocator (oneDNN's and cuDNN's internal buffers on a CPU) is not seen.
    """
    step(images, labels)  # gradients, momentum, and any library's one-time allocations

    def run() -> None:
        step.optimizer.zero_grad(set_to_none=False)
        # A training loop holds its logits during backward, and the planner counts them.
        loss, _logits = step.loss_and_logits(images, labels)
        torch.autograd.backward(loss)

    return peaks(run, step.device)


def step_bytes(step: Step, images: Tensor, labels: Tensor) -> dict[str, int]:
    """What a step keeps for backward, holds at its peak, and what lasts from step to step; takes steps."""
    saved = saved_bytes(step.model, lambda: step.loss(images, labels))
    return {"saved_bytes": saved, **step_peaks(step, images, labels), "lasting_bytes": lasting_bytes(step)}


def peaks(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """``peak_bytes``, the most that was allocated at a time over what was before ``run``.

    On a GPU also ``reserved_bytes``, the same of what the allocator took from the device.
    """
    if device.type != "cuda":
        return {"peak_bytes": max(allocation_levels(run), default=0)}
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    run()
    torch.cuda.synchronize(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) - reserved,
    }


def lasting_bytes(step: Step) -> int:
    """What lives through all steps: parameters, their gradients, buffers and the optimizer's state."""
    state = (t for values in step.optimizer.state.values() for t in values.values())
    gradients = (p.grad for p in step.model.parameters())
    tensors = (*step.model.parameters(), *step.model.buffers(), *gradients, *state)
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def collect() -> None:
    """Give back the memory of what nobody refers to."""
    gc.collect()
    # A kernel that failed leaves the GPU to this process unusable: later rows say so, each for itself.
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def allocation_levels(run: Callable[[], object]) -> list[int]:
    """Bytes ``run`` holds on the CPU after each of its allocations and releases; its result stays alive."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silent where there is no GPU to trace
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    del result
    return list(itertools.accumulate(e.nbytes() for e in events))


def tracked_networks(model: DenseNet) -> dict[str, Callable[[], nn.Module]]:
    """How to make each network of the model's shape, by the peer's name.

    Their weights are contiguous: channels_last changes next to nothing about the peak.
    """
    plain = [peer for peer in OTHERS.values() if peer.mode == "eager" and not peer.channels_last]
    return {peer.name: functools.partial(peer.build, model, torch.device("cpu")) for peer in plain}


def tracking_ticks(model: DenseNet) -> int:
    """How often :func:`track_peers` ticks, about."""
    return _TICKS * len(tracked_networks(model))


def track_peers(
    model: DenseNet,
    tracked: Callable[[nn.Module], TrackedStep],
    batch: int,
    budget: int,
    found: dict[str, dict[str, Any]],
    tick: Callable[[str], None],
) -> None:
    """The peak of each peer's step, and the largest batch whose peak is within the budget.

    Args:
        model: whose shape, float32 and on the CPU.
        tracked: makes the step of a network.
        batch: images.
        budget: bytes.
        found: gets ``peak_bytes``, ``largest_batch`` and ``failure`` by the peer's name, as they are known;
            None is what is not.
        tick: told what is tracked next.
    """
    for name, make in tracked_networks(model).items():
        row = found[name] = {"peak_bytes": None, "largest_batch": None, "failure": None}
        tick(f"{name}, building")
        try:
            step = tracked(make())

            @functools.cache
            def peak(batch: int, step: TrackedStep = step, name: str = name) -> int:
                tick(f"{name}, {batch} images")
                return step.peak(batch)

            row["peak_bytes"] = peak(batch)
            row["largest_batch"] = largest(peak, budget, batch)
        except Exception as error:
            row["failure"] = reason(error)
