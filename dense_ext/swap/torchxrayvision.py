"""TorchXRayVision's DenseNet: ``torchxrayvision.models``."""

from __future__ import annotations

from torchxrayvision.models import _DenseBlock, _DenseLayer, _Transition

from ..modules import FusedDenseBlock, FusedTransition
from .adapter import Adapter


class SwappedDenseBlock(FusedDenseBlock, _DenseBlock):
    """TorchXRayVision's dense block, run as one operator."""

    layer_type = _DenseLayer


class SwappedTransition(FusedTransition, _Transition):
    """TorchXRayVision's transition, run as one operator."""


ADAPTER = Adapter(_DenseBlock, _Transition, SwappedDenseBlock, SwappedTransition)
