"""torchvision's DenseNet: ``torchvision.models.densenet``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torchvision.models.densenet import DenseNet, _DenseBlock, _DenseLayer, _Transition

from ..modules import FusedDenseBlock, FusedTransition, StemMaxPool, StemNorm, StemReLU, fuse_stem
from .adapter import Candidate
from .checks import conv_reason, hook_reason, norm_reason, relu_reason


class SwappedDenseBlock(FusedDenseBlock, _DenseBlock):
    """torchvision's dense block, run as one operator."""


class SwappedTransition(FusedTransition, _Transition):
    """torchvision's transition, run as one operator."""


_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    SwappedDenseBlock: _DenseBlock,
    SwappedTransition: _Transition,
    StemNorm: nn.BatchNorm2d,
    StemReLU: nn.ReLU,
    StemMaxPool: nn.MaxPool2d,
}
# Attributes a swap adds and a restore takes away.
_ADDED = ("recompute", "backend", "stem")


def _layer_reason(layer: Any) -> str | None:
    if type(layer) is not _DenseLayer:
        return f"is {type(layer).__name__}, not torchvision's _DenseLayer"
    child = layer._modules.get
    return (
        norm_reason("norm1", child("norm1"))
        or relu_reason("relu1", child("relu1"))
        or conv_reason("conv1", child("conv1"), 1)
        or norm_reason("norm2", child("norm2"))
        or relu_reason("relu2", child("relu2"))
        or conv_reason("conv2", child("conv2"), 3)
    )


def _block_reason(block: Any) -> str | None:
    if type(block) is not _DenseBlock:
        return f"{type(block).__name__} is a subclass with a forward of its own"
    if not len(block):
        return "it has no layers"
    for name, layer in block.items():
        if reason := _layer_reason(layer):
            return f"{name}: {reason}"
    layers = list(block.values())
    if len({layer.conv2.out_channels for layer in layers}) > 1:
        return "its layers have different growth rates"
    if len({layer.conv1.out_channels for layer in layers}) > 1:
        return "its layers have different bottlenecks"
    if len({layer.drop_rate for layer in layers}) > 1:
        return "its layers have different drop rates"
    channels, growth = layers[0].norm1.num_features, layers[0].conv2.out_channels
    for i, (name, layer) in enumerate(block.items()):
        if layer.conv1.in_channels != channels + i * growth:
            return f"{name} reads {layer.conv1.in_channels} channels, expected {channels + i * growth}"
    return hook_reason(block)


def _transition_reason(transition: nn.Module) -> str | None:
    if type(transition) is not _Transition:
        return f"{type(transition).__name__} is a subclass with a forward of its own"
    child = transition._modules.get
    pool = child("pool")
    if list(transition._modules) != ["norm", "relu", "conv", "pool"]:
        return f"its children are {list(transition._modules)}, expected norm, relu, conv, pool"
    if reason := (
        norm_reason("norm", child("norm"))
        or relu_reason("relu", child("relu"))
        or conv_reason("conv", child("conv"), 1)
    ):
        return reason
    settings = [getattr(pool, a, None) for a in ("kernel_size", "stride", "padding", "ceil_mode")]
    if type(pool) is not nn.AvgPool2d or settings != [2, 2, 0, False]:
        return f"pool is {pool}, expected AvgPool2d(kernel_size=2, stride=2)"
    return hook_reason(transition)


def _stem_reason(features: nn.Sequential) -> str | None:
    norm, relu, pool = (features._modules.get(n) for n in ("norm0", "relu0", "pool0"))
    if reason := norm_reason("norm0", norm) or relu_reason("relu0", relu):
        return reason
    attributes = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    settings = [getattr(pool, a, None) for a in attributes]
    if type(pool) is not nn.MaxPool2d or settings != [3, 2, 1, 1, False, False]:
        return f"pool0 is {pool}, expected MaxPool2d(kernel_size=3, stride=2, padding=1)"
    names = list(features._modules)
    start = names.index("norm0")
    if names[start : start + 3] != ["norm0", "relu0", "pool0"]:
        return "norm0, relu0 and pool0 do not follow one another"
    for name in ("norm0", "relu0", "pool0"):
        if reason := hook_reason(nn.ModuleDict({name: features._modules[name]})):
            return reason
    return None


class TorchvisionAdapter:
    """Finds parts by class. The stem only in torchvision's own DenseNet, whose forward runs it in order."""

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        for name, module in model.named_modules():
            if isinstance(module, _DenseBlock):
                swapped = isinstance(module, SwappedDenseBlock)
                reason = None if swapped else _block_reason(module)
                yield Candidate(name, "dense block", (module,), reason, swapped)
            elif isinstance(module, _Transition):
                swapped = isinstance(module, SwappedTransition)
                reason = None if swapped else _transition_reason(module)
                yield Candidate(name, "transition", (module,), reason, swapped)
            elif type(module) is DenseNet and "norm0" in module.features._modules:
                features = module.features
                stem = tuple(features._modules[n] for n in ("norm0", "relu0", "pool0"))
                swapped = isinstance(stem[0], StemNorm)
                prefix = f"{name}." if name else ""
                reason = None if swapped else _stem_reason(features)
                yield Candidate(f"{prefix}features.norm0", "stem", stem, reason, swapped)

    def swap(self, candidate: Candidate, recompute: str, backend: str) -> None:
        if candidate.kind == "stem":
            fuse_stem(candidate.modules, backend)
            return
        (module,) = candidate.modules
        module.backend = backend
        if candidate.kind == "dense block":
            module.recompute = recompute
            module.__class__ = SwappedDenseBlock
        else:
            module.__class__ = SwappedTransition

    def restore(self, model: nn.Module) -> None:
        for candidate in [c for c in self.candidates(model) if c.swapped]:
            for module in candidate.modules:
                module.__class__ = _ORIGINALS[type(module)]
                for attribute in _ADDED:
                    module.__dict__.pop(attribute, None)


ADAPTER = TorchvisionAdapter()
