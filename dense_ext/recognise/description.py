"""Interprets a traced forward as dense blocks and transitions, whatever its modules are called.

The graph is interpreted in terms of groups of channels. A *group* is the output of a convolution or pool, or
the input. A *value* is a tuple of groups, which ``torch.cat`` joins, possibly with a norm and a ReLU applied.
A forward that can't be described in these terms is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..activations import name_of, named
from ..batch_norm import num_features
from ..eligibility import watch
from .kept import RefusedError
from .tracing import Guards, is_plain, traces

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
# Dropout modules, with the spatial dimensions of images whose channels they drop; 0 drops single elements.
_DROPOUTS: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


@dataclass(frozen=True)
class Dropout:
    """Dropout in training.

    Attributes:
        rate: the probability of dropping.
        dims: the spatial dimensions of images whose whole channels it drops; 0 if it drops single elements.
    """

    rate: float = 0.0
    dims: int = 0

    def then(self, other: Dropout) -> Dropout:
        """The dropout that equals this one followed by another: it keeps what both keep.

        Raises:
            RefusedError: one drops single elements and the other whole channels.
        """
        if not (self.rate and other.rate):
            return self if self.rate else other
        if self.dims != other.dims:
            raise RefusedError("it applies dropout of different kinds one after the other")
        return Dropout(1 - (1 - self.rate) * (1 - other.rate), self.dims)


@dataclass(frozen=True)
class DenseLayer:
    """The dotted names of a layer's norms and convolutions, one or two of each, in the order they run."""

    norms: tuple[str, ...]
    convs: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """All of them, in the order they run."""
        return [name for pair in zip(self.norms, self.convs, strict=True) for name in pair]


@dataclass(frozen=True)
class Block:
    """Dense layers that read all features before them.

    Attributes:
        newest_first: whether a layer's features are concatenated before the older ones, not after them.
        only_new: whether the block returns only the features that its layers add, without its input.
        activation: what follows each norm, as :func:`dense_ext.activations.activation` takes it.
        dropouts: the dropout after each convolution of a layer.
    """

    layers: tuple[DenseLayer, ...]
    newest_first: bool = False
    only_new: bool = False
    activation: str = "relu"
    dropouts: tuple[Dropout, ...] = ()

    @property
    def drops(self) -> bool:
        """Whether there is any dropout."""
        return any([dropout.rate for dropout in self.dropouts])  # noqa: C419  # compiled

    @property
    def drops_channels(self) -> bool:
        """Whether dropout drops whole channels."""
        return any([dropout.dims for dropout in self.dropouts])  # noqa: C419  # compiled


@dataclass(frozen=True)
class Transition:
    """Norm, activation, 1x1 convolution, dropout and a pool of 2x2 windows.

    Attributes:
        pool: "average" or "max".
        activation, dropout: as for :class:`Block`.
    """

    norm: str
    conv: str
    pool: str = "average"
    activation: str = "relu"
    dropout: Dropout = Dropout()

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return self.dropout.rate > 0


@dataclass(frozen=True)
class Plan:
    """The steps that a module computes as long as the guards hold."""

    steps: tuple[Block | Transition, ...]
    guards: Guards

    @property
    def blocks(self) -> list[Block]:
        """The steps that are blocks."""
        return [step for step in self.steps if isinstance(step, Block)]

    @property
    def kind(self) -> str:
        """The kind of part: "dense block", "transition", or "stage" for several steps."""
        if len(self.steps) > 1:
            return "stage"
        return "dense block" if self.blocks else "transition"

    @property
    def norms(self) -> list[str]:
        """The names of all norms, in the order they run."""
        return [name for step in self.steps for name in _names(step)[0]]

    @property
    def convs(self) -> list[str]:
        """The names of all convolutions, in the order they run."""
        return [name for step in self.steps for name in _names(step)[1]]


def _names(step: Block | Transition) -> tuple[list[str], list[str]]:
    if isinstance(step, Transition):
        return [step.norm], [step.conv]
    norms, convs = (
        [name for layer in step.layers for name in getattr(layer, kind)] for kind in ("norms", "convs")
    )
    return norms, convs


