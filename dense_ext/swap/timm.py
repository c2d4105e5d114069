"""timm's DenseNet: ``timm.models.densenet``. Its norms also apply the activation."""

from __future__ import annotations

from typing import ClassVar

from timm.layers.norm_act import BatchNormAct2d
from timm.models.densenet import DenseBlock, DenseLayer, DenseTransition
from torch import nn

from ..eligibility import Fused
from ..modules import FusedDenseBlock, FusedTransition
from .adapter import Adapter
from .adapter import SwappedFeatures as _SwappedFeatures


class _WithActivatingNorms(Fused):
    parts_of_norm: ClassVar = {"drop": nn.Identity, "act": nn.ReLU}


class SwappedDenseBlock(_WithActivatingNorms, FusedDenseBlock, DenseBlock):
    """timm's dense block, run as one operator."""

    parts: ClassVar = {
        "norm1": BatchNormAct2d,
        "conv1": nn.Conv2d,
        "norm2": BatchNormAct2d,
        "conv2": nn.Conv2d,
    }
    layer_type = DenseLayer


class SwappedTransition(_WithActivatingNorms, FusedTransition, DenseTransition):
    """timm's transition, run as one operator."""

    parts: ClassVar = {"norm": BatchNormAct2d, "conv": nn.Conv2d, "pool": nn.AvgPool2d}


class SwappedFeatures(_WithActivatingNorms, _SwappedFeatures):
    """timm's features, whose stem is a norm with activation, followed by the pool."""

    parts: ClassVar = {"norm0": BatchNormAct2d, "pool0": nn.MaxPool2d}


ADAPTER = Adapter(DenseBlock, DenseTransition, SwappedDenseBlock, SwappedTransition, SwappedFeatures)
