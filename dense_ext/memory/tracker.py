"""The peak memory of any network's training step, tracked by PyTorch on fake tensors."""

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
    """A training step with cross entropy. Tracking one takes seconds, whatever the batch.

    It counts the memory of tensors as on a CPU, where the optimizer updates one parameter after another.

    Args:
        network: a module on the CPU that maps images [N, C, H, W] to logits [N, classes]. It is copied
            without its values.
        image_shape: the shape [C, H, W] of an image; the images are in channels_last memory.
        dtype: the activations' dtype; if it is not float32, the forward runs under autocast.
        optimizer: as for :class:`dense_ext.memory.Planner`.
    """

    def __init__(
        self,
        network: nn.Module,
        image_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "momentum",
    ) -> None:
        # Imported here because it loads slowly.
        from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

        self._fake = FakeTensorMode()
        with FakeCopyMode(self._fake):
            self._network = copy.deepcopy(network).train()
        self._image_shape, self._dtype = tuple(image_shape), dtype
        self._updates, self._update = optimizer != "none", _optimizer(optimizer, self._network)
        self._step(*self._inputs(_FIRST_BATCH))  # creates the gradients and the optimizer's state

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
        """The peak in bytes of a step with ``batch`` images, over all tensors, parameters included."""
        # Imported here because not every build of PyTorch has it.
        from torch.distributed._tools.mem_tracker import MemTracker

        images, labels = self._inputs(batch)
        tracker = MemTracker()
        tracker.track_external(self._network, self._update, images)
        with tracker:
            self._step(images, labels)
        return max(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
