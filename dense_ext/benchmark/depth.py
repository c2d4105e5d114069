"""Memory against depth: what one dense block keeps for backward as it gets deeper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torchvision.models.densenet import _DenseBlock

from ..modules import DenseBlock
from .memory import saved_bytes
from .peers import Peer

# A block as in the CIFAR networks; a small image, so that 400 layers fit anywhere.
GROWTH_RATE, IN_CHANNELS, SIZE, BATCH = 12, 24, 8, 1
DEPTHS = (25, 50, 100, 150, 200, 250, 300, 350, 400)


def _block(peer: Peer, layers: int, backend: str) -> nn.Module:
    if peer.recompute is not None:
        return DenseBlock(
            layers, IN_CHANNELS, GROWTH_RATE, recompute=peer.recompute, backend=peer.backend or backend
        )
    block: nn.Module = _DenseBlock(layers, IN_CHANNELS, 4, GROWTH_RATE, 0.0, peer.memory_efficient)
    return block


def block_bytes(peer: Peer, layers: int, device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Bytes per image that a block of ``layers`` layers keeps, measured by a forward pass."""
    with torch.device("meta"):
        block = _block(peer, layers, backend)
    block.to_empty(device=device).to(memory_format=peer.memory_format)  # type: ignore[call-overload]
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data.fill_(0.01)  # the bytes do not depend on the values
    # A block's input comes from a convolution, which under autocast gives ``dtype``.
    x = peer.images(torch.rand(BATCH, IN_CHANNELS, SIZE, SIZE, device=device, dtype=dtype)).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return saved_bytes(block, lambda: block(x)) // BATCH


def straight_line(xs: list[float], ys: list[float]) -> dict[str, float]:
    """Least-squares line: slope, intercept and R^2, the share of the variance it explains."""
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    residual = dy - slope * dx
    total = float(dy @ dy)
    r2 = 1.0 if total == 0 else 1 - float(residual @ residual) / total
    return {"slope": float(slope), "intercept": float(y.mean() - slope * x.mean()), "r2": r2}


def measure_depth(
    peers: Iterable[Peer],
    results: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    tick: Callable[[str], None],
    depths: tuple[int, ...] = DEPTHS,
    failing: Callable[[Peer], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Fill ``results`` with each peer's saved bytes per image by depth, and the line through them.

    A peer is measured within what ``failing`` makes of it, which says what a failure means.
    """
    results["block"] = {
        "growth_rate": GROWTH_RATE, "in_channels": IN_CHANNELS, "bottleneck": 4 * GROWTH_RATE,
        "size": SIZE, "batch": BATCH,
    }  # fmt: skip
    results["peers"] = {}
    for peer in peers:
        with failing(peer):
            counted = []
            for layers in depths:
                tick(f"{peer.name}, block of {layers} layers")
                counted.append(block_bytes(peer, layers, device, dtype, backend))
            line = straight_line([float(d) for d in depths], [float(b) for b in counted])
            results["peers"][peer.name] = {"layers": list(depths), "saved_bytes": counted, "line": line}
