"""Recognises densely connected modules of unknown classes by what their forward computes.

The forward is traced in every mode and interpreted as dense blocks and transitions (:mod:`description`). Its
submodules are checked like those of known classes. Then the fused operators' results are compared with the
original's (:mod:`proof`). A module that fails one of these steps stays unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .description import CONVS, NORMS, Plan, describe, plan_of_layers
from .fused import Recognised, Traced, changes, install, kinds_of, original_class, traced_base, unsupported
from .proof import prove
from .tracing import RefusedError, graph_of, is_torchs, transparent_checkpoints

__all__ = [
    "Found",
    "Plan",
    "Recognised",
    "RefusedError",
    "Traced",
    "find",
    "install",
    "original_class",
    "recognise",
    "register",
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
    _visit(model, "", known, found)
    return found


def _visit(module: nn.Module, name: str, known: set[nn.Module], found: list[Found]) -> bool:
    """Visit a module, and then its children; returns whether any was recognised or is known."""
    if module in known or is_torchs(module) or not _may_be_dense(module):
        return False
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
        prove(module, plan)
    return plan


# --- uses of a part's result --------------------------------------------------------------------------

# Functions that need the memory layout of eager's result.
_LAYOUT = {"view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "numpy", "unfold"}
# Functions whose result has the same layout as eager's, whatever the layout of what they take.
_FORGETS_LAYOUT = {"flatten", "linear", "mean", "reshape"}


def wants_copies(model: nn.Module, parts: dict[str, nn.Module]) -> set[str]:
    """The names of the parts whose result has to be a contiguous copy.

    A part's result is in channels_last memory, and its backward reads it. So a network that makes a view of
    it, writes into it or returns it must get a copy. A network that cannot be traced might do any of these.
    """
    if "" in parts:
        return {""}
    modules = set(parts.values())
    try:
        with transparent_checkpoints():
            graph = graph_of(model, lambda m: m in modules)
    except RefusedError:
        return set(parts)
    names = {module: name for name, module in parts.items()}
    return {
        names[model.get_submodule(str(node.target))]
        for node in graph.nodes
        if node.op == "call_module" and str(node.target) in parts and _needs_copy(node, model, modules)
    }


def _needs_copy(node: fx.Node, model: nn.Module, parts: set[nn.Module]) -> bool:
    fresh = {node}  # values that may share the part's memory or layout
    for user in _downstream(node):
        if not fresh & set(user.all_input_nodes):
            continue
        if user.op == "output":
            return True
        if user.op == "call_module":
            module = model.get_submodule(str(user.target))
            if module in parts:
                continue
            if getattr(module, "inplace", False) and node in user.all_input_nodes:
                return True
            pools_all = set(_as_tuple(getattr(module, "output_size", None))) == {1}
            if pools_all or isinstance(module, (nn.Flatten, nn.Linear)):
                continue
        name = str(getattr(user.target, "__name__", user.target))
        if name in _LAYOUT:
            return True
        if name in _FORGETS_LAYOUT:
            continue
        writes = (
            (name.endswith("_") and not name.endswith("__"))
            or name == "setitem"
            or user.kwargs.get("inplace")
        )
        if writes and node in user.all_input_nodes:
            return True
        fresh.add(user)
    return False


def _as_tuple(size: Any) -> tuple[Any, ...]:
    return size if isinstance(size, tuple) else (size,)


def _downstream(node: fx.Node) -> Iterator[fx.Node]:
    following = node.next
    while following.op != "root":
        yield following
        following = following.next
