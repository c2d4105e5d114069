"""Swaps modules that no adapter knows but that are recognised by what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..eligibility import Fused
from ..recognise import Plan, Recognised, Traced, find, install, original_class, traced_base, wants_copies
from .adapter import ADDED, Candidate, swapped_class


class Recognition:
    """The recognised parts of a model, with an adapter's interface.

    Args:
        model: the model; it is not changed.
        known: the modules that adapters swap.
    """

    def __init__(self, model: nn.Module, known: set[nn.Module]) -> None:
        fused = {module for module in model.modules() if isinstance(module, Fused)}
        self.swapped: list[tuple[str, Any]] = [
            (name, module) for name, module in model.named_modules() if isinstance(module, Recognised)
        ]
        self.found = find(model, known | fused)
        self.plans: dict[nn.Module, Plan] = {part.module: part.plan for part in self.found if part.plan}
        parts: dict[str, Any] = dict(self.swapped)
        parts |= {part.name: part.module for part in self.found if part.plan}
        self.copies = wants_copies(model, parts) if self.plans else set()

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        """The model's swapped parts, then those that are recognised or that look dense but are refused."""
        for name, module in self.swapped:
            yield Candidate(name, module.plan.kind, module, None, True)
        for part in self.found:
            kind = part.plan.kind if part.plan else "dense block"
            yield Candidate(part.name, kind, part.module, part.reason, False)

    def swap(self, candidate: Candidate, recompute: str, backend: str) -> None:
        """Swap a recognised part: change its class, but keep the object. Refused parts stay unchanged."""
        module = candidate.module
        if candidate.swapped:
            module.recompute, module.backend = recompute, backend
        elif candidate.reason is None:
            copies = candidate.name in self.copies
            install(module, self.plans[module], recompute, backend, candidate.name, copies)


def restore_recognised(model: nn.Module) -> None:
    """Undo every swap of a traced module in the model."""
    for module in model.modules():
        if isinstance(module, Traced):
            fused: Any = traced_base(type(module))
            module.__class__ = swapped_class(type(module), fused, original_class(fused))
            for attribute in ADDED:
                module.__dict__.pop(attribute, None)
