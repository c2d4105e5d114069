"""Rewrites a forward that calls dense parts one after the other, so that each chain of them runs as one.

A network's own forward often calls the norm, ReLU and pool of its stem by name. An encoder calls a
transition's modules by name, since it returns the activation before the pool. And a transition that knows
the block before it needs neither the block's output nor its statistics again. The forward is traced in every
mode, and only the calls in its chains change.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..activations import name_of
from ..backends.general import Form, transition_form
from ..eligibility import Fused
from ..modules import contiguous_in_eager
from ..supported import NORM_TYPES, dims_of, transition_reason
from .description import AVERAGES, CONVS, MAXIMA, NORMS, options_of_call, options_of_pool, settings
from .kept import RefusedError
from .tracing import Guards, is_torchs, traces
from .uses import Use, relying_calls, use_of


@dataclass(frozen=True)
class Part:
    """A block, a transition or a stage that is called as a whole, by its dotted name."""

    name: str


@dataclass(frozen=True)
class Pieces:
    """A stem or a transition whose modules are called one by one.

    Attributes:
        norm, conv: their dotted names; a stem has no convolution.
        pool: "average" or "max".
        activation: what follows the norm, as :func:`dense_ext.activations.activation` takes it.
        modules: the dotted names of all modules that are called, in the order they run.
        dims: the spatial dimensions, 2 or 3.
        shows_activation: whether the activation is used elsewhere too.
    """

    norm: str
    conv: str
    pool: str
    activation: str
    modules: tuple[str, ...]
    dims: int
    shows_activation: bool

    @property
    def kind(self) -> str:
        """The kind of part."""
        return "transition" if self.conv else "stem"

    @property
    def form(self) -> Form:
        """What the primitives compute."""
        return transition_form((2,) * self.dims, self.activation, bool(self.conv) and self.pool == "max")


@dataclass(frozen=True)
class Chain:
    """Parts that run one after the other, each on the result of the one before.

    Attributes:
        links: the parts in the order they run.
        as_eager: whether the last result needs memory of its own, in the layout that it has in eager; and so
            on for each activation that is shown.
    """

    links: tuple[Part | Pieces, ...]
    as_eager: tuple[bool, ...]

    @property
    def pieces(self) -> list[Pieces]:
        """The links that are called one by one."""
        return [link for link in self.links if isinstance(link, Pieces)]


@dataclass(frozen=True)
class Code:
    """Source text of a function ``forward``, and the objects of other modules that it uses.

    Attributes:
        source: the text.
        names: tuples of a name in the text, a module, and a name in that module or "" for the module itself.
    """

    source: str
    names: tuple[tuple[str, str, str], ...]

    def function(self) -> Callable[..., Any]:
        """The function, compiled."""
        found: dict[str, Any] = {}
        for name, module, attribute in self.names:
            holder = importlib.import_module(module)
            found[name] = getattr(holder, attribute) if attribute else holder
        exec(compile(self.source, "<rewritten forward>", "exec"), found)
        return found["forward"]


@dataclass(frozen=True)
class Rewriting:
    """How a forward is rewritten.

    Attributes:
        chains: the chains that it runs.
        code: the new forward in eval and in training mode: a function of the module, the input, and the
            module again.
        called: the names of the dense parts that it calls as a whole.
        entered: the names of the modules whose own forward was traced, so that they are no longer called.
        children: the names of the modules that a forward may iterate over, each with its children: the name
            of each there, its first dotted name, and its class unless it is called as a whole.
        guards: the values that the forward reads.
    """

    chains: tuple[Chain, ...]
    code: tuple[Code, Code]
    called: tuple[str, ...]
    entered: tuple[str, ...]
    children: tuple[tuple[str, tuple[tuple[str, str, type | None], ...]], ...]
    guards: Guards

    @property
    def pieces(self) -> list[Pieces]:
        """The stems and transitions whose modules are called one by one."""
        return [pieces for chain in self.chains for pieces in chain.pieces]


def rewrite(model: nn.Module, parts: set[nn.Module], run: Callable[..., Any]) -> Rewriting:
    """Rewrite a module's forward.

    Args:
        model: the module; it is not changed.
        parts: the dense parts inside it that are called as a whole.
        run: the function that the new forward calls as ``run(model, index of the chain, x)``; it returns a
            tuple of the last result and the activations.

    Raises:
        RefusedError: the forward cannot be traced, takes several inputs, or has nothing to rewrite.
    """
    found: dict[bool, tuple[Any, ...]] = {}
    guards = Guards()
    for training, graph, read in traces(model, leaves_around(parts)):
        if any(node.meta["saved_otherwise"] for node in graph.nodes):
            raise RefusedError("it calls checkpoint, or saves tensors for backward by hooks")
        chains = list(_chains(model, graph, parts))
        names = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
        called = tuple(name for name in names if model.get_submodule(name) in parts)
        code, links = _code(graph, chains, run), tuple(chain for chain, _ in chains)
        rewritten = links, code, called, _entered(model, graph)
        if found.setdefault(training, rewritten) != rewritten:
            raise RefusedError("its forward computes different things in different modes")
        guards |= read
    (links, code, *called_and_entered), (in_eval, code_in_eval, *others) = found[True], found[False]
    if (links, called_and_entered) != (in_eval, others):
        raise RefusedError("its forward calls other modules in eval mode")
    if not links:
        raise RefusedError("it has no stem or transition that is called module by module")
    inner = [name for chain in links for pieces in chain.pieces for name in pieces.modules]
    own = [name for chain in links for pieces in chain.pieces for name in (pieces.norm, pieces.conv) if name]
    if len(set(own)) < len(own):
        raise RefusedError("a norm or convolution is used more than once")
    called, entered = called_and_entered
    code_of_modes, children = (code_in_eval, code), children_of(model, called)
    return Rewriting(links, code_of_modes, called, entered, children, guards | settings(model, inner))


def leaves_around(parts: Container[nn.Module]) -> Callable[[nn.Module], bool]:
    """Which modules are not traced where a forward is rewritten: parts, and modules without part or stem."""

    @functools.cache
    def is_leaf(module: nn.Module) -> bool:
        if module in parts or _is_container(module):
            return module in parts
        # A module of its own may hold the stem.
        return not any(inner in parts or isinstance(inner, MAXIMA) for inner in module.modules())

    return is_leaf


def _is_container(module: nn.Module) -> bool:
    """Whether a module is a container of torch.nn, whose contents are traced."""
    return type(module).__module__.startswith("torch.nn.") and not is_torchs(module)


def _entered(model: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    stacks = [node.meta.get("nn_module_stack", {}).values() for node in graph.nodes]
    return tuple(dict.fromkeys(name for stack in stacks for name, _ in stack if name and name not in called))


def children_of(
    model: nn.Module, called: Sequence[str]
) -> tuple[tuple[str, tuple[tuple[str, str, type | None], ...]], ...]:
    """The names of a module and of those inside it, but not inside called parts, with their children's.

    A forward may ask for a child's class, too.
    """
    inside = {inner for name in called for inner in model.get_submodule(name).modules()}
    first: dict[Any, str] = {module: name for name, module in model.named_modules()}
    first[None] = ""  # a child that was set to None
    whole = {model.get_submodule(name) for name in called}

    def kind_of(child: Any) -> type | None:
        return None if child in whole else _class_of(child)

    return tuple(
        (name, tuple((n, first[child], kind_of(child)) for n, child in module._modules.items()))
        for module, name in first.items()
        if module is not None and module not in inside and not is_torchs(module)
    )


def _class_of(module: Any) -> type:
    """A module's class without those that swaps, parametrisations and FSDP derive from it.

    Batch norms are all of one class, since they may be converted to SyncBatchNorm.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.modules.batchnorm._BatchNorm
    derived = ("torch.nn.utils.", "torch.distributed.")
    return next(
        kind
        for kind in type(module).__mro__
        if not (issubclass(kind, Fused) or kind.__module__.startswith(derived))
    )


