"""The memory of a training step, the largest batch that fits, and what to recompute to make a step fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..backends import BACKENDS, requested, select
from ..backends.base import STORAGE_DTYPES, Backend
from ..backends.table import PRIMITIVES
from ..schedule import RECOMPUTE
from .network import BlockShape, network_of
from .search import largest
from .step import OPTIMIZERS, PARTS, Setting, Step
from .units import parse_bytes

# The backend assumed for a GPU if this machine has none, by the backend requested.
_ASSUMED_ON_GPU = {"auto": "triton", "triton": "triton", "cuda": "cuda"}


@dataclass(frozen=True)
class Estimate:
    """The peak of a training step.

    Args:
        peak: the peak in bytes.
        point: the point in the step where the peak occurs, e.g. ``"backward, denseblock1"``.
        parts: the bytes held at that point, by purpose in a fixed order; they add up to ``peak``.
        recompute: each block's policy, by the block's name in ``features``.
    """

    peak: int
    point: str
    parts: dict[str, int]
    recompute: dict[str, str]


class Planner:
    """Estimates for one model in one setting, at any batch size and recompute policies.

    Args:
        model: a :class:`dense_ext.DenseNet` or a DenseNet that :func:`dense_ext.swap` supports, swapped or
            not, on any device; a model that contains one; or a name from ``dense_ext.models.MODELS``. It is
            never changed or run. The estimates assume that it trains with all of its dense parts fused. Of a
            model around a DenseNet they include the parameters, but not the activations.
        image_shape: the shape [C, H, W] of an image, or [C, D, H, W] of a volume.
        dtype: the activations' dtype; None for the parameters' dtype. A narrower one means autocast.
        optimizer: ``"none"`` (forward and backward only), ``"sgd"``, ``"momentum"`` or ``"adamw"``.
        device: the device to train on; None for the model's device (for a name, the CPU). The machine need
            not have a GPU to plan for one.
        backend: as for :class:`dense_ext.DenseBlock`.
        channels_last: whether the images are in channels_last memory; contiguous ones cost copies in the
            stem.

    Raises:
        TypeError: model is neither a module nor a name.
        ValueError: the name, dtype, optimizer or backend is unknown; the model is not a DenseNet; or the
            images have the wrong number of channels or are too small. Or PyTorch's operators would run a
            part of a network for volumes, whose memory is not known: so it is without the compiled CPU
            backend.
        RuntimeError: the requested backend cannot run on the device.

    Attributes:
        backend: a summary of the backends that run the primitives.
    """

    def __init__(
        self,
        model: nn.Module | str,
        image_shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        optimizer: str = "momentum",
        device: torch.device | str | None = None,
        backend: str = "auto",
        channels_last: bool = True,
    ) -> None:
        self.network = network_of(model)
        dtype = dtype or self.network.parameter_dtype
        if dtype not in STORAGE_DTYPES:
            raise ValueError(f"dtype must be one of {STORAGE_DTYPES}, got {dtype}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {tuple(OPTIMIZERS)}, got {optimizer!r}")
        self.image_shape = tuple(image_shape)
        sides = ", ".join("DHW"[-self.network.dimensions :])
        if len(self.image_shape) != self.network.dimensions + 1 or min(self.image_shape) < 1:
            raise ValueError(f"images must be [C, {sides}] and not empty, got {list(image_shape)}")
        if self.image_shape[0] != self.network.in_channels:
            raise ValueError(
                f"the network takes images of {self.network.in_channels} channels, got {list(image_shape)}"
            )
        if device is None:
            device = "cpu" if isinstance(model, str) else next(model.parameters()).device
        kind = torch.device(device).type.replace("meta", "cpu")
        backends, self.backend = _backends_on(kind, requested(backend), dtype)
        self.setting = Setting(self.network, dtype, optimizer, kind, backends, channels_last)
        if self.network.dimensions == 3:
            self._check_volumes(backends)
        self.estimate(1)  # refuses images that are too small

    def _check_volumes(self, backends: Mapping[str, Backend]) -> None:
        if not all(backend.takes_volumes for backend in backends.values()):
            raise ValueError(f"volumes are planned for the cpu backend alone, not for {self.backend}")

    def _policies(self, recompute: str | Sequence[str]) -> tuple[str, ...]:
        blocks = self.network.blocks
        policies = (recompute,) * len(blocks) if isinstance(recompute, str) else tuple(recompute)
        if len(policies) != len(blocks):
            raise ValueError(f"recompute has {len(policies)} entries, expected {len(blocks)}, one per block")
        for policy in policies:
            if policy not in RECOMPUTE:
                raise ValueError(f"recompute must be one of {RECOMPUTE}, got {policy!r}")
        return policies

    def estimate(self, batch: int, recompute: str | Sequence[str] = "bottleneck") -> Estimate:
        """The peak of a step with ``batch`` images. ``recompute`` is one policy, or one for each block."""
        if batch < 1:
            raise ValueError(f"the batch must be at least 1, got {batch}")
        policies = self._policies(recompute)
        step = Step(self.setting, (batch, *self.image_shape), policies).run()
        parts = {part: step.peak_parts[part] for part in PARTS if step.peak_parts.get(part)}
        names = (block.name for block in self.network.blocks)
        return Estimate(step.peak, step.peak_point, parts, dict(zip(names, policies, strict=True)))

    def largest_batch(self, memory: int | str, recompute: str | Sequence[str] = "bottleneck") -> int:
        """The largest batch whose peak fits into ``memory`` (bytes, or as in ``"80GiB"``); 0 if none fits."""
        return largest(lambda batch: self.estimate(batch, recompute).peak, parse_bytes(memory))

    def choose(self, batch: int, memory: int | str) -> Estimate | None:
        """The estimate with the policies for the blocks that fit and recompute least; None if none fits.

        Args:
            batch: the number of images per step.
            memory: the memory to fit into, in bytes or as in ``"80GiB"``.
        """
        budget = parse_bytes(memory)
        # A block's cost does not depend on the other blocks' policies, so try all mixtures, cheapest first.
        costs = self._costs(batch)
        mixtures = itertools.product(RECOMPUTE, repeat=len(costs))
        by_cost = sorted(mixtures, key=lambda m: sum(c[p] for c, p in zip(costs, m, strict=True)))
        estimates = (self.estimate(batch, mixture) for mixture in by_cost)
        return next((e for e in estimates if e.peak <= budget), None)

    def _costs(self, batch: int) -> list[dict[str, int]]:
        """For each block and policy, the multiply-adds that backward recomputes."""
        step = Step(self.setting, (batch, *self.image_shape), self._policies("bottleneck"))
        step.forward()
        return [
            {
                policy: step.block_pixels[block.name] * weights
                for policy, weights in zip(RECOMPUTE, _recomputed_weights(block), strict=True)
            }
            for block in self.network.blocks
        ]


def _backends_on(device: str, name: str, dtype: torch.dtype) -> tuple[Mapping[str, Backend], str]:
    """The backend of each primitive on a device of this type, and a summary of them."""
    elsewhere = device == "cuda" and not torch.cuda.is_available() and dtype != torch.float64
    if elsewhere and name in _ASSUMED_ON_GPU:
        name = _ASSUMED_ON_GPU[name]
        return dict.fromkeys(PRIMITIVES, BACKENDS[name]), name
    primitives = select(name, device, dtype)
    return primitives.table, primitives.summary()


def _recomputed_weights(block: BlockShape) -> tuple[int, int, int]:
    """The multiply-adds that backward recomputes per pixel, under each policy of ``RECOMPUTE``."""
    bottleneck = block.bottleneck * sum(block.read_channels)
    # "block" recomputes the whole forward, and then the bottlenecks once more.
    return 0, bottleneck, block.conv_weights + bottleneck


def estimate(
    model: nn.Module | str,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    recompute: str | Sequence[str] = "bottleneck",
    optimizer: str = "momentum",
    device: torch.device | str | None = None,
    backend: str = "auto",
    channels_last: bool = True,
) -> Estimate:
    """The peak memory of one training step of dense_ext, without running it or allocating anything.

    It counts the memory of PyTorch's allocator. It does not count fragmentation, a GPU's context, or the
    workspaces of cuDNN and oneDNN. Nor does it count the GPU backends' scratch memory. This adds at most
    some 20 MB to the peak, and mostly is not held when the peak occurs. Gradients count throughout the step.

    Args:
        input_shape: the shape [N, C, H, W] of the images, or [N, C, D, H, W] of the volumes.
        recompute: one policy, or one for each block.
        model, dtype, optimizer, device, backend, channels_last: as for :class:`Planner`.

    Raises: as :class:`Planner`; also ValueError if the shape is neither or a policy is unknown.
    """
    shape = tuple(input_shape)
    if len(shape) not in (4, 5):
        raise ValueError(f"input_shape must be [N, C, H, W] or [N, C, D, H, W], got {list(shape)}")
    planner = Planner(
        model, shape[1:], dtype=dtype, optimizer=optimizer, device=device, backend=backend,
        channels_last=channels_last,
    )  # fmt: skip
    return planner.estimate(shape[0], recompute)
