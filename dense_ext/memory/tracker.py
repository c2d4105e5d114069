"""The peak of any network's training step, tracked by PyTorch on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker


def tracked_peak(
    build: Callable[[], nn.Module],
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    momentum: float = 0.9,
    channels_last: bool = True,
) -> int:
    """Peak bytes of a training step with cross entropy and SGD: parameters, gradients and all.

    Args:
        build: makes the network, [N, C, H, W] to [N, classes]; called without memory.
        input_shape: N, C, H, W of the images.
        dtype: other than float32 the forward runs under autocast to it.
        momentum: 0 for an optimizer without state.
        channels_last: memory format of the images and weights.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with FakeTensorMode():
        network = build().to(memory_format=layout).train()  # type: ignore[call-overload]
        images = torch.empty(*input_shape).contiguous(memory_format=layout)
        labels = torch.empty(input_shape[0], dtype=torch.long)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=momentum)

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()

        step()  # gradients and momentum, which later steps find
        tracker = MemTracker()
        tracker.track_external(network, optimizer, images)
        with tracker:
            step()
    return max(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
