"""torchvision's DenseNet: ``torchvision.models.densenet``, and other networks built from its blocks."""

from __future__ import annotations

from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition
from torchvision.ops import FrozenBatchNorm2d

from ..eligibility import FIXED_NORMS
from ..modules import FusedDenseBlock, FusedTransition
from .adapter import Adapter


class SwappedDenseBlock(FusedDenseBlock, _DenseBlock):
    """torchvision's dense block, run as one operator."""

    layer_type = _DenseLayer


class SwappedTransition(FusedTransition, _Transition):
    """torchvision's transition, run as one operator."""


FIXED_NORMS.add(FrozenBatchNorm2d)

ADAPTER = Adapter(_DenseBlock, _Transition, SwappedDenseBlock, SwappedTransition)
