"""``swap(model, recompute="auto")``: chooses what each block recomputes, so that a training step fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..memory import Planner, device_memory, parse_bytes
from ..schedule import RECOMPUTE


def policies_that_fit(
    model: nn.Module,
    input_shape: Sequence[int] | None,
    memory: int | str | None,
    dtype: torch.dtype | None,
    backend: str,
) -> dict[str, str]:
    """Maps each block's name to its policy. Arguments and errors as for :func:`dense_ext.swap`."""
    if input_shape is None or len(input_shape) not in (4, 5):
        got = None if input_shape is None else list(input_shape)
        needed = "input_shape=[N, C, H, W] of the images or [N, C, D, H, W] of the volumes"
        raise ValueError(f'recompute="auto" needs {needed}, got {got}')
    weight = next(model.parameters())
    budget = device_memory(weight.device) if memory is None else parse_bytes(memory)
    batch, *image_shape = input_shape
    first = next((m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), weight)
    # The images' memory format is not known yet; assume that of the first convolution's weight. Strides tell
    # it even for a single channel, where both formats have the same order in memory.
    channels_last = first.dim() in (4, 5) and first.stride(1) == 1
    planner = Planner(
        model, image_shape, dtype=dtype, optimizer="adamw", backend=backend, channels_last=channels_last
    )
    choice = planner.choose(batch, budget)
    if choice is None:
        least = min(planner.estimate(batch, policy).peak for policy in RECOMPUTE)
        largest = max(planner.largest_batch(budget, policy) for policy in RECOMPUTE)
        raise ValueError(
            f"no recompute policy fits images {list(input_shape)} into {budget} bytes: "
            f"they need at least {least} bytes; a batch of {largest} fits"
        )
    prefix = f"{planner.network.name}.features." if planner.network.name else "features."
    return {prefix + name: policy for name, policy in choice.recompute.items()}