# --- chains of a graph ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Link:
    """A link with its nodes: the input, the first and the last node that it replaces, and its activation."""

    link: Part | Pieces
    source: fx.Node
    nodes: tuple[fx.Node, ...]
    activation: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


def _chains(model: nn.Module, graph: fx.Graph, parts: set[nn.Module]) -> Iterator[tuple[Chain, list[_Link]]]:
    """The chains of a graph that save something: those with pieces, or with a part after another."""
    if len([node for node in graph.nodes if node.op == "placeholder"]) != 1:
        raise RefusedError("it takes more than one input")
    order = {node: i for i, node in enumerate(graph.nodes)}
    links = [link for node in graph.nodes if (link := _link(model, node, parts, order)) is not None]
    relying = relying_calls(graph, model, parts)
    while links:
        chain = [links.pop(0)]
        while links and _follows(chain[-1], links[0]):
            chain.append(links.pop(0))
        if len(chain) > 1 or isinstance(chain[0].link, Pieces):
            results = [chain[-1].last, *(link.activation for link in chain if link.activation is not None)]
            uses = [use_of(node, model, parts, relying) for node in results]
            # The new forward itself returns images in eager's layout, but not signals.
            harmless = Use.READ if _takes_signals(model, chain[-1].link) else Use.LAYOUT_RETURNED
            as_eager = tuple(use > harmless for use in uses)
            yield Chain(tuple(link.link for link in chain), as_eager), chain