def describe(module: nn.Module) -> Plan:
    """The plan of a module.

    Raises:
        RefusedError: the module computes something else, or its modes compute different things.
    """
    plans, guards = [], Guards()
    for training, graph, read in traces(module):
        plans.append((training, Plan(tuple(_Reading(module, graph, training).steps()), Guards())))
        guards |= read | settings(module, [str(n.target) for n in graph.nodes if n.op == "call_module"])
    (_, first), *others = plans
    for training, plan in others:
        if plan.steps != (first if training else without_dropout(first)).steps:
            raise RefusedError("its forward computes different things in different modes")
    modules = [module.get_submodule(name) for name in (*first.norms, *first.convs)]
    if len(set(modules)) < len(modules):
        raise RefusedError("a norm or convolution is used more than once")
    return replace(first, guards=guards)


def settings(module: nn.Module, names: Sequence[str]) -> Guards:
    """Guards for the settings of activations, dropout and pools; each call reads those of other modules.

    Raises:
        RefusedError: a setting is mutable.
    """
    found = []
    for name in names:
        inner = module.get_submodule(name)
        if isinstance(inner, (*NORMS, *CONVS)):
            continue
        for option in ("p", "negative_slope", "alpha", "approximate", *_POOL_OPTIONS):
            if option in inner.__dict__:
                value = inner.__dict__[option]
                if not is_plain(value):
                    raise RefusedError(f"{name} has {option} {value}")
                found.append((name, option, value))
    return Guards(tuple(dict.fromkeys(found)))


def plan_of_layers(module: nn.Module, layers: Sequence[Sequence[nn.Module]]) -> Plan:
    """The plan of a block of these layers, each the modules of a layer in the order they run.

    Raises:
        RefusedError: a layer is not norm, activation, convolution and dropout, once or twice.
    """
    names = {inner: name for name, inner in module.named_modules()}
    described, dropouts, functions = [], set(), set()
    for i, layer in enumerate(layers):
        parts: dict[str, list[Any]] = {"norm": [], "activation": [], "conv": [], "dropout": []}
        for inner in layer:
            if inner not in names:
                raise RefusedError(f"layer {i} has a {type(inner).__name__} that is not inside the module")
            kind = _kind(inner)
            if kind == "conv":
                parts["dropout"].append(Dropout())
            if kind == "dropout" and parts["dropout"]:
                dropout = Dropout(getattr(inner, "p"), _DROPOUTS[type(inner)])  # noqa: B009
                parts["dropout"][-1] = parts["dropout"][-1].then(dropout)
            else:
                parts[kind].append(name_of(inner) if kind == "activation" else names[inner])
        if len(parts["norm"]) != len(parts["conv"]) or len(parts["conv"]) not in (1, 2):
            raise RefusedError(
                f"layer {i} has {len(parts['norm'])} norms and {len(parts['conv'])} convolutions"
            )
        described.append(DenseLayer(tuple(parts["norm"]), tuple(parts["conv"])))
        dropouts.add(tuple(parts["dropout"]))
        functions |= set(parts["activation"] or ["relu"])
    if len(dropouts) != 1 or len(functions) != 1:
        raise RefusedError("its layers differ in activation or dropout, or there are none")
    block = Block(tuple(described), activation=functions.pop(), dropouts=dropouts.pop())
    return Plan((block,), settings(module, [names[inner] for layer in layers for inner in layer]))


def _kind(module: nn.Module) -> str:
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, CONVS):
        return "conv"
    if type(module) in _DROPOUTS:
        return "dropout"
    if name_of(module) is not None:
        return "activation"
    raise RefusedError(f"{type(module).__name__} is not a norm, activation, convolution or dropout")


def without_dropout(plan: Plan) -> Plan:
    """The plan in eval mode."""
    steps: list[Block | Transition] = []
    for step in plan.steps:
        if isinstance(step, Transition):
            steps.append(replace(step, dropout=Dropout()))
        else:
            steps.append(replace(step, dropouts=(Dropout(),) * len(step.dropouts)))
    return replace(plan, steps=tuple(steps))


