"""What an adapter to another library's DenseNet is. Each library has a file of its own beside this one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

# Library -> the adapter's module; loaded only if the process has imported the library itself.
_LIBRARIES = {"torchvision.models.densenet": "torchvision"}


@dataclass
class Candidate:
    """A part of a model that an adapter knows by its class."""

    name: str  # dotted, in the model
    kind: str  # "dense block", "transition" or "stem"
    modules: tuple[Any, ...]  # one, or the stem's three
    reason: str | None  # why it cannot be swapped, None if it can
    swapped: bool


class Adapter(Protocol):
    """How to find, swap and restore one library's dense parts."""

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        """The model's dense parts, in order."""

    def swap(self, candidate: Candidate, recompute: str, backend: str) -> None:
        """Swap a candidate that has no reason against it."""

    def restore(self, model: nn.Module) -> None:
        """Undo every swap in the model."""


def adapters() -> list[Adapter]:
    """The adapters of the libraries this process has imported."""
    return [
        importlib.import_module(f"{__package__}.{name}").ADAPTER
        for library, name in _LIBRARIES.items()
        if library in sys.modules
    ]
