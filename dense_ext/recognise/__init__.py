"""Recognises densely connected modules of unknown classes by what their forward computes.

The forward is traced in every mode and interpreted as dense blocks and transitions (:mod:`description`). Its
submodules are checked like those of known classes. Then the fused operators' results are compared with the
original's (:mod:`proof`). A module that fails one of these steps stays unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .chains import Rewriting
from .description import CONVS, NORMS, Plan, describe, plan_of_layers
from .fused import Recognised, Traced, changes, install, kinds_of, original_class, traced_base, unsupported
from .kept import RefusedError
from .proof import prove
from .rewritten import Rewritten, install_calls, name_of_pieces, rewritten_calls
from .tracing import is_torchs, transparent_checkpoints
from .uses import wants_copies

__all__ = [
    "Found",
    "Plan",
    "Recognised",
    "RefusedError",
    "Rewriting",
    "Rewritten",
    "Traced",
    "find",
    "install",
    "install_calls",
    "name_of_pieces",
    "original_class",
    "recognise",
    "register",
    "rewritten_calls",
    "traced_base",
    "wants_copies",
]


@dataclass(frozen=True)
class Found:
    """A module that is a sequence of dense blocks and transitions, or looks like one but is refused."""

    name: str  # the dotted name in the model
    module: nn.Module
    plan: Plan | None
    reason: str | None  # why it is refused; None if it has a plan


def find(model: nn.Module, known: set[nn.Module]) -> list[Found]:
    """The outermost modules of a model that are recognised, and refused modules that concatenate.

    Args:
        model: the model; it is not changed.
        known: modules to skip, with everything inside them.
    """
    found: list[Found] = []
    with transparent_checkpoints():  # once for all modules
        _visit(model, "", known, found)
    return found


def _visit(module: nn.Module, name: str, known: set[nn.Module], found: list[Found]) -> bool:
    """Visit a module, and then its children; returns whether any was recognised or is known."""
    if module in known or is_torchs(module) or not _may_be_dense(module):
        return False
    for part in found:
        if part.module is module:  # it has several names
            return part.plan is not None
    reason, holds_known = None, not known.isdisjoint(module.modules())
    has_forward = type(module).forward is not nn.Module.forward
    if has_forward and not holds_known:
        try:
            plan = recognise(module)
        except RefusedError as refused:
            reason = str(refused)
        else:
            found.append(Found(name, module, plan, None))
            return True
    before = len(found)
    recognised = [
        _visit(child, f"{name}.{child_name}" if name else child_name, known, found)
        for child_name, child in module.named_children()
    ]
    if holds_known or any(recognised):
        return True
    if reason is not None and _concatenates(module):
        del found[before:]  # only the outermost module gives a reason
        found.append(Found(name, module, None, reason))
    return False


def _may_be_dense(module: nn.Module) -> bool:
    kinds = {type(inner) for inner in module.modules()}
    return any(issubclass(kind, NORMS) for kind in kinds) and any(issubclass(kind, CONVS) for kind in kinds)


def _concatenates(module: nn.Module) -> bool:
    """Whether a module's own forward, or the forward of every child of a Sequential, calls ``torch.cat``.

    A forward of several inputs joins those; that is no dense block.
    """
    code = getattr(type(module).forward, "__code__", None)
    if code is not None and code.co_argcount <= 2 and {"cat", "concat", "concatenate"} & set(code.co_names):
        return True
    children = list(module.children())
    return isinstance(module, nn.Sequential) and len(children) > 1 and all(map(_concatenates, children))


_registered: dict[type[nn.Module], Callable[[Any], Sequence[Sequence[nn.Module]]]] = {}


def register(kind: type[nn.Module], layers: Callable[[Any], Sequence[Sequence[nn.Module]]]) -> None:
    """Tell :func:`dense_ext.swap` which layers a class of dense blocks has, where tracing cannot find out.

    A forward that branches on its input or draws random numbers cannot be traced. Each instance is still
    compared with the fused operator in float64 before it is swapped, and refused if they differ. The forward
    must compute nothing else in any other situation; only its class's methods are watched after the swap.

    Args:
        kind: a class of modules; subclasses are not included.
        layers: returns, for an instance, the modules of each layer in the order they run: a norm, an
            activation, a convolution and dropout, or two of each. Without an activation it is ReLU; dropout
            may be left out. Each layer reads the concatenation of the block's input and all layers' results
            before it, and the block returns the concatenation of all.

    Raises:
        TypeError: kind is not a class of modules.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a class of torch.nn.Module, got {kind!r}")
    _registered[kind] = layers


def recognise(module: nn.Module) -> Plan:
    """The plan of a module, verified by comparing results.

    Raises:
        RefusedError: the module is not recognised; the message gives the reason.
    """
    with transparent_checkpoints():
        layers = _registered.get(type(module))
        plan = describe(module) if layers is None else plan_of_layers(module, layers(module))
        if len(plan.blocks) == len(plan.steps) == 1 and len(plan.blocks[0].layers) < 2:
            raise RefusedError("it is a single layer")
        if (reason := changes(module, kinds_of(module), plan) or unsupported(module, plan)) is not None:
            raise RefusedError(reason)
        prove(module, plan, traced=layers is None)
    return plan
