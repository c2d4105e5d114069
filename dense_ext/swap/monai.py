"""MONAI's DenseNet: ``monai.networks.nets.densenet``, for images and for volumes.

A layer's modules are in a Sequential of their own, dropout among them; it drops whole channels, which the
operator does not.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets.densenet import _DenseBlock, _DenseLayer, _Transition
from torch import nn

from ..fused import listened_to
from ..modules import FusedDenseBlock, FusedTransition
from .adapter import Adapter


class SwappedDenseBlock(FusedDenseBlock, _DenseBlock):
    """MONAI's dense block, run as one operator."""

    layer_type = _DenseLayer

    @staticmethod
    def inner(layer: Any) -> dict[str, Any]:
        layers = layer._modules.get("layers")
        return layers._modules if type(layers) is nn.Sequential and not listened_to(layers) else {}


class SwappedTransition(FusedTransition, _Transition):
    """MONAI's transition, run as one operator."""


ADAPTER = Adapter(_DenseBlock, _Transition, SwappedDenseBlock, SwappedTransition)
