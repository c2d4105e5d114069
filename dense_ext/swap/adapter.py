"""What an adapter to another library's DenseNet is. Each library has a file of its own beside this one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

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


class SwappedFeatures(FusedFeatures):
    """A Sequential that was swapped; a network of dense_ext's own has the class itself."""


@dataclass(frozen=True)
class Adapter:
    """A library's classes, and those that take their place: each inherits from both sides.

    Parts are found by class. A stem belongs to a Sequential that also has a dense block.
    """

    block: type[nn.Module]
    transition: type[nn.Module]
    fused_block: type[FusedDenseBlock]
    fused_transition: type[FusedTransition]
    fused_features: type[SwappedFeatures] = SwappedFeatures

    @property
    def _classes(self) -> dict[str, tuple[type[nn.Module], Any]]:
        """Each kind's class, and what a swap makes of it."""
        return {
            "dense block": (self.block, self.fused_block),
            "transition": (self.transition, self.fused_transition),
            "stem": (nn.Sequential, self.fused_features),
        }

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        """The model's dense parts, in order."""
        for name, module in model.named_modules():
            kind = self._kind(module)
            if kind is None:
                continue
            original, fused = self._classes[kind]
            swapped, reason = isinstance(module, fused), None
            if not swapped:
                other = f"{type(module).__name__} is a subclass with a forward of its own"
                reason = fused.why_not(module) if type(module) is original else other
            yield Candidate(name, kind, module, reason, swapped)

    def swap(self, candidate: Candidate, recompute: str, backend: str) -> None:
        """Swap a candidate that has no reason against it: its class changes, the object stays."""
        module = candidate.module
        module.backend = backend
        if candidate.kind == "dense block":
            module.recompute = recompute
        _, module.__class__ = self._classes[candidate.kind]

    def restore(self, model: nn.Module) -> None:
        """Undo every swap in the model."""
        originals = {fused: original for original, fused in self._classes.values()}
        for module in model.modules():
            if original := originals.get(type(module)):
                module.__class__ = original
                for attribute in _ADDED:
                    module.__dict__.pop(attribute, None)

    def _kind(self, module: nn.Module) -> str | None:
        if isinstance(module, self.block):
            return "dense block"
        if isinstance(module, self.transition):
            return "transition"
        children = module._modules if isinstance(module, nn.Sequential) else {}
        is_stem = "pool0" in children and any(isinstance(child, self.block) for child in children.values())
        return "stem" if is_stem else None


def adapters() -> list[Adapter]:
    """The adapters of the libraries this process has imported."""
    found = []
    for library, name in _LIBRARIES.items():
        if library in sys.modules:
            try:
                found.append(importlib.import_module(f"{__package__}.{name}").ADAPTER)
            except ImportError as error:
                warnings.warn(f"dense_ext does not know this version of {library}: {error}", stacklevel=3)
    return found
