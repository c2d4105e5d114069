"""Runs volumes [N, D, H, W, C] on an image backend's primitives where possible.

Some primitives treat each pixel by itself: the 1x1x1 convolution, the statistics and the sums. They take a
volume as an image of D*H rows and run on the image backend. The 3x3x3 convolution, the transition and the
stem use PyTorch's own operators, on an activation that lives only for the call. So memory still grows
linearly with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Primitives
from .base import PRIMITIVES
from .reference import ReferenceBackend

_OF_CHANNELS = ("bn_scale_shift", "bn_gradient")
_OF_PIXELS = (
    "channel_stats", "affine_gradient", "scaled_accumulate", "bn_relu_conv1x1_forward",
    "bn_relu_conv1x1_backward",
)  # fmt: skip


def _as_image(value: Any) -> Any:
    """A volume [N, D, H, W, C] as [N, D*H, W, C], a weight [B, C, 1, 1, 1] as [B, C, 1, 1]; views."""
    if not isinstance(value, Tensor) or value.dim() != 5:
        return value
    first, second, third, *rest = value.shape
    return value.view(first, second * third, *rest)


def _on_images(primitive: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(primitive)
    def on_volumes(*arguments: Any) -> None:
        primitive(*map(_as_image, arguments))

    return on_volumes


class VolumeBackend(ReferenceBackend):
    """The primitives for volumes: some from an image backend, the others from PyTorch's operators.

    Args:
        images: the primitives for images, for the same device and dtype.
    """

    def __init__(self, images: Primitives) -> None:
        self.name = f"{images.summary()}; PyTorch (3x3x3, pools)"  # type: ignore[misc]
        self.max_pixels = images.max_pixels  # type: ignore[misc]
        for name in _OF_CHANNELS:
            setattr(self, name, getattr(images, name))
        for name in _OF_PIXELS:
            setattr(self, name, _on_images(getattr(images, name)))

    def factor(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in the activations' dtype, in which eager PyTorch convolves too."""
        return x.to(dtype)

    # The transition and the stem run volume by volume, since the activations before a pool are the largest.

    def bn_relu_pool_conv1x1_forward(
        self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, y: Tensor
    ) -> None:
        for x1, y1 in zip(x.split(1), y.split(1), strict=True):
            super().bn_relu_pool_conv1x1_forward(x1, scale, shift, weight, y1)

    def bn_relu_pool_conv1x1_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        grad_x: Tensor,
        sums: Tensor,
        grad_weight: Tensor | None,
    ) -> None:
        part = torch.empty_like(sums)
        part_weight = None if grad_weight is None else torch.empty_like(grad_weight, dtype=sums.dtype)
        total_weight = None if part_weight is None else torch.zeros_like(part_weight)
        sums.zero_()
        for grad1, x1, out in zip(grad.split(1), x.split(1), grad_x.split(1), strict=True):
            super().bn_relu_pool_conv1x1_backward(
                grad1, x1, mean, scale, shift, weight, out, part, part_weight
            )
            sums += part
            if total_weight is not None and part_weight is not None:
                total_weight += part_weight
        if grad_weight is not None and total_weight is not None:
            grad_weight.copy_(total_weight)

    def bn_relu_maxpool_forward(self, x: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
        for x1, y1 in zip(x.split(1), y.split(1), strict=True):
            super().bn_relu_maxpool_forward(x1, scale, shift, y1)

    def bn_relu_maxpool_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        grad_x: Tensor,
        sums: Tensor,
    ) -> None:
        part = torch.empty_like(sums)
        sums.zero_()
        for grad1, x1, out in zip(grad.split(1), x.split(1), grad_x.split(1), strict=True):
            super().bn_relu_maxpool_backward(grad1, x1, mean, scale, shift, out, part)
            sums += part


@functools.lru_cache(maxsize=256)
def for_volumes(images: Primitives) -> Primitives:
    """The primitives for volumes, given those that were selected for images."""
    return Primitives(dict.fromkeys(PRIMITIVES, VolumeBackend(images)))