# --- values of a graph --------------------------------------------------------------------------------


@dataclass(eq=False)
class _Group:
    """Channels that one operation makes."""

    width: int | None  # None for the input until a module that reads it determines it
    sources: tuple[_Group, ...] = ()
    norm: str = ""  # the names of the modules that make it; a pool has its convolution's
    activation: str = ""
    conv: str = ""
    dropout: Dropout = Dropout()
    pool: str = ""  # "average" or "max" if it is the output of a pool
    pooled: _Group | None = None  # for a pool, the convolution's group that it pools
    readers: list[_Group] = field(default_factory=list)


@dataclass(frozen=True)
class _Value:
    groups: tuple[_Group, ...]
    norm: str = ""
    activation: str = ""

    @property
    def features(self) -> bool:
        """Whether no norm has been applied to the channels."""
        return not self.norm


def _width(groups: tuple[_Group, ...]) -> int | None:
    widths = [group.width for group in groups]
    return None if None in widths else sum(filter(None, widths))


class _Reading:
    """Interprets one graph, node by node."""

    def __init__(self, module: nn.Module, graph: fx.Graph, training: bool) -> None:
        self.module, self.training = module, training
        self.values: dict[fx.Node, _Value] = {}
        self.empty: dict[fx.Node, _Value] = {}  # tensors of shape [0], and the values whose dtype they have
        self.input: _Group | None = None
        self.output: _Value | None = None
        self.made: list[_Group] = []  # the outputs of convolutions and pools
        self.used: list[str] = []  # the names of the norms and convolutions that are called
        for node in graph.nodes:
            getattr(self, f"_{node.op}")(node)

    # --- handlers by kind of node

    def _placeholder(self, node: fx.Node) -> None:
        if self.input is not None:
            raise RefusedError("it takes more than one input")
        self.input = _Group(None)
        self.values[node] = _Value((self.input,))

    def _get_attr(self, node: fx.Node) -> None:
        raise RefusedError(f"it uses {node.target} itself")

    def _output(self, node: fx.Node) -> None:
        (result,) = node.args
        if not isinstance(result, fx.Node):
            raise RefusedError("it does not return one tensor")
        self.output = self._value(result)

    def _call_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.module.get_submodule(name)
        if len(node.args) != 1 or node.kwargs:
            raise RefusedError(f"{name} is called with more than one argument")
        source, kind = node.args[0], type(module)
        if kind in NORMS:
            self.values[node] = self._normalised(source, name, module)
        elif kind in CONVS:
            self.values[node] = self._convolved(source, name, module)
        elif kind is nn.Identity:
            self.values[node] = self._value(source)
        elif name_of(module) is not None:
            inplace = getattr(module, "inplace", False)
            self.values[node] = self._activated(source, str(name_of(module)), inplace)
        elif kind in _DROPOUTS:
            rate = module.p if module.training else 0.0
            self.values[node] = self._dropped(source, rate, dims=_DROPOUTS[kind])
        elif kind in (*AVERAGES, *MAXIMA):
            self.values[node] = self._pooled(
                source, "average" if kind in AVERAGES else "max", **options_of_pool(module)
            )
        else:
            raise RefusedError(f"{name} is {_article(kind.__name__)}")

    def _call_function(self, node: fx.Node) -> None:
        handler = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
        if handler is None:
            raise RefusedError(f"it calls {getattr(node.target, '__name__', node.target)}")
        self._handle(handler, node)

    def _call_method(self, node: fx.Node) -> None:
        handler = _METHODS.get(str(node.target))
        if handler is None:
            raise RefusedError(f"it calls Tensor.{node.target}")
        self._handle(handler, node)

    def _handle(self, handler: Callable[..., _Value | None], node: fx.Node) -> None:
        try:
            value = handler(self, *node.args, **node.kwargs)
        except TypeError as error:  # the handler does not take these arguments
            name = getattr(node.target, "__name__", node.target)
            raise RefusedError(f"it calls {name} in another way: {error}") from error
        if value is None:
            self.empty[node] = self._value(node.args[0])
        else:
            self.values[node] = value

    # --- handlers by operation

    def _value(self, source: Any) -> _Value:
        if not isinstance(source, fx.Node) or source in self.empty:
            raise RefusedError("it uses a constant as features")
        return self.values[source]

    def _features(self, source: Any, what: str) -> _Value:
        value = self._value(source)
        if not value.features:
            raise RefusedError(f"{what} of the output of a norm or activation")
        return value

    def _reads(self, groups: tuple[_Group, ...], channels: int, name: str) -> None:
        if len(groups) == 1 and groups[0].width is None:
            groups[0].width = channels
        if _width(groups) != channels:
            raise RefusedError(f"{name} is for {channels} channels and reads {_width(groups)}")

    def _normalised(self, source: Any, name: str, norm: Any) -> _Value:
        groups = self._features(source, "it takes a norm").groups
        self._reads(groups, num_features(norm), name)
        self.used.append(name)
        return _Value(groups, norm=name)

    def _activated(self, source: Any, name: str, inplace: Any = False) -> _Value:
        value = self._value(source)
        if not value.norm or value.activation:
            raise RefusedError("it takes an activation of something else than the output of a norm")
        if inplace and len(source.users) != 1:
            raise RefusedError("an in-place activation changes a tensor that has other readers")
        return _Value(value.groups, value.norm, name)

    def _convolved(self, source: Any, name: str, conv: Any) -> _Value:
        value = self._value(source)
        if not value.norm:
            raise RefusedError(f"{name} has no norm before it")
        self._reads(value.groups, conv.in_channels, name)
        self.used.append(name)
        group = _Group(conv.out_channels, value.groups, value.norm, value.activation or "identity", name)
        for read in value.groups:
            read.readers.append(group)
        self.made.append(group)
        return _Value((group,))

    def _dropped(
        self, source: Any, rate: Any = 0.5, training: Any = True, inplace: Any = False, dims: int = 0
    ) -> _Value:
        value = self._value(source)
        if not training or not rate:
            return value
        if not self.training:
            raise RefusedError("it applies dropout in eval mode too")
        group = value.groups[0]
        if not value.features or len(value.groups) > 1 or not group.conv or group.pooled:
            raise RefusedError("it applies dropout to something else than a convolution's result")
        if len(source.users) != 1:
            raise RefusedError("it reads a convolution's output before dropout")
        group.dropout = group.dropout.then(Dropout(float(rate), dims))
        return value

    def _joined(self, tensors: Any, dim: Any = 0) -> _Value:
        if dim != 1 or not isinstance(tensors, (list, tuple)):
            raise RefusedError("it concatenates along another dimension than channels")
        # torch.cat leaves out tensors of shape [0], but they contribute to its dtype.
        joined = [t for t in tensors if t not in self.empty]
        groups = [group for tensor in joined for group in self._features(tensor, "it concatenates").groups]
        if any(not set(self.empty[t].groups) <= set(groups) for t in tensors if t in self.empty):
            raise RefusedError("it concatenates an empty tensor of another dtype")
        return _Value(tuple(groups))

    def _pooled(
        self, source: Any, kind: str, kernel_size: Any, stride: Any = None, padding: Any = 0,
        dilation: Any = 1, ceil_mode: Any = False, divisor_override: Any = None, return_indices: Any = False,
        count_include_pad: Any = True,
    ) -> _Value:  # fmt: skip
        (group, *others) = self._features(source, "it takes a pool").groups
        settings = (kernel_size, stride or kernel_size, padding, dilation)
        sizes = [{size} if isinstance(size, int) else set(size) for size in settings]
        if sizes != [{2}, {2}, {0}, {1}] or ceil_mode or divisor_override or return_indices:
            raise RefusedError("its pool does not take windows of 2x2")
        if others or not group.conv or group.pooled:
            raise RefusedError("it takes a pool of something else than a convolution's result")
        pool = replace(group, pool=kind, pooled=group, readers=[])
        group.readers.append(pool)
        self.made.append(pool)
        return _Value((pool,))

    # --- the steps

    def steps(self) -> Iterator[Block | Transition]:
        """The dense blocks and transitions that the graph consists of.

        Raises:
            RefusedError: the graph computes something else.
        """
        assert self.input is not None
        assert self.output is not None
        if not self.output.features:
            raise RefusedError("it returns the output of a norm or activation")
        base, layers, named = self.input, [], []  # type: ignore[var-annotated]
        for group in self.made:
            if self._is_bottleneck(group) or (group.pooled is None and any(r.pooled for r in group.readers)):
                continue
            named += self._modules_of(group)
            if group.pooled is not None:
                yield from self._closed(base, layers, group.sources)
                yield Transition(group.norm, group.conv, group.pool, group.activation, group.dropout)
                base, layers = group, []
            else:
                layers.append(group)
        yield from self._closed(base, layers, self.output.groups)
        if base is self.input and not layers:
            raise RefusedError("it has no dense layer and no transition")
        if sorted(named) != sorted(self.used):
            raise RefusedError("a norm or convolution is used more than once, or its output is not used")

    def _is_bottleneck(self, group: _Group) -> bool:
        """Whether the group has exactly one reader, a convolution that reads nothing else."""
        assert self.output is not None
        if group.pooled or len(group.readers) != 1 or group in self.output.groups:
            return False
        (reader,) = group.readers
        return reader.pooled is None and reader.sources == (group,) and bool(group.sources)

    def _modules_of(self, group: _Group) -> list[str]:
        inner = [source for source in group.sources if self._is_bottleneck(source)]
        return [name for g in (*inner, group) for name in (g.norm, g.conv)]

    def _closed(self, base: _Group, layers: list[_Group], read: tuple[_Group, ...]) -> Iterator[Block]:
        """The block of these layers on top of ``base``; ``read`` are the groups that its reader reads."""
        if not layers:
            if read != (base,):
                raise RefusedError("it leaves out or repeats features")
            return
        described, dropouts, functions, newest_first = [], set(), set(), None
        for i, group in enumerate(layers):
            inner, outer = group.sources, group
            convolutions = [group]
            if len(inner) == 1 and self._is_bottleneck(inner[0]):
                outer = inner[0]
                convolutions.insert(0, outer)
            order = _order((base, *layers[:i]), outer.sources)
            newest_first = order if newest_first is None else newest_first
            if i and order != newest_first:
                raise RefusedError("its layers read the features in different orders")
            described.append(
                DenseLayer(tuple(g.norm for g in convolutions), tuple(g.conv for g in convolutions))
            )
            dropouts.add(tuple(g.dropout for g in convolutions))
            functions |= {g.activation for g in convolutions}
        if len({len(layer.convs) for layer in described}) > 1:
            raise RefusedError("some of its layers have a bottleneck and some have none")
        if len(dropouts) > 1:
            raise RefusedError("its layers have different drop rates")
        if len(functions) > 1:
            raise RefusedError("its norms are followed by different activations")
        only_new = base not in read
        order = _order(tuple(layers) if only_new else (base, *layers), read)
        if newest_first is not None and order is not None and order != newest_first:
            raise RefusedError("it returns the features in another order than its layers read them")
        newest_first = bool(order if newest_first is None else newest_first)
        yield Block(tuple(described), newest_first, only_new, functions.pop(), dropouts.pop())


