"""torchvision's DenseNet: ``torchvision.models.densenet``, and what is built on its blocks."""

from __future__ import annotations

from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition

from ..modules import FusedDenseBlock, FusedTransition
from .adapter import Adapter


class SwappedDenseBlock(FusedDenseBlock, _DenseBlock):
    """torchvision's dense block, run as one operator."""

    layer_type = _DenseLayer


class SwappedTransition(FusedTransition, _Transition):
    """torchvision's transition, run as one operator."""


ADAPTER = Adapter(_DenseBlock, _Transition, SwappedDenseBlock, SwappedTransition)
