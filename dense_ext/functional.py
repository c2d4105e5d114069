"""Dense blocks and transitions as functions of modules, for architectures that are written anew."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import name_of
from .checks import check_options
from .eligibility import input_reason, mode_reason, weights_reason
from .modules import as_image, run_dense_block, run_transition
from .ops import NOTHING_CARRIED
from .supported import block_reason, dims_of, transition_reason

__all__ = ["dense_block", "transition"]


def dense_block(
    x: Tensor,
    layers: Sequence[Sequence[nn.Module]],
    *,
    activation: nn.Module | None = None,
    drop_rate: float = 0.0,
    recompute: str = "bottleneck",
    backend: str = "auto",
) -> Tensor:
    """Run dense layers over the concatenation of all features before them, as one fused operator.

    Args:
        x: [N, c0, H, W], or [N, c0, D, H, W] with norms and convolutions for volumes, or [N, c0, length]
            with those for signals.
        layers: for each layer its norm and convolution; or its norm, 1x1 convolution, second norm and
            convolution. The convolution keeps the size of images: its window is odd, such as 3x3.
        activation: what follows each norm: ReLU, LeakyReLU, ELU, GELU, SiLU or Identity; ReLU by default.
        drop_rate: probability of dropping an element of what a layer adds; 0 in eval mode.
        recompute: as :class:`dense_ext.DenseBlock`.
        backend: as :class:`dense_ext.DenseBlock`.

    Returns:
        [N, c0 + L*K, H, W] in channels_last memory, x first and then what each layer adds; K may differ
        from layer to layer. The block's backward reads the result, so do not write into it.

    Modules that the operator does not support (groups, a stride, a hook) run one by one instead, with a
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
    activate = activation or nn.ReLU()
    named = [[(f"layer {i}: module {j}", m) for j, m in enumerate(layer)] for i, layer in enumerate(layers)]
    if not _may_fuse(x, convs, _activation_reason(activate) or block_reason(named)):
        for layer in layers:
            x = torch.cat([x, F.dropout(_apply(layer, activate, x), drop_rate)], 1)
        return x
    image = as_image(x, convs[0])
    out, _ = run_dense_block(
        image, norms, convs, recompute, backend,
        drop_rates=[0.0] * (len(convs) // len(layers) - 1) + [drop_rate],
        activation=str(name_of(activate)),
    )  # fmt: skip
    return out if image is x else out.squeeze(2)


def transition(
    x: Tensor,
    norm: nn.Module,
    conv: nn.Module,
    *,
    activation: nn.Module | None = None,
    pool: str = "average",
    backend: str = "auto",
) -> Tensor:
    """Run a norm, ReLU, 1x1 convolution and a pool of 2x2 windows as one fused operator.

    Args:
        x: [N, C, H, W], or [N, C, D, H, W] or [N, C, L] with modules for volumes or signals; each size is at
            least 2.
        norm: a batch norm of C channels.
        conv: a 1x1 convolution from C to K channels.
        activation: as for :func:`dense_block`.
        pool: "average" or "max".
        backend: as :class:`dense_ext.DenseBlock`.

    Returns:
        [N, K, H//2, W//2] in channels_last memory.

    Modules that the operator does not support run one by one, as in :func:`dense_block`.

    Raises:
        ValueError, TypeError: as :func:`dense_block`.
    """
    check_options("none", backend)
    if pool not in _POOLS:
        raise ValueError(f"pool must be one of {tuple(_POOLS)}, got {pool!r}")
    activate = activation or nn.ReLU()
    reason = _activation_reason(activate) or transition_reason(("the norm", norm), ("the convolution", conv))
    if not _may_fuse(x, [conv], reason):
        return _POOLS[pool][dims_of(conv)](_apply([norm, conv], activate, x), 2)
    image = as_image(x, conv)
    y, _ = run_transition(
        image, norm, conv, backend, NOTHING_CARRIED, pool=pool, activation=str(name_of(activate))
    )
    return y if image is x else y.squeeze(2)


_POOLS: dict[str, dict[int, Any]] = {
    "average": {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d},
    "max": {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d},
}


def _apply(modules: Sequence[nn.Module], activate: nn.Module, x: Tensor) -> Tensor:
    for norm, conv in zip(modules[::2], modules[1::2], strict=True):
        x = conv(activate(norm(x)))
    return x


def _activation_reason(activation: nn.Module) -> str | None:
    return None if name_of(activation) else f"the activation is {type(activation).__name__}"


def _may_fuse(x: Any, convs: Sequence[Any], reason: str | None) -> bool:
    """Whether the operator may run; warns where the modules are the reason that it may not."""
    if reason is None:
        reason = weights_reason(convs)
    if reason is not None:
        warnings.warn(f"dense_ext.functional runs the modules one by one: {reason}", stacklevel=3)
        return False
    return mode_reason() is None and input_reason(x) is None
