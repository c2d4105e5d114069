"""How much memory a training step takes, what fits, and what to recompute so that it fits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..backends import BACKENDS, requested, select
from ..backends.base import PRIMITIVES, STORAGE_DTYPES, Backend
from ..schedule import RECOMPUTE
from .network import BlockShape, network_of
from .search import largest
from .step import OPTIMIZERS, PARTS, Setting, Step
from .units import parse_bytes

# What is asked for, and what is taken to run on a GPU that is not here.
_ON_A_GPU_ELSEWHERE = {"auto": "triton", "triton": "triton", "cuda": "cuda"}


@dataclass(frozen=True)
class Estimate:
    """The peak of a training step.

    Args:
        peak: bytes.
        point: where in the step, e.g. ``"backward, denseblock1"``.
        parts: bytes held there by what for, in order; they add up to ``peak``.
        recompute: each block's policy, by its name in ``features``.
    """

    peak: int
    point: str
    parts: dict[str, int]
    recompute: dict[str, str]


class Planner:
    """Estimates for one model, in one setting, at any batch and policy.

    Args:
        model: a :class:`dense_ext.DenseNet` or one that :func:`dense_ext.swap` knows, swapped or not, on
            any device; or a name of ``dense_ext.models.MODELS``. Never changed or run. It is taken to
            train as if all of its dense parts were fused.
        image_shape: C, H, W of the images.
        dtype: the activations', None for the parameters' own. A narrower one means autocast.
        optimizer: ``"none"`` (forward and backward only), ``"sgd"``, ``"momentum"`` or ``"adamw"``.
        device: where it will train, None for where the model is (a name: the CPU). A GPU need not be here.
        backend: as :class:`dense_ext.DenseBlock`.
        channels_last: memory format of the images; contiguous ones cost copies in the stem.

    Raises:
        TypeError: a model that is neither a module nor a name.
        ValueError: an unknown name, dtype, optimizer or backend; no DenseNet; images that do not go
            with it.
        RuntimeError: a backend asked for by name cannot run there.

    Attributes:
        backend: what runs the primitives there, in words.
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
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"images must be [C, H, W] and not empty, got {list(image_shape)}")
        if self.image_shape[0] != self.network.in_channels:
            raise ValueError(
                f"the network takes images of {self.network.in_channels} channels, got {list(image_shape)}"
            )
        if device is None:
            device = "cpu" if isinstance(model, str) else next(model.parameters()).device
        kind = torch.device(device).type.replace("meta", "cpu")
        backends, self.backend = _serving(requested(backend), kind, dtype)
        self.setting = Setting(self.network, dtype, optimizer, kind, backends, channels_last)
        self.estimate(1)  # refuses images that are too small

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
        """The peak of a step of ``batch`` images; ``recompute`` is one policy or one per block."""
        if batch < 1:
            raise ValueError(f"the batch must be at least 1, got {batch}")
        policies = self._policies(recompute)
        step = Step(self.setting, (batch, *self.image_shape), policies).run()
        parts = {part: step.peak_parts[part] for part in PARTS if step.peak_parts.get(part)}
        names = (block.name for block in self.network.blocks)
        return Estimate(step.peak, step.peak_point, parts, dict(zip(names, policies, strict=True)))

    def largest_batch(self, memory: int | str, recompute: str | Sequence[str] = "bottleneck") -> int:
        """The largest batch whose peak is within ``memory`` (bytes, or as ``"80GiB"``); 0 if none is."""
        return largest(lambda batch: self.estimate(batch, recompute).peak, parse_bytes(memory))

    def choose(self, batch: int, memory: int | str) -> Estimate | None:
        """The policies, block by block, that compute least again and fit; None if nothing fits.

        Args:
            batch: images a step.
            memory: bytes, or as ``"80GiB"``.
        """
        budget = parse_bytes(memory)
        # What a block computes again does not depend on the others: try all mixtures, cheapest first.
        costs = self._costs(batch)
        mixtures = itertools.product(RECOMPUTE, repeat=len(costs))
        by_cost = sorted(mixtures, key=lambda m: sum(c[p] for c, p in zip(costs, m, strict=True)))
        estimates = (self.estimate(batch, mixture) for mixture in by_cost)
        return next((e for e in estimates if e.peak <= budget), None)

    def _costs(self, batch: int) -> list[dict[str, int]]:
        """For each block and policy, the multiply-adds of what backward computes again."""
        step = Step(self.setting, (batch, *self.image_shape), self._policies("bottleneck"))
        step.forward()
        return [
            {
                policy: step.block_pixels[block.name] * weights
                for policy, weights in zip(RECOMPUTE, _weights_applied_again(block), strict=True)
            }
            for block in self.network.blocks
        ]


def _serving(name: str, device: str, dtype: torch.dtype) -> tuple[Mapping[str, Backend], str]:
    """The backend of each primitive on a device of this kind, and all of them in words."""
    elsewhere = device == "cuda" and not torch.cuda.is_available() and dtype != torch.float64
    if elsewhere and name in _ON_A_GPU_ELSEWHERE:
        name = _ON_A_GPU_ELSEWHERE[name]
        return dict.fromkeys(PRIMITIVES, BACKENDS[name]), name
    primitives = select(name, device, dtype)
    return primitives.table, primitives.summary()


def _weights_applied_again(block: BlockShape) -> tuple[int, int, int]:
    """Weights that backward applies again at each pixel, under each policy of ``RECOMPUTE``."""
    bottleneck = block.bottleneck * sum(block.read_channels)
    # "block" computes the whole forward, and the bottlenecks once more.
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

    It counts what PyTorch's allocator hands out; fragmentation, a GPU's context and what cuDNN or
    oneDNN take for themselves come on top. So does the scratch of the GPU backends: mostly it is not held
    where the peak is, and adds some 20 MB to it at the most. Gradients count throughout the step.

    Args:
        input_shape: N, C, H, W of the images.
        recompute: one policy, or one for each block.
        model, dtype, optimizer, device, backend, channels_last: as :class:`Planner`.

    Raises: as :class:`Planner`; ValueError also for a shape that is not 4-D or an unknown policy.
    """
    shape = tuple(input_shape)
    if len(shape) != 4:
        raise ValueError(f"input_shape must be [N, C, H, W], got {list(shape)}")
    planner = Planner(
        model, shape[1:], dtype=dtype, optimizer=optimizer, device=device, backend=backend,
        channels_last=channels_last,
    )  # fmt: skip
    return planner.estimate(shape[0], recompute)
