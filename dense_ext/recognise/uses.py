"""How a network uses the result of one of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from .tracing import RefusedError, graph_of, transparent_checkpoints

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
        if node.op == "call_module" and str(node.target) in parts and needs_copy(node, model, modules)
    }


def needs_copy(node: fx.Node, model: nn.Module, parts: set[nn.Module], returned: bool = True) -> bool:
    """Whether the users of a node's result make a view of it, write into it or, if it matters, return it.

    ``parts`` are modules that do neither.
    """
    fresh = {node}  # values that may share the part's memory or layout
    for user in _downstream(node):
        if not fresh & set(user.all_input_nodes):
            continue
        if user.op == "output":
            return returned
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
