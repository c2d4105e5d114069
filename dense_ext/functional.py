"""Dense blocks and transitions as functions of modules, for architectures that are written anew."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_options
from .eligibility import Fused, input_reason, mode_reason, weights_reason
from .modules import run_dense_block, run_transition
from .ops import NOTHING_CARRIED

__all__ = ["dense_block", "transition"]


def dense_block(
    x: Tensor,
    layers: Sequence[Sequence[nn.Module]],
    *,
    drop_rate: float = 0.0,
    recompute: str = "bottleneck",
    backend: str = "auto",
) -> Tensor:
    """Run dense layers over the concatenation of all features before them, as one fused operator.

    Args:
        x: [N, c0, H, W], or [N, c0, D, H, W] with norms and convolutions for volumes.
        layers: for each layer its norm and 3x3 convolution; or its norm, 1x1 convolution, second norm and
            3x3 convolution. A ReLU follows each norm. All layers have the same widths but for what they read.
        drop_rate: probability of dropping an element of what a layer adds; 0 in eval mode.
        recompute: as :class:`dense_ext.DenseBlock`.
        backend: as :class:`dense_ext.DenseBlock`.

    Returns:
        [N, c0 + L*K, H, W] in channels_last memory, x first and then what each layer adds. Its backward
        reads it, so it must not be written in place.

    Modules that the operator does not support (a bias, a dilation, a hook) run one by one instead, with a
    warning. The same holds, without a warning, where PyTorch traces, exports or transforms.

    Raises:
        ValueError: unknown recompute or backend, a drop_rate outside [0, 1], no layers, or a layer of another
            length; an input of another rank or channel count, or with one value per channel in training.
        TypeError: an input that is not floating or not of the parameters' dtype.

    Source: arXiv 1608.06993, section 3; memory after arXiv 1707.06990.
    """
    check_options(recompute, backend)
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate must be a probability, got {drop_rate}")
    lengths = {len(layer) for layer in layers}
    if lengths not in ({2}, {4}):
        raise ValueError(f"each layer must have 2 modules, or each 4, got {sorted(lengths)}")
    flat: list[Any] = [module for layer in layers for module in layer]
    norms, convs = flat[::2], flat[1::2]
    if not _may_fuse(x, norms, convs, _block_reason(norms, convs, len(layers))):
        for layer in layers:
            x = torch.cat([x, F.dropout(_apply(layer, x), drop_rate)], 1)
        return x
    out, _ = run_dense_block(x, norms, convs, drop_rate, recompute, backend)
    return out


def transition(x: Tensor, norm: nn.Module, conv: nn.Module, *, backend: str = "auto") -> Tensor:
    """Run a norm, ReLU, 1x1 convolution and 2x2 average pool as one fused operator.

    Args:
        x: [N, C, H, W], or [N, C, D, H, W] with modules for volumes; height and width are at least 2.
        norm: a batch norm of C channels.
        conv: a 1x1 convolution from C to K channels, without bias.
        backend: as :class:`dense_ext.DenseBlock`.

    Returns:
        [N, K, H//2, W//2] in channels_last memory.

    Modules that the operator does not support run one by one, as in :func:`dense_block`.

    Raises:
        ValueError, TypeError: as :func:`dense_block`.
    """
    check_options("none", backend)
    if not _may_fuse(x, [norm], [conv], _reason([norm], [conv], [1])):
        pool = F.avg_pool3d if isinstance(conv, nn.Conv3d) else F.avg_pool2d
        return pool(_apply([norm, conv], x), 2)
    return run_transition(x, norm, conv, backend, NOTHING_CARRIED)


def _apply(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for norm, conv in zip(modules[::2], modules[1::2], strict=True):
        x = conv(F.relu(norm(x)))
    return x


def _may_fuse(x: Any, norms: Sequence[Any], convs: Sequence[Any], reason: str | None) -> bool:
    """Whether the operator may run; warns where the modules are the reason that it may not."""
    if reason is None:
        reason = weights_reason(convs)
    if reason is not None:
        warnings.warn(f"dense_ext.functional runs the modules one by one: {reason}", stacklevel=3)
        return False
    return mode_reason() is None and input_reason(x) is None


def _block_reason(norms: Sequence[Any], convs: Sequence[Any], layers: int) -> str | None:
    per_layer = len(convs) // layers
    reason = _reason(norms, convs, ([1, 3] if per_layer == 2 else [3]) * layers)
    if reason is not None:
        return reason
    channels, growth = norms[0].num_features, convs[-1].out_channels
    for i in range(layers):
        first, last = convs[i * per_layer], convs[(i + 1) * per_layer - 1]
        if (first.in_channels, last.out_channels) != (channels, growth):
            found = f"{first.in_channels} and adds {last.out_channels}"
            return f"layer {i} reads {found} channels, expected {channels} and {growth}"
        if first.out_channels != convs[0].out_channels:
            expected = convs[0].out_channels
            return f"layer {i} has a bottleneck of {first.out_channels} channels, expected {expected}"
        channels += growth
    return None


def _reason(norms: Sequence[Any], convs: Sequence[Any], sizes: Sequence[int]) -> str | None:
    """Why the operators do not support these norms and convolutions of these sizes, or None."""
    volumes = isinstance(convs[0], nn.Conv3d)
    norm_type, conv_type = (nn.BatchNorm3d, nn.Conv3d) if volumes else (nn.BatchNorm2d, nn.Conv2d)
    for i, (norm, conv, size) in enumerate(zip(norms, convs, sizes, strict=True)):
        if reason := Fused.part_reason(norm, norm_type, 1):
            return f"norm {i} {reason}"
        if reason := Fused.part_reason(conv, conv_type, size):
            return f"convolution {i} {reason}"
        if norm.num_features != conv.in_channels:
            return f"norm {i} has {norm.num_features} channels, its convolution {conv.in_channels}"
    return None
