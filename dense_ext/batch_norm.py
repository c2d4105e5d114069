"""Batch norm as the schedule uses it: a scale and a shift in forward, an affine function in backward.

Forward, per channel: ``invstd = 1/sqrt(var + eps)``, ``s = weight*invstd``, ``t = bias - mean*s``,
output ``s*x + t``. Mean and variance are those of the batch, or the running ones in eval mode.

Backward, with g the gradient at the output, ``xhat = (x - mean)*invstd`` and M pixels:
``R1 = sum g`` (the bias gradient), ``R2 = sum g*xhat`` (the weight gradient), and for batch statistics

    dx = s*(g - R1/M - xhat*R2/M) = s*g + u*x + v,
    u = -s*invstd*R2/M,   v = -s*R1/M - u*mean.

So a layer only adds ``s*g`` to the gradient of its input. ``u`` and ``v`` are summed over all layers that
read a channel, and the kernel that consumes that channel's gradient adds ``u*x + v`` once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# F.batch_norm also refuses such a norm.
ONE_STATISTIC = "a batch norm has only one of running_mean and running_var: it needs both or neither"


# The tensors of a batch norm, one value for each channel.
VECTORS = ("weight", "bias", "running_mean", "running_var")


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without calling it if x already has the dtype."""
    return x if x.dtype == dtype else x.to(dtype)


def constant(module: nn.Module, name: str) -> Any:
    """A module's parameter, buffer or plain tensor ``name``; None if it has none.

    It equals the attribute of that name but takes a fifth of the time; each step looks up hundreds. As for
    Python, an attribute of the instance goes before a parameter.
    """
    own = module.__dict__
    if name in own:
        return own[name]
    parameters = own["_parameters"]
    return parameters[name] if name in parameters else own["_buffers"].get(name)


def uses_batch_stats(norm: nn.Module) -> bool:
    """Whether ``norm`` uses the batch's statistics, by the rule of :class:`torch.nn.BatchNorm2d`.

    A norm of another class, such as torchvision's FrozenBatchNorm2d, has fixed statistics.
    """
    if not isinstance(norm, _BatchNorm):
        return False
    return norm.training or (constant(norm, "running_mean") is None and constant(norm, "running_var") is None)


def values_per_channel(x: Tensor) -> int:
    """M, the number of values in each channel of x [N, C, H, W] or [N, C, D, H, W]."""
    return x.shape[0] * math.prod(x.shape[2:])


