"""Swaps modules that no adapter knows but that are recognised by what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..eligibility import Fused
from ..recognise import (
    Plan,
    Recognised,
    Rewriting,
    Rewritten,
    Traced,
    find,
    install,
    install_calls,
    name_of_pieces,
    original_class,
    rewritten_calls,
    traced_base,
)
from .adapter import ADDED, Candidate, swapped_class


class Recognition:
    """The traced parts of a model, with an adapter's interface.

    Args:
        model: the model; it is not changed.
        accepted: the blocks and transitions that adapters swap.
        around: the Sequentials around the blocks of known classes.
        in_pieces: those of ``around``, and transitions, whose children are called one by one.
        finds_blocks: whether to look for blocks and transitions of unknown classes.

    Attributes:
        served: the norms of the stems and transitions that run fused although they are called one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        accepted: set[nn.Module],
        around: set[nn.Module],
        in_pieces: set[nn.Module],
        finds_blocks: bool,
    ) -> None:
        fused = {module for module in model.modules() if isinstance(module, Fused)}
        self.swapped: list[tuple[str, Any]] = [
            (name, module) for name, module in model.named_modules() if isinstance(module, Traced)
        ]
        self.found = find(model, accepted | (in_pieces - around) | fused) if finds_blocks else []
        self.plans: dict[nn.Module, Plan] = {part.module: part.plan for part in self.found if part.plan}
        whole = accepted | (around - in_pieces) | fused | set(self.plans)
        self.rewritten = rewritten_calls(model, whole, in_pieces)
        both: list[tuple[Any, Rewriting]] = [(m, plan) for m, (_, plan) in self.rewritten.items()]
        both += [(module, module.plan) for _, module in self.swapped if isinstance(module, Rewritten)]
        self.served = {module.get_submodule(pieces.norm) for module, plan in both for pieces in plan.pieces}

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        """The model's swapped parts, then those that are recognised or that look dense but are refused."""
        for name, module in self.swapped:
            if isinstance(module, Rewritten):
                yield from _of_pieces(name, module, module.plan, True)
            else:
                yield Candidate(name, module.plan.kind, module, None, True)
        for part in self.found:
            kind = part.plan.kind if part.plan else "dense block"
            yield Candidate(part.name, kind, part.module, part.reason, False)
        for module, (name, rewriting) in self.rewritten.items():
            yield from _of_pieces(name, module, rewriting, False)

    def swap(self, candidate: Candidate, recompute: str, backend: str, returns_copy: bool) -> None:
        """Swap a part: change its class, but keep the object. Refused parts stay unchanged."""
        module = candidate.module
        if candidate.swapped or isinstance(module, Rewritten):
            module.backend = backend
            if isinstance(module, Recognised):
                module.recompute, module.returns_copy = recompute, returns_copy
        elif module in self.rewritten:
            name, rewriting = self.rewritten[module]
            install_calls(module, rewriting, backend, name)
        elif candidate.reason is None:
            install(module, self.plans[module], recompute, backend, candidate.name, returns_copy)


def _of_pieces(name: str, module: Any, rewriting: Rewriting, swapped: bool) -> Iterator[Candidate]:
    """A candidate for each of a forward's stems and transitions; one for the forward if it has none."""
    for pieces in rewriting.pieces:
        inner = name_of_pieces(module, pieces)
        yield Candidate(f"{name}.{inner}" if name else inner, pieces.kind, module, None, swapped)
    if not rewriting.pieces:
        yield Candidate(name, "features", module, None, swapped)


def restore_recognised(model: nn.Module) -> None:
    """Undo every swap of a traced module in the model."""
    for module in model.modules():
        if isinstance(module, Traced):
            fused: Any = traced_base(type(module))
            module.__class__ = swapped_class(type(module), fused, original_class(fused))
            for attribute in ADDED:
                module.__dict__.pop(attribute, None)
