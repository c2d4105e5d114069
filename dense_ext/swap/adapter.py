"""What an adapter to another library's DenseNet is. Each library has a file of its own beside this one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..fused import Fused
from ..modules import FusedDenseBlock, FusedFeatures, FusedTransition

# Library -> the adapter's module; loaded only if the process has imported the library itself.
_LIBRARIES = {
    "torchvision.models.densenet": "torchvision",
    "timm.models.densenet": "timm",
    "monai.networks.nets.densenet": "monai",
    "torchxrayvision.models": "torchxrayvision",
}
# Attributes a swap adds and a restore takes away.
_ADDED = ("recompute", "backend")


@dataclass(frozen=True)
class Candidate:
    """A part of a model that an adapter knows by its class."""

    name: str  # dotted, in the model
    kind: str  # "dense block", "transition" or "stem"
    module: Any
    reason: str | None  # why it cannot be swapped, None if it can
    swapped: bool


@dataclass(frozen=True)
class Adapter:
    """A library's classes, and those that take their place: each inherits from both sides.

    Parts are found by class. A stem belongs to a Sequential that also has a dense block.
    """

    block: type[nn.Module]
    transition: type[nn.Module]
    fused_block: type[FusedDenseBlock]
    fused_transition: type[FusedTransition]
    fused_features: type[FusedFeatures] = FusedFeatures

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        """The model's dense parts, in order."""
        for name, module in model.named_modules():
            if isinstance(module, self.block):
                yield self._candidate(name, "dense block", module, self._block_reason)
            elif isinstance(module, self.transition):
                yield self._candidate(name, "transition", module, self._transition_reason)
            elif self._has_stem(module):
                yield self._candidate(name, "stem", module, self._stem_reason)

    def swap(self, candidate: Candidate, recompute: str, backend: str) -> None:
        """Swap a candidate that has no reason against it: its class changes, the object stays."""
        module = candidate.module
        module.backend = backend
        if candidate.kind == "dense block":
            module.recompute = recompute
        module.__class__ = self._fused[candidate.kind]

    def restore(self, model: nn.Module) -> None:
        """Undo every swap in the model."""
        originals = {"dense block": self.block, "transition": self.transition, "stem": nn.Sequential}
        for candidate in [c for c in self.candidates(model) if c.swapped]:
            candidate.module.__class__ = originals[candidate.kind]
            for attribute in _ADDED:
                candidate.module.__dict__.pop(attribute, None)

    @property
    def _fused(self) -> dict[str, Any]:
        return {
            "dense block": self.fused_block,
            "transition": self.fused_transition,
            "stem": self.fused_features,
        }

    def _has_stem(self, module: nn.Module) -> bool:
        children = module._modules if isinstance(module, nn.Sequential) else {}
        return "pool0" in children and any(isinstance(child, self.block) for child in children.values())

    def _candidate(self, name: str, kind: str, module: nn.Module, why_not: Any) -> Candidate:
        swapped = isinstance(module, self._fused[kind])
        return Candidate(name, kind, module, None if swapped else why_not(module), swapped)

    def _block_reason(self, block: Any) -> str | None:
        fused, layers = self.fused_block, list(block._modules.values())
        if type(block) is not self.block:
            return f"{type(block).__name__} is a subclass with a forward of its own"
        if not layers:
            return "it has no layers"
        for name, layer in block._modules.items():
            if type(layer) is not fused.layer_type:
                return f"{name} is {type(layer).__name__}, not {fused.layer_type.__name__}"
        inner = [fused.inner(layer) for layer in layers]
        reasons = (_order_reason(fused, modules) for modules in inner)
        if reason := fused.reason(block._modules) or next(filter(None, reasons), None):
            return reason
        if len({modules["conv2"].out_channels for modules in inner}) > 1:
            return "its layers have different growth rates"
        if len({modules["conv1"].out_channels for modules in inner}) > 1:
            return "its layers have different bottlenecks"
        if len({getattr(layer, "drop_rate", 0.0) for layer in layers}) > 1:
            return "its layers have different drop rates"
        channels, growth = inner[0]["norm1"].num_features, inner[0]["conv2"].out_channels
        for i, (name, modules) in enumerate(zip(block._modules, inner, strict=True)):
            if (reads := modules["conv1"].in_channels) != channels + i * growth:
                return f"{name} reads {reads} channels, expected {channels + i * growth}"
        return None

    def _transition_reason(self, transition: nn.Module) -> str | None:
        fused, modules = self.fused_transition, transition._modules
        if type(transition) is not self.transition:
            return f"{type(transition).__name__} is a subclass with a forward of its own"
        return fused.reason(modules) or _order_reason(fused, modules)

    def _stem_reason(self, features: nn.Sequential) -> str | None:
        if type(features) is not nn.Sequential:
            return f"{type(features).__name__} is not a Sequential"
        stem = dict(list(features._modules.items())[self.fused_features.stem(features)])
        return self.fused_features.reason(stem) if stem else "norm, ReLU and max pool are not in a row"


def _order_reason(fused: type[Fused], modules: Mapping[str, Any]) -> str | None:
    """Not None unless modules have all the parts' names, in their order."""
    expected = [name for name in fused.parts if name not in ("act", "drop")]  # a norm's own
    if list(modules) == expected:
        return None
    return f"its children are {', '.join(modules)}, expected {', '.join(expected)}"


def adapters() -> list[Adapter]:
    """The adapters of the libraries this process has imported."""
    return [
        importlib.import_module(f"{__package__}.{name}").ADAPTER
        for library, name in _LIBRARIES.items()
        if library in sys.modules
    ]