def _takes_signals(model: nn.Module, link: Part | Pieces) -> bool:
    if isinstance(link, Pieces):
        return False
    return any(isinstance(module, nn.Conv1d) for module in model.get_submodule(link.name).modules())


def _follows(before: _Link, after: _Link) -> bool:
    return after.source is before.last and len(before.last.users) == 1 and before.last.next is after.nodes[0]


def _link(model: nn.Module, node: fx.Node, parts: set[nn.Module], order: dict[fx.Node, int]) -> _Link | None:
    """The link that begins with a node, or None."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    name, source = str(node.target), node.args[0]
    module = model.get_submodule(name)
    if not isinstance(source, fx.Node):
        return None
    if module in parts:
        return _Link(Part(name), source, (node,))
    if not isinstance(module, NORMS) or len(node.users) != 1:
        return None
    (activation,) = node.users
    function = _activation(model, activation)
    if function is None:
        return None
    for reader in activation.users:
        found = _stem(model, reader) or _transition(model, name, reader)
        if found is None or (found[1] == "max" and not found[0] and function != "relu"):
            continue
        conv, pool, dims, nodes = found
        others = [user for user in activation.users if user is not reader]
        if not all(order[user] > order[nodes[-1]] or _only_reads(model, user) for user in others):
            continue
        if not conv and type(module) not in (NORM_TYPES[dims], nn.SyncBatchNorm):
            continue
        called = tuple(str(n.target) for n in (node, activation, *nodes) if n.op == "call_module")
        pieces = Pieces(name, conv, pool, function, called, dims, bool(others))
        return _Link(pieces, source, (node, activation, *nodes), activation if others else None)
    return None


def _activation(model: nn.Module, node: fx.Node) -> str | None:
    """The name of an activation of one argument, or None."""
    if node.op == "call_module":
        return name_of(model.get_submodule(str(node.target)))
    relu = node.target in (F.relu, torch.relu, torch.relu_) or node.target in ("relu", "relu_")
    return "relu" if relu and len(node.args) == 1 and set(node.kwargs) <= {"inplace"} else None


def _stem(model: nn.Module, node: fx.Node) -> tuple[str, str, int, tuple[fx.Node, ...]] | None:
    """The stem's pool: no convolution, "max", the dimensions and the nodes; None if the node is another."""
    pool = _pool(model, node)
    return ("", "max", pool[1], (node,)) if pool and (pool[0], *pool[2:]) == ("max", 3, 2, 1) else None