def _order(made: tuple[_Group, ...], read: tuple[_Group, ...]) -> bool | None:
    """Whether groups are read with the newest first; None for a single group."""
    if read not in (made, made[::-1]):
        raise RefusedError("its layers do not read all features before them, in one order")
    return None if len(made) == 1 else read == made[::-1]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _relu(reading: _Reading, input: Any, inplace: Any = False) -> _Value:
    return reading._activated(input, "relu", inplace)


def _relu_(reading: _Reading, input: Any) -> _Value:
    return reading._activated(input, "relu", True)


def _leaky_relu(reading: _Reading, input: Any, negative_slope: Any = 0.01, inplace: Any = False) -> _Value:
    return reading._activated(input, named("leaky_relu", float(negative_slope)), inplace)


def _elu(reading: _Reading, input: Any, alpha: Any = 1.0, inplace: Any = False) -> _Value:
    return reading._activated(input, named("elu", float(alpha)), inplace)


def _gelu(reading: _Reading, input: Any, approximate: str = "none") -> _Value:
    return reading._activated(input, named("gelu", approximate))


def _silu(reading: _Reading, input: Any, inplace: Any = False) -> _Value:
    return reading._activated(input, "silu", inplace)


def _cat(reading: _Reading, tensors: Any, dim: Any = 0, axis: Any = None) -> _Value:
    return reading._joined(tensors, dim if axis is None else axis)


