"""How a network uses the result of one of its parts."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn

from .kept import Kept, RefusedError, kept_generators, recorded_code
from .proxies import IN_PLACE
from .tracing import graph_of, is_plain, transparent_checkpoints

# Functions that need the memory layout of eager's result.
_LAYOUT = {
    "as_strided", "as_strided_", "data_ptr", "dim_order", "is_contiguous", "numpy", "resize_", "set_",
    "storage", "storage_offset", "stride", "unfold", "untyped_storage", "view", "view_as",
}  # fmt: skip
# Functions that draw a random number for each element, in the order of their argument's memory.
_RANDOM = {
    "alpha_dropout", "alpha_dropout_", "bernoulli_", "cauchy_", "dropout", "dropout_", "exponential_",
    "geometric_", "log_normal_", "native_dropout", "normal_", "rand_like", "randint_like", "randn_like",
    "random_", "uniform_",
}  # fmt: skip
_RANDOM_BY_MODULES = (nn.AlphaDropout, nn.Dropout)
# Functions and attributes that describe a tensor whatever its layout.
_DESCRIBES = {
    "device", "dim", "dtype", "is_floating_point", "len", "ndim", "ndimension", "numel", "requires_grad",
    "shape", "size",
}  # fmt: skip
# Functions whose result is in new memory, and contiguous whatever the layout of what they take.
_NEW_AND_CONTIGUOUS = {"linear", "mean", "new_empty", "new_full", "new_ones", "new_zeros"}
# Functions whose result is in new memory. It has the layout of what they take, and is all of its memory.
_NEW = {
    "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "add", "amax", "amin", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "batch_norm", "cat", "clone", "concat", "concatenate", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "div", "elu", "exp", "gelu", "group_norm",
    "interpolate", "layer_norm", "leaky_relu", "log_softmax", "max_pool1d", "max_pool2d", "max_pool3d",
    "mul", "neg", "pow", "relu", "sigmoid", "silu", "softmax", "sqrt", "sub", "sum", "tanh",
    "truediv",
}  # fmt: skip
_NEW_BY_MODULES = {
    "torch.nn.modules.activation", "torch.nn.modules.batchnorm", "torch.nn.modules.conv",
    "torch.nn.modules.instancenorm", "torch.nn.modules.linear", "torch.nn.modules.normalization",
    "torch.nn.modules.pooling", "torch.nn.modules.upsampling",
}  # fmt: skip
# Functions and attributes that make a view whatever the layout of what they take.
_VIEWS = {
    "chunk", "data", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "expand", "expand_as",
    "getitem", "mT", "movedim", "narrow", "permute", "select", "split", "squeeze", "swapaxes", "T",
    "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze",
}  # fmt: skip
_VIEWING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Unflatten)
# Python's modules whose functions do to tensors what their names say.
_KNOWN = {"_operator", "builtins", "math", "torch"}


def wants_copies(model: nn.Module, parts: dict[str, nn.Module]) -> set[str]:
    """The names of the parts whose result has to be a contiguous copy.

    A part's result is in channels_last memory, and its backward reads it. So a network that makes a view of
    it, writes into it or returns it must get a copy. A network that cannot be traced might do any of these,
    and so might the code that calls a part which the network's own forward does not call.
    """
    if "" in parts:
        return {""}
    names = {module: name for name, module in parts.items()}
    called, found = set(), set()
    try:
        with transparent_checkpoints():
            graphs = list(_graphs(model, names.keys()))
        for graph in graphs:
            relying = relying_calls(graph, model, names.keys())
            for node, module in _calls(graph, model, names.keys()):
                called.add(names[module])
                if use_of(node, model, names.keys(), relying):
                    found.add(names[module])
    except RefusedError:
        return set(parts)
    return found | (parts.keys() - called)


def relying_calls(graph: fx.Graph, model: nn.Module, parts: Collection[nn.Module]) -> set[fx.Node]:
    """The calls of parts whose result is relied on.

    Such a part has to know the memory layout that its input has in eager. So the parts before it have to
    keep to that layout, too.
    """
    found: set[fx.Node] = set()
    for node, _ in reversed(list(_calls(graph, model, parts))):
        if use_of(node, model, parts, found) is Use.RELIED_ON:
            found.add(node)
    return found


def _calls(
    graph: fx.Graph, model: nn.Module, parts: Collection[nn.Module]
) -> Iterator[tuple[fx.Node, nn.Module]]:
    for node in graph.nodes:
        if node.op == "call_module" and (module := model.get_submodule(str(node.target))) in parts:
            yield node, module


def _graphs(model: nn.Module, leaves: Collection[nn.Module]) -> Iterator[fx.Graph]:
    """The graphs of a model in training and in eval mode, each with and without gradients, or none needed.

    Raises:
        RefusedError: it cannot be traced, or keeps tensors as attributes, which others may read.
    """
    modules = list(model.modules())
    kept = Kept(modules)
    for training in (True, False):
        for grad, needs_grad in ((True, True), (True, False), (False, False)):
            with kept, kept_generators(), torch.inference_mode(False):
                for m in modules:
                    m.training = training
                with torch.set_grad_enabled(grad), recorded_code(kept):
                    graph = graph_of(model, lambda m: m in leaves, needs_grad)
            if not all(map(is_plain, kept.written)):
                raise RefusedError("its forward keeps tensors where others may read them")
            yield graph


class Use(enum.IntEnum):
    """How a network uses a result, the most demanding use last."""

    READ = 0
    LAYOUT_RETURNED = 1  # the network returns an image in the result's layout, but not in its memory
    RETURNED = 2
    RELIED_ON = 3  # it writes into the result, returns a view, or needs the layout of eager's


def use_of(
    node: fx.Node, model: nn.Module, parts: Collection[nn.Module], relying: Collection[fx.Node] = ()
) -> Use:
    """How the users of a node's result use it.

    They rely on it if they make a view of it or write into it. They also do if they write into what is a view
    in one memory layout and a copy in another, such as the result of ``contiguous()``, or if they fill memory
    of its layout with random numbers. Values share memory unless it is known that they do not.

    Args:
        node: a call in the graph of ``model``.
        model: the model.
        parts: modules that only read what they take.
        relying: calls of parts that need the layout that their input has in eager.
    """
    # The values whose layout follows from the result's, each with a number for the memory that it is in.
    memory = {node: 0}
    unsure: set[int] = set()  # memory of values that are views or copies, which depends on the layout
    whole = {node}  # values that are all of their memory, and no view of it
    for user in _downstream(node):
        read = {memory[value] for value in user.all_input_nodes if value in memory}
        if not read:
            continue
        if user.op == "output":
            if not whole.issuperset(value for value in user.all_input_nodes if value in memory):
                return Use.RELIED_ON  # the strides of a view tell nobody which layout eager's would have
            return Use.RETURNED if 0 in read else Use.LAYOUT_RETURNED
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        if module in parts:
            if user in relying:
                return Use.RELIED_ON
            continue
        name = _name(user)
        if name in _LAYOUT or _draws(user, name, module) or not _is_known(user, module):
            return Use.RELIED_ON
        if name in _DESCRIBES or name in _NEW_AND_CONTIGUOUS or _is_new_and_contiguous(user, name, module):
            continue
        if written := _written(user, module):
            into = {memory[value] for value in written if value in memory}
            if 0 in into or into & unsure:
                return Use.RELIED_ON
            read = into  # the result is what was written into
            if whole.issuperset(written):
                whole.add(user)
        elif _is_new(name, module):
            memory[user] = len(memory)
            whole.add(user)
            continue
        elif unsure & read or not (name in _VIEWS or isinstance(module, _VIEWING)):
            unsure |= read
        if read:
            first = min(read)
            memory = {value: first if of in read else of for value, of in memory.items()}
            memory[user] = first
            if unsure & read:
                unsure.add(first)
    return Use.READ


def _name(node: fx.Node) -> str:
    """The name of the function that a node calls or of the attribute that it reads; "" for a module."""
    if node.op == "call_module":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))


def _is_known(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node does what its name says; other code may write, or need eager's layout."""
    if module is not None:
        inner = module._modules or module._forward_hooks or module._forward_pre_hooks
        return type(module).__module__.startswith("torch.nn.modules.") and not inner
    if node.op != "call_function":
        return True
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    return (getattr(node.target, "__module__", None) or "torch").partition(".")[0] in _KNOWN


