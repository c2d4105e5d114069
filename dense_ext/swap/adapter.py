"""The adapter to another library's DenseNet. Each library has its own file in this package."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..eligibility import Fused, patched_method
from ..modules import FusedDenseBlock, FusedFeatures, FusedTransition

# Library -> the adapter's module, which is loaded only if the process has imported the library.
_LIBRARIES = {
    "torchvision.models.densenet": "torchvision",
    "timm.models.densenet": "timm",
    "monai.networks.nets.densenet": "monai",
    "torchxrayvision.models": "torchxrayvision",
}
# Attributes that a swap adds and a restore removes.
ADDED = ("recompute", "backend", "part_name", "plan", "kinds", "returns_copy", "functions")


@dataclass(frozen=True)
class Candidate:
    """A part of a model whose class an adapter knows."""

    name: str  # the dotted name in the model
    kind: str  # "dense block", "transition" or "stem"; "features" for a Sequential of blocks without a stem
    module: Any
    reason: str | None  # why it cannot be swapped, None if it can
    swapped: bool


class SwappedFeatures(FusedFeatures):
    """A Sequential that was swapped; dense_ext's own networks use FusedFeatures itself."""


@dataclass(frozen=True)
class Adapter:
    """A library's classes, and the fused classes that replace them.

    Each fused class inherits from its original. Parts are found by class. A Sequential that has a dense block
    as a child is a network's features; it runs the stem itself.
    """

    block: type[nn.Module]
    transition: type[nn.Module]
    fused_block: type[FusedDenseBlock]
    fused_transition: type[FusedTransition]
    fused_features: type[SwappedFeatures] = SwappedFeatures

    @property
    def _classes(self) -> dict[Any, Any]:
        """Each original class with the fused class that replaces it."""
        return {
            self.block: self.fused_block,
            self.transition: self.fused_transition,
            nn.Sequential: self.fused_features,
        }

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        """The model's dense parts, in the order of ``named_modules``."""
        one_by_one = dict(called_one_by_one(model))
        for name, module in model.named_modules():
            found = self._kind(module)
            if found is None:
                continue
            kind, original, fused = found
            swapped = isinstance(module, fused) and (kind != "stem" or module.part_name is not None)
            reason = one_by_one.get(module)
            if reason is None and not swapped:
                reason = _why_not_swapped(module, original, fused)
            yield Candidate(name, kind, module, reason, swapped and reason is None)

    def swap(self, candidate: Candidate, recompute: str, backend: str, returns_copy: bool) -> None:
        """Swap a candidate: change its class, but keep the object.

        A candidate with a reason against swapping stays unchanged. But the Sequential around blocks and
        transitions is swapped even if its stem can't be fused, since it passes activations between them.
        """
        module, kind = candidate.module, candidate.kind
        around = kind in ("stem", "features")
        _, original, fused = self._kind(module)  # type: ignore[misc]
        if candidate.reason is not None and not (around and swapped_class(type(module), original, fused)):
            return
        module.backend = backend
        module.part_name = candidate.name if candidate.reason is None else None
        if not around:
            module.returns_copy = returns_copy
        if kind == "dense block":
            module.recompute = recompute
        if isinstance(module, fused):
            return
        forward = rebound_forward(module, original.forward, fused.forward)
        module.__class__ = swapped_class(type(module), original, fused)
        if forward is not None:
            module.__dict__["forward"] = forward

    def restore(self, model: nn.Module) -> None:
        """Undo every swap in the model."""
        for module in model.modules():
            for original, fused in self._classes.items():
                kind = swapped_class(type(module), fused, original)
                if kind is None:
                    continue
                forward = rebound_forward(module, fused.forward, original.forward)
                module.__class__ = kind
                if forward is not None:
                    module.__dict__["forward"] = forward
                for attribute in ADDED:
                    module.__dict__.pop(attribute, None)

    def _kind(self, module: nn.Module) -> tuple[str, Any, Any] | None:
        """A module's kind, its original class and the fused class; None if it is not a dense part."""
        if isinstance(module, self.block):
            return "dense block", self.block, self.fused_block
        if isinstance(module, self.transition):
            return "transition", self.transition, self.fused_transition
        children = list(module._modules.values()) if isinstance(module, nn.Sequential) else []
        if not any(isinstance(child, self.block) for child in children):
            return None
        kind = "stem" if self.fused_features.has_stem(module) else "features"
        return kind, nn.Sequential, self.fused_features


