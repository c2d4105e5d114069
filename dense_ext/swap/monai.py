"""MONAI's DenseNet: ``monai.networks.nets.densenet``, for images and for volumes.

Each layer keeps its modules in a Sequential, including dropout. That dropout drops whole channels, which the
fused operator does not support.
"""

from __future__ import annotations

from typing import Any

from monai.data.meta_tensor import MetaTensor
from monai.networks.nets.densenet import _DenseBlock, _DenseLayer, _Transition
from torch import nn

from ..eligibility import VOUCHED_TENSORS, interference
from ..modules import FusedDenseBlock, FusedTransition
from .adapter import Adapter


class SwappedDenseBlock(FusedDenseBlock, _DenseBlock):
    """MONAI's dense block, run as one operator."""

    layer_type = _DenseLayer

    @staticmethod
    def inner(layer: Any) -> dict[str, Any]:
        layers = layer._modules.get("layers")
        return layers._modules if type(layers) is nn.Sequential and interference(layers) is None else {}


class SwappedTransition(FusedTransition, _Transition):
    """MONAI's transition, run as one operator."""


# A MetaTensor's values are read like a plain tensor's; PyTorch passes its metadata on to the results.
VOUCHED_TENSORS.add(MetaTensor)

ADAPTER = Adapter(_DenseBlock, _Transition, SwappedDenseBlock, SwappedTransition)