def _transition(
    model: nn.Module, norm: str, node: fx.Node
) -> tuple[str, str, int, tuple[fx.Node, ...]] | None:
    """A transition's convolution and pool, like :func:`_stem`; None if the node does not begin them."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or len(node.users) != 1:
        return None
    name = str(node.target)
    conv = model.get_submodule(name)
    if dims_of(conv) < 2 or transition_reason((norm, model.get_submodule(norm)), (name, conv)) is not None:
        return None
    (after,) = node.users
    pool = _pool(model, after)
    if pool is None or pool[1:] != (dims_of(conv), 2, 2, 0):
        return None
    return name, pool[0], pool[1], (node, after)


_POOLS: dict[Any, tuple[str, int]] = {
    F.avg_pool2d: ("average", 2), F.avg_pool3d: ("average", 3),
    F.max_pool2d: ("max", 2), F.max_pool3d: ("max", 3),
}  # fmt: skip


def _pool(model: nn.Module, node: fx.Node) -> tuple[str, int, int, int, int] | None:
    """A pool's kind, dimensions, window, stride and padding; None if it has other options or is no pool."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        kinds = {kind: ("average", dims) for dims, kind in enumerate(AVERAGES, 1)}
        kinds |= {kind: ("max", dims) for dims, kind in enumerate(MAXIMA, 1)}
        if type(module) not in kinds or len(node.args) != 1 or node.kwargs:
            return None
        kind, dims = kinds[type(module)]
        options = options_of_pool(module)
    elif node.op == "call_function" and node.target in _POOLS:
        kind, dims = _POOLS[node.target]
        options = options_of_call(kind, node.args[1:], node.kwargs)
    else:
        return None
    options["stride"] = options.get("stride") or options["kernel_size"]
    sizes = [options["kernel_size"], options["stride"], options.get("padding", 0), options.get("dilation", 1)]
    found = [{size} if isinstance(size, int) else set(size) for size in sizes]
    plain = not any(options.get(name) for name in ("ceil_mode", "divisor_override", "return_indices"))
    if not plain or any(len(size) > 1 for size in found):
        return None
    window, stride, padding, dilation = (size.pop() for size in found)
    return (kind, dims, window, stride, padding) if dilation == 1 else None


def _only_reads(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node neither writes into what it reads nor may return it or a view of it."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), (*CONVS, *NORMS, *AVERAGES, *MAXIMA))
    return node.op == "call_function" and node.target is torch.cat


# --- the new forward -----------------------------------------------------------------------------------


def _code(graph: fx.Graph, chains: list[tuple[Chain, list[_Link]]], run: Callable[..., Any]) -> Code:
    """The forward of a graph in which each chain is one call."""
    first = {links[0].nodes[0]: (i, links) for i, (_, links) in enumerate(chains)}
    replaced = {node for _, links in chains for link in links for node in link.nodes}
    new, this = fx.Graph(), None
    copies: dict[fx.Node, fx.Node] = {}
    below: set[fx.Node] = set()  # the results of chains, and what is computed from them
    for node in graph.nodes:
        if node in first:
            index, links = first[node]
            call = new.call_function(run, (this, index, copies[links[0].source]))
            shown = [link.activation for link in links if link.activation is not None]
            for i, result in enumerate([links[-1].last, *shown]):
                copies[result] = new.call_function(_item, (call, i))
                below.add(result)
        elif node.op == "output" and chains:
            like = copies[chains[0][1][0].source]
            for result in [value for value in node.all_input_nodes if value in below]:
                copies[result] = new.call_function(_in_format, (copies[result], like))
        if node not in replaced:
            copies[node] = new.node_copy(node, lambda n: copies[n])
            if below & set(node.all_input_nodes):
                below.add(node)
        if node.op == "placeholder":
            this = new.placeholder("rewritten_module")
    generated = new.python_code("self")
    code = compile(generated.src, "", "exec")
    used = {name for inner in code.co_consts if isinstance(inner, types.CodeType) for name in inner.co_names}
    names = sorted((used | set(code.co_names)) & generated.globals.keys())
    return Code(generated.src, tuple(_importable(name, generated.globals[name]) for name in names))


def _in_format(result: Any, like: Tensor) -> Any:
    """A forward's result; for contiguous images a contiguous one, as eager's, not in channels_last memory."""
    if isinstance(result, Tensor) and result.dim() in (4, 5) and contiguous_in_eager(like):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if result.is_contiguous(memory_format=formats[result.dim()]):
            return result.contiguous()
    return result


def _item(results: tuple[Any, ...], index: int) -> Any:
    return results[index]


def _importable(name: str, value: Any) -> tuple[str, str, str]:
    """How a new process finds an object that the code uses.

    Raises:
        RefusedError: it has no name of its own.
    """
    if isinstance(value, types.ModuleType):
        return name, value.__name__, ""
    module, attribute = getattr(value, "__module__", None) or "builtins", getattr(value, "__qualname__", "")
    try:
        same = getattr(importlib.import_module(module), attribute) is value
    except (ImportError, AttributeError, ValueError):
        same = False
    if not same:
        raise RefusedError(f"its forward uses {name}, which another process cannot import")
    return name, module, attribute