def _draws(node: fx.Node, name: str, module: nn.Module | None) -> bool:
    """Whether a node may draw random numbers in an order that depends on the layout of what it takes.

    Dropout does, unless its rate is zero; it does not if it drops whole channels. The graphs of training and
    eval mode have to agree, so its mode does not count.
    """
    if module is not None:
        return isinstance(module, _RANDOM_BY_MODULES) and module.p != 0
    rate = _argument(node, 1, "p") if name.endswith("dropout") else None
    return name in _RANDOM and rate != 0


def _argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of the function that a node calls, or None."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _is_new_and_contiguous(node: fx.Node, name: str, module: nn.Module | None) -> bool:
    size = getattr(module, "output_size", None)
    if name.startswith("adaptive_"):
        size = _argument(node, 1, "output_size")
    pools_all = set(size if isinstance(size, (list, tuple)) else (size,)) == {1}
    return pools_all or isinstance(module, nn.Linear)


def _is_new(name: str, module: nn.Module | None) -> bool:
    if module is None:
        return name in _NEW
    return type(module).__module__ in _NEW_BY_MODULES and not isinstance(module, nn.Identity)


def _written(node: fx.Node, module: nn.Module | None) -> list[fx.Node]:
    """The values that a node writes into."""
    written: list[Any] = []
    if module is not None:
        return node.all_input_nodes if getattr(module, "inplace", False) else []
    name = _name(node)
    if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or _asks_to_write(node):
        written.append(node.args[0] if node.args else tuple(node.kwargs.values()))
    if node.kwargs.get("out") is not None:
        written.append(node.kwargs["out"])
    found: list[fx.Node] = []
    fx.node.map_arg(written, found.append)
    return found


def _asks_to_write(node: fx.Node) -> bool:
    """Whether a function's argument ``inplace`` is true, given by name or by position."""
    if node.op != "call_function":
        return bool(node.kwargs.get("inplace"))
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function of C, none of which has this argument
        return bool(node.kwargs.get("inplace"))
    return bool(given.arguments.get("inplace"))


def _downstream(node: fx.Node) -> Iterator[fx.Node]:
    following = node.next
    while following.op != "root":
        yield following
        following = following.next