def _dropout(
    reading: _Reading, input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False,
    train: Any = None, dims: int = 0,
) -> _Value:  # fmt: skip
    return reading._dropped(input, p, training if train is None else train, inplace, dims)


def _contiguous(reading: _Reading, input: Any) -> _Value:
    return reading._value(input)


def _new_empty(reading: _Reading, input: Any, *size: Any) -> None:
    if size not in ((0,), ((0,),), ([0],)):
        raise RefusedError("it makes a tensor that is not empty")


_POOL_OPTIONS = (
    "kernel_size", "stride", "padding", "dilation", "ceil_mode", "count_include_pad", "divisor_override",
    "return_indices",
)  # fmt: skip


# Those that the functions of a kind of pool do not take.
_NOT_OPTIONS = {
    "average": ("dilation", "return_indices"),
    "max": ("count_include_pad", "divisor_override"),
}


def options_of_pool(module: nn.Module) -> dict[str, Any]:
    """The options of a pooling module, by name."""
    return {option: getattr(module, option) for option in _POOL_OPTIONS if hasattr(module, option)}


def options_of_call(kind: str, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call of a pooling function, by name, given its arguments after the input."""
    names = [name for name in _POOL_OPTIONS if name not in _NOT_OPTIONS[kind]]
    return {**dict(zip(names, args, strict=False)), **options}


def _avg_pool(reading: _Reading, input: Any, *args: Any, **options: Any) -> _Value:
    return reading._pooled(input, "average", **options_of_call("average", args, options))


def _max_pool(reading: _Reading, input: Any, *args: Any, **options: Any) -> _Value:
    return reading._pooled(input, "max", **options_of_call("max", args, options))


# What a forward may call, with what it means. None is a tensor of shape [0]. The gate watches all of these.
_FUNCTIONS: dict[Callable[..., Any], Callable[..., _Value]] = {
    torch.cat: _cat, torch.concat: _cat, torch.concatenate: _cat,
    F.relu: _relu, torch.relu: _relu, F.relu_: _relu_, torch.relu_: _relu_,
    F.leaky_relu: _leaky_relu, F.elu: _elu, F.gelu: _gelu, F.silu: _silu,
    F.dropout: _dropout, torch.dropout: _dropout,
    F.dropout1d: functools.partial(_dropout, dims=1),
    F.dropout2d: functools.partial(_dropout, dims=2),
    F.dropout3d: functools.partial(_dropout, dims=3),
    F.avg_pool1d: _avg_pool, F.avg_pool2d: _avg_pool, F.avg_pool3d: _avg_pool,
    F.max_pool1d: _max_pool, F.max_pool2d: _max_pool, F.max_pool3d: _max_pool,
}  # fmt: skip
_METHODS: dict[str, Callable[..., _Value | None]] = {
    "relu": _relu, "relu_": _relu_, "contiguous": _contiguous, "new_empty": _new_empty,
}  # fmt: skip
_accepted = set(map(id, _FUNCTIONS))
for _owner in (torch, F):  # under all their names
    watch(_owner, *[name for name, value in vars(_owner).items() if id(value) in _accepted])
watch(Tensor, *_METHODS)
