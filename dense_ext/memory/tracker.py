"""The peak of any network's training step, tracked by PyTorch on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


def _optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(network.parameters())
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9 if name == "momentum" else 0.0)


def tracked_peak(
    build: Callable[[], nn.Module],
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "momentum",
) -> int:
    """Peak bytes of a training step with cross entropy: parameters, gradients, all that tensors hold.

    Args:
        build: makes the network, [N, C, H, W] to [N, classes]; called without memory.
        input_shape: N, C, H, W of the images.
        dtype: other than float32 the forward runs under autocast to it.
        optimizer: as :class:`dense_ext.memory.Planner`.
    """
    # Imported here: slow to load, and not in every build of PyTorch.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        network = build().train()
        images = torch.empty(*input_shape).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(input_shape[0], dtype=torch.long)
        update = _optimizer(optimizer, network)

        def step() -> None:
            update.zero_grad(set_to_none=False)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(images), labels)
            loss.backward()
            if optimizer != "none":
                update.step()

        step()  # gradients and momentum, which later steps find
        tracker = MemTracker()
        tracker.track_external(network, update, images)
        with tracker:
            step()
    return max(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
