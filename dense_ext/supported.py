"""Which norms and convolutions the operators compute, whatever modules they come from.

A layer is a list of named modules in the order they run: a norm and a convolution, or two of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .batch_norm import num_features, uses_batch_stats
from .eligibility import Fused, interference, names_of

Named = tuple[str, Any]  # a module with its name for messages

# The norms and convolutions of signals, images and volumes, by the number of spatial dimensions.
NORM_TYPES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def dims_of(conv: nn.Module) -> int:
    """The spatial dimensions of a convolution's input; 0 for another module."""
    return next((dims for dims, kind in _CONVS.items() if type(conv) is kind), 0)


def block_reason(layers: Sequence[Sequence[Named]]) -> str | None:
    """Why the operators do not compute a dense block of these layers, or None."""
    dims = dims_of(layers[0][-1][1])
    for layer in layers:
        reason = _parts_reason(layer[:-2], dims, pointwise=True) or _parts_reason(layer[-2:], dims)
        if reason is not None:
            return reason
    return layers_reason(layers)


def layers_reason(layers: Sequence[Sequence[Named]]) -> str | None:
    """Why layers of supported modules do not form a dense block, or None.

    Each layer must read all channels before it, and all must have windows and dilation of the same size.
    """
    (_, first), channels = layers[0][-1], num_features(layers[0][0][1])
    for layer in layers:
        if len(layer) != len(layers[0]):
            return "some of its layers have a bottleneck and some have none"
        width = channels
        for (norm_name, norm), (name, conv) in zip(layer[::2], layer[1::2], strict=True):
            if num_features(norm) != width:
                return f"{norm_name} has {num_features(norm)} channels, expected {width}"
            if conv.in_channels != width:
                return f"{name} reads {conv.in_channels} channels, expected {width}"
            width = conv.out_channels
        name, last = layer[-1]
        if (last.kernel_size, last.dilation) != (first.kernel_size, first.dilation):
            return f"{name} has another kernel_size or dilation than the first layer's"
        channels += width
    return shared_reason([norm for layer in layers for _, norm in layer[::2]])


def transition_reason(norm: Named, conv: Named) -> str | None:
    """Why the operators do not compute a transition of these modules, or None."""
    reason = _parts_reason([norm, conv], dims_of(conv[1]), pointwise=True)
    return reason or layers_reason([[norm, conv]])


def _parts_reason(parts: Sequence[Named], dims: int, pointwise: bool = False) -> str | None:
    """Why a norm and a convolution are not supported; a ``pointwise`` one has a window of one pixel."""
    kinds: tuple[dict[int, Any], dict[int, Any]] = (NORM_TYPES, _CONVS)
    for (name, module), of in zip(parts, kinds, strict=False):
        expected = of.get(dims)
        if expected is None:
            return f"{name} is {type(module).__name__}, which is not supported"
        if of is NORM_TYPES:
            reason = Fused.part_reason(module, expected, 1)
        elif type(module) is not expected:
            reason = "is {}, not {}".format(*names_of(type(module), expected))
        else:
            reason = interference(module) or _conv_reason(module, pointwise)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _conv_reason(conv: Any, pointwise: bool) -> str | None:
    """Why a convolution is not supported: it has to keep the size, with one group and an odd window."""
    window, dilation = conv.kernel_size, set(conv.dilation)
    same = tuple(d * (length // 2) for length, d in zip(window, conv.dilation, strict=True))
    if pointwise and set(window) != {1}:
        return f"has kernel_size {window}, expected 1"
    if any(length % 2 == 0 for length in window):
        return f"has kernel_size {window}, expected odd numbers"
    if len(dilation) > 1:
        return f"has dilation {conv.dilation}, expected equal numbers"
    for name, right in (("stride", (1,) * len(window)), ("groups", 1), ("padding_mode", "zeros")):
        if (got := getattr(conv, name)) != right:
            return f"has {name} {got}, expected {right}"
    if conv.padding not in (same, "same"):
        return f"has padding {conv.padding}, expected {same}"
    return None


def shared_reason(norms: Iterable[nn.Module]) -> str | None:
    """Why norms cannot share a tensor's statistics, or None; either all synchronise in one group, or none."""
    groups = {
        (type(norm) is nn.SyncBatchNorm and norm.training, getattr(norm, "process_group", None))
        for norm in norms
        if uses_batch_stats(norm)
    }
    return "its norms take statistics over different processes" if len(groups) > 1 else None