def affine_parameters(
    norm: nn.BatchNorm2d, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``norm``'s weight and bias, [C] each; ones and zeros of ``dtype`` where it has none."""
    weight, bias = constant(norm, "weight"), constant(norm, "bias")
    if weight is None:
        weight = torch.ones(num_features(norm), dtype=dtype, device=device)
    if bias is None:
        bias = torch.zeros(num_features(norm), dtype=dtype, device=device)
    return weight, bias


def num_features(norm: nn.Module) -> int:
    """The number of channels of a norm, by its tensors: PyTorch does not read the attribute."""
    for name in reversed(VECTORS):  # statistics first, which are whole where FSDP has sharded parameters
        vector = constant(norm, name)
        if vector is not None:
            channels: int = vector.shape[0]  # len(vector) takes five times as long
            return channels
    return int(norm.__dict__["num_features"])


def _vectors(packed: Tensor, channels: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The parts of a vector [S], each given by its first element and their number."""
    # Those that lie one after another take one call, which is a third of the time. So do the statistics of a
    # block's bottlenecks; those of its other norms all start with the first channel.
    following = [part for part in channels if part[0] > 0]
    ends = [start + size for start, size in following]
    if len(following) < 2 or [start for start, _ in following[1:]] != ends[:-1]:
        return [packed[start : start + size] for start, size in channels]
    split = iter(packed[following[0][0] : ends[-1]].split([size for _, size in following]))
    return [next(split) if start > 0 else packed[:size] for start, size in channels]


@torch.no_grad()
def update_running_stats(
    norms: Sequence[nn.BatchNorm2d], stats: Tensor, starts: Sequence[int], count: Any
) -> None:
    """Update the running statistics for one training step, as :class:`torch.nn.BatchNorm2d` does.

    Args:
        norms: the norms that ran; those in eval mode or without running statistics are skipped.
        stats: batch means and biased batch variances [2, S]. The running variance takes the unbiased ones.
        starts: the index in S of each norm's first channel.
        count: M, the number of values per channel, as a number or a tensor. An empty batch (0) counts as a
            step but changes no statistics.

    Raises:
        ValueError: a norm has only one of the two running statistics.
    """
    tracked = [
        (norm, constant(norm, "running_mean"), constant(norm, "running_var"), start)
        for norm, start in zip(norms, starts, strict=True)
        if norm.training and isinstance(norm, _BatchNorm) and norm.track_running_stats
    ]
    if any([(mean is None) != (var is None) for _, mean, var, _ in tracked]):  # noqa: C419  # compiled
        raise ValueError(ONE_STATISTIC)
    steps = [constant(norm, "num_batches_tracked") for norm, *_ in tracked]
    counters = [counter for counter in steps if counter is not None]
    written = [t for _, mean, var, _ in tracked for t in (mean, var) if t is not None] + counters
    shared = len({norm for norm, *_ in tracked}) < len(tracked) or len(set(map(id, written))) < len(written)
    if shared and len(tracked) > 1:
        # A norm or buffer that several layers share is updated once for each layer, in their order.
        for norm, _, _, start in tracked:
            update_running_stats([norm], stats, [start], count)
        return
    if counters:
        torch._foreach_add_(counters, 1)
    if not tracked or (not isinstance(count, Tensor) and count == 0):
        return
    updated = [
        (norm.momentum, mean, var, start, step)
        for (norm, mean, var, start), step in zip(tracked, steps, strict=True)
        if mean is not None and not (step is None and norm.momentum is None)
    ]
    others = count - 1
    variances = stats[1] * (count / (others.clamp(min=1) if isinstance(others, Tensor) else max(others, 1)))
    channels = [(start, mean.shape[0]) for _, mean, _, start, _ in updated]
    batches = zip(_vectors(stats[0], channels), _vectors(variances, channels), strict=True)
    dtype = stats.dtype
    by_momentum: dict[float | None, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    narrow: list[tuple[Tensor, Tensor]] = []
    for (momentum, mean, var, _, step), batch in zip(updated, batches, strict=True):
        if momentum not in by_momentum:
            by_momentum[momentum] = ([], [], [])
        running, new, counts = by_momentum[momentum]
        if mean.dtype == dtype and var.dtype == dtype:
            running += (mean, var)
            new += batch
        else:
            # Statistics in 16 bits are updated in the wider type, so that they are rounded once.
            for old, values in zip((mean, var), batch, strict=True):
                wide = in_dtype(old, torch.promote_types(old.dtype, dtype))
                running.append(wide)
                new.append(in_dtype(values, wide.dtype))
                if wide is not old:
                    narrow.append((old, wide))
        counts += (step, step)  # not None where it is read, with momentum=None
    # PyTorch's formula. That of lerp, running + momentum*(batch - running), makes an infinite statistic NaN.
    for momentum, (running, new, counts) in by_momentum.items():
        if momentum is not None:
            torch._foreach_mul_(running, 1 - float(momentum))
            torch._foreach_add_(running, new, alpha=float(momentum))
            continue
        # momentum=None means the cumulative average: the factor is one over the number of steps so far.
        for r, b, n in zip(running, new, counts, strict=True):
            factor = n.double().reciprocal()
            r.mul_(1 - factor).add_(b * factor)
    for old, wide in narrow:
        old.copy_(wide)
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
        # Inside a mode PyTorch does not count the writes of _foreach functions. Autograd has to know of them,
        # to refuse a backward that reads the statistics of before.
        torch.autograd.graph.increment_version(written)
