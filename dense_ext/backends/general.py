"""Runs what the kernels do not take on an image backend's primitives where possible.

The kernels take images, ReLU, 3x3 windows and 2x2 pools. Volumes, other activations and other windows run
here. Some primitives treat each pixel by itself: the 1x1 convolution, the statistics and the sums. They take
a volume as an image of D*H rows and run on the image backend. The other convolutions, the transition and the
stem use PyTorch's own operators, on an activation that lives only for the call. So memory still grows
linearly with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import Primitives
from .reference import ReferenceBackend
from .table import PRIMITIVES

_OF_CHANNELS = ("bn_scale_shift", "bn_gradient")
_OF_PIXELS = ("channel_stats", "affine_gradient", "scaled_accumulate")
_CONV1X1 = ("bn_relu_conv1x1_forward", "bn_relu_conv1x1_backward")
_CONV3X3 = ("bn_relu_conv3x3_forward", "bn_relu_conv3x3_backward")
_TRANSITION = ("bn_relu_pool_conv1x1_forward", "bn_relu_pool_conv1x1_backward")


@dataclass(frozen=True)
class Form:
    """What primitives are to compute; the default is what the kernels take.

    Attributes:
        window: of a layer's last convolution.
        dilation: of that convolution.
        pool: the window of a transition's pool.
        activation: as :func:`dense_ext.activations.activation` takes it.
        pools_last: whether a transition's pool follows its convolution, since it takes the maximum or dropout
            comes before it. Then PyTorch's operator pools.
    """

    window: tuple[int, ...] = (3, 3)
    dilation: int = 1
    pool: tuple[int, ...] = (2, 2)
    activation: str = "relu"
    pools_last: bool = False


def block_form(window: Sequence[int], dilation: int, activation: str) -> Form:
    """The form of a block whose layers end with a convolution of a window and a dilation."""
    return Form(tuple(window), dilation, (2,) * len(window), activation)


def transition_form(pool: Sequence[int], activation: str, pools_last: bool) -> Form:
    """The form of a transition with a pooling window."""
    return Form((3,) * len(pool), 1, tuple(pool), activation, pools_last)


FOR_IMAGES, FOR_VOLUMES = Form(), Form(window=(3, 3, 3), pool=(2, 2, 2))


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


class GeneralBackend(ReferenceBackend):
    """The primitives of another form: some from an image backend, the others from PyTorch's operators.

    Args:
        images: the primitives for images, for the same device and dtype.
        form: what the primitives are to compute.
    """

    def __init__(self, images: Primitives, form: Form) -> None:
        self.activation, self.dilation, self.pool = form.activation, form.dilation, form.pool
        relu = form.activation == "relu"
        plain_conv = (form.window, form.dilation) == ((3, 3), 1)
        runs = [  # primitives with their name in a report, and whether PyTorch's operators run them
            ("1x1", _CONV1X1, not relu),
            ("x".join(map(str, form.window)), _CONV3X3, not (relu and plain_conv)),
            ("pools", _TRANSITION, not (relu and form.pool == (2, 2)) or form.pools_last),
        ]
        taken = [*_OF_CHANNELS, *_OF_PIXELS]
        taken += [name for _, primitives, slow in runs if not slow for name in primitives]
        for name in taken:
            setattr(self, name, _on_images(getattr(images, name)))
        others = ", ".join(name for name, _, slow in runs if slow)
        self.name = f"{images.summary()}; PyTorch ({others})"  # type: ignore[misc]
        self.max_pixels = images.max_pixels  # type: ignore[misc]

    def _window(self, x: Tensor) -> tuple[int, ...]:
        return self.pool

    def factor(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in the weight's dtype, in which eager PyTorch convolves too."""
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
def in_form(images: Primitives, form: Form) -> Primitives:
    """The primitives that compute another form, given those that were selected for images."""
    if form == FOR_IMAGES or (form == FOR_VOLUMES and images.takes_volumes):
        return images
    return Primitives(dict.fromkeys(PRIMITIVES, GeneralBackend(images, form)))
