"""What is compared in one run: torchvision's DenseNet as it comes, and the same network swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models import DenseNet
from ..schedule import RECOMPUTE
from ..swap import swap
from .errors import UsageError
from .networks import torchvision_twin, with_weights


@dataclass(frozen=True)
class Peer:
    """One way to train the network.

    Args:
        name: short, as on the command line and in result files.
        label: for tables and plots.
        channels_last: memory format of weights and images.
        memory_efficient: torchvision's checkpointing of concatenation, norm and 1x1 convolution.
        recompute: dense_ext's policy, None for torchvision's own modules.
    """

    name: str
    label: str
    channels_last: bool
    memory_efficient: bool = False
    recompute: str | None = None

    @property
    def ours(self) -> bool:
        return self.recompute is not None

    def build(
        self, model: DenseNet, weights: Mapping[str, Tensor], device: torch.device, backend: str
    ) -> nn.Module:
        """The network in training mode with ``weights``, float32, on ``device``."""
        network = with_weights(torchvision_twin(model, self.memory_efficient), weights, device)
        if self.recompute is not None:
            swap(network, recompute=self.recompute, backend=backend, strict=True)
        return network.to(memory_format=self.memory_format).train()  # type: ignore[call-overload]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def images(self, batch: Tensor) -> Tensor:
        """The batch in this peer's memory format."""
        return batch.contiguous(memory_format=self.memory_format)


EAGER = {
    peer.name: peer
    for peer in (
        Peer("eager", "eager", channels_last=False),
        Peer("eager-cl", "eager, channels_last", channels_last=True),
        Peer("memory-efficient", "memory_efficient", channels_last=False, memory_efficient=True),
        Peer(
            "memory-efficient-cl",
            "memory_efficient, channels_last",
            channels_last=True,
            memory_efficient=True,
        ),
    )
}
OURS = {
    policy: Peer(
        f"dense_ext-{policy}", f"dense_ext, recompute {policy}", channels_last=True, recompute=policy
    )
    for policy in RECOMPUTE
}


def choose(names: Sequence[str], policies: Sequence[str]) -> list[Peer]:
    """The peers by name, then dense_ext by recompute policy.

    Raises:
        UsageError: an unknown or repeated name, or no eager peer to compare with.
    """
    for what, given, known in (("peers", names, tuple(EAGER)), ("recompute", policies, RECOMPUTE)):
        for name in given:
            if name not in known:
                raise UsageError(f"{what} must be among {', '.join(known)}; got {name!r}")
        if len(set(given)) < len(given):
            raise UsageError(f"{what} names one twice: {', '.join(given)}")
    if not names:
        raise UsageError(f"peers must name at least one of {', '.join(EAGER)}")
    return [*(EAGER[name] for name in names), *(OURS[policy] for policy in policies)]
