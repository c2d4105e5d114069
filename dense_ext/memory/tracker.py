"""The peak of any network's training step, tracked by PyTorch on tensors without memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FIRST_BATCH = 2  # batch norm refuses a single value per channel


def _optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(network.parameters())
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9 if name == "momentum" else 0.0)


class TrackedStep:
    """A training step with cross entropy, at any batch: seconds each, whatever the batch.

    It counts what tensors hold, on a CPU, where the optimizer takes one parameter after another.

    Args:
        network: on the CPU, from images [N, C, H, W] to logits [N, classes]. Copied, without its values.
        image_shape: C, H, W of the images, which are in channels_last memory.
        dtype: other than float32 the forward runs under autocast to it.
        optimizer: as :class:`dense_ext.memory.Planner`.
    """

    def __init__(
        self,
        network: nn.Module,
        image_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "momentum",
    ) -> None:
        # Imported here: slow to load.
        from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

        self._fake = FakeTensorMode()
        with FakeCopyMode(self._fake):
            self._network = copy.deepcopy(network).train()
        self._image_shape, self._dtype = tuple(image_shape), dtype
        self._updates, self._update = optimizer != "none", _optimizer(optimizer, self._network)
        self._step(*self._inputs(_FIRST_BATCH))  # gradients and momentum, which later steps find

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        with self._fake:
            images = torch.empty(batch, *self._image_shape).contiguous(memory_format=torch.channels_last)
            return images, torch.empty(batch, dtype=torch.long)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        with self._fake:
            self._update.zero_grad(set_to_none=False)
            with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
                loss = F.cross_entropy(self._network(images), labels)
            loss.backward()
            if self._updates:
                self._update.step()

    def peak(self, batch: int) -> int:
        """Bytes at the peak of a step of ``batch`` images: parameters, gradients, all that tensors hold."""
        # Not in every build of PyTorch.
        from torch.distributed._tools.mem_tracker import MemTracker

        images, labels = self._inputs(batch)
        tracker = MemTracker()
        tracker.track_external(self._network, self._update, images)
        with tracker:
            self._step(images, labels)
        return max(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