def _why_not_swapped(module: nn.Module, original: type[nn.Module], fused: Any) -> str | None:
    """Why a part cannot be swapped, or None."""
    kind = type(module)
    if not isinstance(module, fused) and swapped_class(kind, original, fused) is None:
        own = (
            "with its own forward" if kind.forward is not original.forward else "that dense_ext does not know"
        )
        return f"{kind.__name__} is a subclass {own}"
    if "forward" in module.__dict__ and rebound_forward(module, original.forward, fused.forward) is None:
        return "the instance has its own forward"
    if name := patched_method(original):
        return f"its class's {name} has been replaced"
    if issubclass(fused, FusedFeatures) and not fused.has_stem(module):
        return None
    return fused.why_not_at_rest(module)


@functools.cache
def _swapped_class(kind: Any, before: Any, after: Any) -> Any:
    """``kind`` with its base ``before`` replaced by ``after``; None if that is not possible.

    ``fully_shard`` changes a module's class to a new one that inherits from ``FSDPModule`` and the original.
    The result then inherits from ``FSDPModule`` and ``after``.
    """
    if kind is before:
        return after
    if len(kind.__bases__) == 2 and kind.__bases__[1] is before and _shards(kind.__bases__[0]):
        own = {k: v for k, v in kind.__dict__.items() if k not in ("__dict__", "__weakref__")}
        return type(kind.__name__, (kind.__bases__[0], after), own)
    return None


# Annotated again because mypy does not treat classes as hashable.
swapped_class: Callable[[Any, Any, Any], Any] = _swapped_class


def _shards(kind: type) -> bool:
    return kind.__module__.startswith("torch.distributed.") and kind.__name__ == "FSDPModule"


def rebound_forward(module: nn.Module, before: Any, after: Any) -> Any:
    """An instance's own ``forward``, rebuilt to call the method ``after`` where it called ``before``.

    For example, ``block.forward = functools.partial(checkpoint, block.forward)`` holds the original's method.
    None if the instance has no forward of its own, or one that is not built from partials of that method.
    """

    def rebound(function: Any) -> Any:
        if (
            isinstance(function, types.MethodType)
            and function.__self__ is module
            and function.__func__ is before
        ):
            return types.MethodType(after, module)
        if isinstance(function, functools.partial):
            found = [rebound(part) for part in (function.func, *function.args)]
            if any(part is not None for part in found):
                parts = (function.func, *function.args)
                new: list[Any] = [
                    part if other is None else other for part, other in zip(parts, found, strict=True)
                ]
                return functools.partial(new[0], *new[1:], **function.keywords)
        return None

    return rebound(module.__dict__.get("forward"))


def called_one_by_one(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Stems and transitions whose children the network's own forward calls by name, each with a reason.

    Encoders of U-Nets return the activations before each pool, so their forward calls these children by name.
    """
    for network in model.modules():
        # A module of TorchScript has no Sequential, and its class's forward cannot even be read.
        features = dict(network._modules.items()).get("features")
        if not isinstance(features, nn.Sequential):
            continue
        kind: Any = network.original if isinstance(network, Fused) else type(network)
        names = set(getattr(getattr(kind.forward, "__code__", None), "co_names", ()))
        if not names & features._modules.keys():
            continue
        reason = f"{kind.__name__}.forward calls its modules one by one"
        if "pool0" in names:
            yield features, reason
        for name, child in features._modules.items():
            if name in names and {"norm", "conv"} <= names & child._modules.keys():
                yield child, reason


def outputs_kept_anyway(model: nn.Module, served: set[nn.Module]) -> set[nn.Module]:
    """Parts whose output X its reader keeps for its own backward, so that recomputing X saves nothing.

    The norm of a transition that is called child by child is such a reader, unless it is ``served``.
    """
    in_pieces = {m for m, _ in called_one_by_one(model) if served.isdisjoint(m.children())}
    return {
        child
        for features in model.modules()
        if not in_pieces.isdisjoint((features, *features.children()))
        for child in features.children()
    }


def adapters() -> list[Adapter]:
    """The adapters of the libraries that this process has imported."""
    found = []
    for library, name in _LIBRARIES.items():
        if library in sys.modules:
            try:
                found.append(importlib.import_module(f"{__package__}.{name}").ADAPTER)
            except ImportError as error:
                warnings.warn(f"dense_ext does not know this version of {library}: {error}", stacklevel=3)
    return found
