"""Batch statistics over several processes, as :class:`torch.nn.SyncBatchNorm` takes them.

A channel's statistics are exchanged once, by the layer that makes it, and its share of batch norm's backward
once, by the layer that consumes its gradient. So a block of L layers exchanges O(L) small messages, of O(1)
channels each. Every process adds the others' values in the same order, so all get the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sync:
    """The processes that share batch statistics."""

    group: Any  # a torch.distributed.ProcessGroup
    counts: Tensor  # the number of values per channel in each process [W], accumulation dtype

    def combine(self, mean: Tensor, var: Tensor) -> None:
        """Replace this process's mean and biased variance [C] by those of all processes."""
        means, variances = gather(torch.stack([mean, var]), self.group).unbind(1)
        share = (self.counts / self.counts.sum()).unsqueeze(1)
        mean.copy_((share * means).sum(0))
        var.copy_((share * (variances + (means - mean).square())).sum(0))

    def average(self, u: Tensor, v: Tensor) -> None:
        """Replace this process's sums [C], not yet divided by M, by the mean over all processes' values."""
        total = gather(torch.stack([u, v]), self.group).sum(0) / self.counts.sum()
        u.copy_(total[0])
        v.copy_(total[1])


def gather(own: Tensor, group: Any) -> Tensor:
    """The tensors of all processes [W, ...], in the order of their ranks."""
    every = own.new_empty(group.size() * own.numel())
    dist.all_gather_into_tensor(every, own.flatten(), group=group)
    return every.view(-1, *own.shape)


def resolve(name: Any) -> Any:
    """The process group of a name."""
    return torch._C._distributed_c10d._resolve_process_group(name)


def group_of(norm: Any) -> str:
    """The name of the group over which a SyncBatchNorm takes its statistics; "" for its own process alone.

    SyncBatchNorm decides in the same way.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return str(group.group_name) if group.size() > 1 else ""
