"""The PyTorch operators for a dense block, a transition and the stem, for autograd, torch.compile and export.

Each is a functional operator with a fake kernel and a registered backward. It runs the schedule over the
primitives of a backend. The operators do not update running statistics but return the batch's statistics, so
that a recomputation cannot update them twice.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import differentiable, schedule, transition
from .arguments import (
    ActivationOptions,
    Arguments,
    BlockOptions,
    Gradients,
    PoolingOptions,
    TransitionOptions,
    fake_gradients,
    in_parameter_dtypes,
    unpack,
    zero_gradients,
)
from .autograd import caller, load, needs_conv_grad, register, save
from .backends import CPU, Primitives, requested, select
from .backends.base import FrozenBlocks, FrozenTransitions, accumulate_dtype
from .backends.general import Form, block_form, in_form, transition_form
from .batch_norm import in_dtype, values_per_channel
from .flops import register_formulas
from .ownership import is_exclusive
from .schedule import Block, Dropout, Layer, Norm, PlainBlock
from .synchronised import Sync, gather, resolve
from .transition import Pooling

_Run = TypeVar("_Run", FrozenBlocks, FrozenTransitions)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_LIBRARY = torch.library.Library("dense_ext", "FRAGMENT")
# The dispatch key of the gradients that ``torch.autograd.grad(is_grads_batched=True)`` passes.
_LEGACY_BATCHED = torch._C._dispatch_key_parse("Batched")


# In the order of the fields of Arguments, BlockOptions, TransitionOptions and ActivationOptions.
_ARGUMENTS = (
    "Tensor[] norm_weights, Tensor[] norm_biases, Tensor[] conv_weights, Tensor[] conv_biases, "
    "Tensor[] running_means, Tensor[] running_vars, float[] eps, bool[] batch_stats, str activation, "
    "str group, Tensor? counts, str backend"
)
_BLOCK = (
    f"{_ARGUMENTS}, int convs_per_layer, int dilation, Tensor? dropout_seeds, float[] drop_rates, "
    "bool drops_channels, str recompute"
)
_TRANSITION = (
    f"{_ARGUMENTS}, str pool, int[] pool_window, Tensor? dropout_seed, float drop_rate, "
    "bool drops_channels, Tensor? known_stats"
)
_ACTIVATION = f"{_ARGUMENTS}, Tensor? known_stats"
_GRADIENTS = "(Tensor, Tensor[], Tensor[], Tensor[], Tensor[])"


# The function that calls an operator, by its name; see :func:`dense_ext.autograd.caller`.
CALLS: dict[str, Callable[..., Any]] = {}


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator and make the decorated function its kernel on every device."""
    _LIBRARY.define(schema)

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")
        return kernel

    return decorate


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"dense_ext::{name}", lib=_LIBRARY)


def constant_when_compiled(function: _Function) -> _Function:
    """Let torch.compile call a function once, and take its result for a constant.

    :func:`torch.compiler.assume_constant_result` does the same, but imports the compiler, which takes longer
    than everything else in this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_has_autocast = functools.cache(torch.amp.is_autocast_available)  # type: ignore[attr-defined]


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device; False for devices without autocast."""
    device = x.device.type
    # torch.compile cannot trace is_autocast_available; every device it targets supports autocast.
    available = torch.compiler.is_compiling() or _has_autocast(device)
    return available and torch.is_autocast_enabled(device)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off inside a kernel, whose inputs already have the dtypes to compute in."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def _primitives(x: Tensor, args: Arguments, form: Form) -> Primitives:
    # The kernels take no empty batch. A process has one only if it shares statistics with others.
    name = requested(args.backend) if x.shape[0] else "reference"
    asked = name, x.device.type, x.dtype
    primitives, pixels = select(*asked), values_per_channel(x)
    if pixels > primitives.max_pixels:  # only large inputs, so that select caches few entries
        primitives = select(*asked, pixels)
    return in_form(primitives, form)


@_operator("gather_counts(Tensor x, str group) -> Tensor")
def _gather_counts(x: Tensor, group: str) -> Tensor:
    """The number of values per channel in each process of a group [W]; ``x`` is this process's input."""
    own = torch.full((1,), values_per_channel(x), dtype=accumulate_dtype(x.dtype), device=x.device)
    return gather(own, resolve(group)).flatten()


@_fake("gather_counts")
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(resolve(group).size(), dtype=accumulate_dtype(x.dtype))


def _sync(x: Tensor, args: Arguments) -> Sync | None:
    """The processes that share batch statistics, None if each has its own."""
    if args.counts is None:
        return None
    return Sync(resolve(args.group), _vector(args.counts, accumulate_dtype(x.dtype)))


def _vector(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-channel vector as the primitives take it: dense, in the accumulation dtype."""
    return in_dtype(x, dtype).contiguous()


def _vectors(x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Per-channel vectors as the primitives take them beside x."""
    dtype = accumulate_dtype(x.dtype)
    # Most are so already; a step reads hundreds, so nothing is called for these.
    return [t if t.dtype == dtype and t.is_contiguous() else _vector(t, dtype) for t in tensors]


def _norm_vectors(x: Tensor, args: Arguments) -> tuple[list[Tensor], ...]:
    """The norms' weights and biases, and the frozen ones' running means and variances."""
    vectors = args.norm_weights, args.norm_biases, args.running_means, args.running_vars
    return tuple(_vectors(x, tensors) for tensors in vectors)


def _norms(x: Tensor, args: Arguments) -> list[Norm]:
    weights, biases, means, variances = _norm_vectors(x, args)
    running = iter(zip(means, variances, strict=True))
    return [
        Norm(weight, bias, eps, None if batch else next(running))
        for weight, bias, eps, batch in zip(weights, biases, args.eps, args.batch_stats, strict=True)
    ]


def _conv_biases(x: Tensor, args: Arguments) -> list[Tensor]:
    return _vectors(x, args.conv_biases)


def _plain_block(x: Tensor, in_channels: int, args: Arguments, options: BlockOptions) -> PlainBlock | None:
    """The parameters of a block that one call can run; None for another block."""
    if args.counts is not None or args.conv_biases or options.convs_per_layer != 2 or any(options.drop_rates):
        return None
    weights, biases, means, variances = _norm_vectors(x, args)
    frozen = [not batch for batch in args.batch_stats]
    return PlainBlock(in_channels, weights, biases, args.eps, frozen, means, variances, args.conv_weights)


def _block(x: Tensor, in_channels: int, args: Arguments, options: BlockOptions) -> Block:
    norms, biases, each = _norms(x, args), _conv_biases(x, args), options.convs_per_layer
    seeds = [None] * len(norms) if options.dropout_seeds is None else options.dropout_seeds.tolist()
    dropouts = [
        Dropout(rate, options.drops_channels, seed)
        for rate, seed in zip(itertools.cycle(options.drop_rates), seeds, strict=False)
    ]
    own = [slice(i, i + each) for i in range(0, len(norms), each)]
    layers = [Layer(norms[i], args.conv_weights[i], biases[i], dropouts[i]) for i in own]
    return Block(layers, in_channels, _sync(x, args))


def _pooling(x: Tensor, args: Arguments, options: PoolingOptions) -> Pooling:
    """The constants of a transition, of norm and activation alone or, without options, of the stem."""
    if not isinstance(options, TransitionOptions):
        activation = "" if options is None else args.activation
        return Pooling(_norms(x, args)[0], None, None, Dropout(0.0), False, (), _sync(x, args), activation)
    seed = None if options.dropout_seed is None else int(options.dropout_seed)
    return Pooling(
        _norms(x, args)[0],
        args.conv_weights[0],
        next(iter(_conv_biases(x, args)), None),
        Dropout(options.drop_rate, options.drops_channels, seed),
        options.pool == "max",
        tuple(options.pool_window),
        _sync(x, args),
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether x is in dense channels_last memory; unlike PyTorch's test, exact even if a size is 1."""
    _, c, *pixels = x.shape
    strides = [c]  # from the last dimension to the first
    for length in reversed(pixels):
        strides.append(strides[-1] * length)
    return x.stride() == (strides.pop(), 1, *reversed(strides))


def is_dense(x: Tensor) -> bool:
    """Whether x is dense in either memory format, with exactly the strides that follow from its sizes.

    A view of a single image may have other strides, for which PyTorch's batch norm on a CPU computes wrong
    gradients.
    """
    return x.is_contiguous() or is_channels_last(x)


def dense_channels_last(x: Tensor) -> Tensor:
    """``x`` in dense channels_last memory, copied only if it is not."""
    if is_channels_last(x):
        return x
    return torch.empty_like(x, memory_format=schedule.channels_last(x)).copy_(x)


# --- dense block: (x) -> (X, batch statistics, z) ----------------------------------------------------


@_operator(f"dense_block(Tensor x, {_BLOCK}) -> (Tensor, Tensor, Tensor)")
def _dense_block(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    args, options = unpack(rest, Arguments, BlockOptions)
    ops, keeps_z = _of_block(x, args, options), options.recompute == "none"
    with _without_autocast(x):
        plain = _plain_block(x, x.shape[1], args, options)
        found = None if plain is None else schedule.plain_forward(ops, plain, x, keeps_z)
        return found or schedule.forward(ops, _block(x, x.shape[1], args, options), x, keeps_z)


@constant_when_compiled
def takes_weights(device: str, dtype: torch.dtype, weights: torch.dtype, backend: str) -> bool:
    """Whether the operators take convolution weights of one dtype beside activations of another."""
    return select(requested(backend), device, dtype).takes_weights(dtype, weights)


# --- frozen parts with packed weights: (x) -> X or y, without a backward -------------------------------


@constant_when_compiled
def packs(part: str, device: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether a backend packs the weights of a part, the name of an attribute of :class:`Backend`."""
    return getattr(select(requested(backend), device, dtype), part) is not None


def _chosen(x: Tensor, backend: str) -> Primitives:
    return select(requested(backend), x.device.type, x.dtype)


def _packing(run: _Run | None, x: Tensor) -> _Run:
    if run is None:
        raise RuntimeError(f"packed weights are for a CPU, got an input on {x.device}")
    return run


def _frozen_blocks(x: Tensor, backend: str) -> FrozenBlocks:
    return _packing(_chosen(x, backend).frozen_blocks, x)


def _frozen_transitions(x: Tensor, backend: str) -> FrozenTransitions:
    return _packing(_chosen(x, backend).frozen_transitions, x)


def _empty_packed(run: FrozenBlocks | FrozenTransitions, args: Arguments) -> Tensor:
    """The memory for the packed weights of the frozen part with these arguments."""
    weight = args.conv_weights[0]
    size = run.packed_size([conv.shape for conv in args.conv_weights], weight.dtype)
    return weight.new_empty(size, dtype=accumulate_dtype(weight.dtype))


@_operator(f"pack_dense_block({_ARGUMENTS}) -> Tensor")
def _pack_dense_block(*rest: Any) -> Tensor:
    (args,) = unpack(rest, Arguments)
    weight = args.conv_weights[0]
    options = BlockOptions(2, 1, None, [0.0, 0.0], False, "bottleneck")
    block, run = _plain_block(weight, weight.shape[1], args, options), _frozen_blocks(weight, args.backend)
    assert block is not None
    packed = _empty_packed(run, args)
    run.pack(packed, block.in_channels, *block.of_frozen)
    return packed


@_fake("pack_dense_block")
def _(*rest: Any) -> Tensor:
    (args,) = unpack(rest, Arguments)
    return _empty_packed(_frozen_blocks(args.conv_weights[0], args.backend), args)


@_operator(f"pack_transition({_ARGUMENTS}) -> Tensor")
def _pack_transition(*rest: Any) -> Tensor:
    (args,) = unpack(rest, Arguments)
    (weight,), run = args.conv_weights, _frozen_transitions(args.conv_weights[0], args.backend)
    (norm,), packed = _norms(weight, args), _empty_packed(run, args)
    assert norm.running is not None
    run.pack(packed, *norm.running, norm.weight, norm.bias, norm.eps, weight)
    return packed


@_fake("pack_transition")
def _(*rest: Any) -> Tensor:
    (args,) = unpack(rest, Arguments)
    return _empty_packed(_frozen_transitions(args.conv_weights[0], args.backend), args)


# The library of the C++ backend has the operators that read packed weights.
if CPU.library.path is not None:

    @_fake("packed_dense_block")
    def _(x: Tensor, packed: Tensor, widths: list[int], growth: list[int]) -> Tensor:
        return schedule.empty_like(x, x.shape[1] + sum(growth))

    @_fake("packed_transition")
    def _(x: Tensor, packed: Tensor, out_channels: int) -> Tensor:
        size = (x.shape[0], out_channels, *(length // 2 for length in x.shape[2:]))
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=schedule.channels_last(x))


def _of_block(x: Tensor, args: Arguments, options: BlockOptions) -> Primitives:
    window = args.conv_weights[-1].shape[2:]
    return _primitives(x, args, block_form(window, options.dilation, args.activation))


@_fake("dense_block")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    args, options = unpack(rest, Arguments, BlockOptions)
    # A fake tensor has no values to read seeds and process counts from.
    args, options = args._replace(counts=None), options._replace(dropout_seeds=None)
    block = _block(x, x.shape[1], args, options)
    return schedule.empty_outputs(x, sum(block.growth), sum(block.bottlenecks), options.recompute == "none")


_BLOCK_BACKWARD = (
    f"Tensor output, Tensor stats, Tensor z, {_BLOCK}, int in_channels, bool[] needs_conv_grad) "
    f"-> {_GRADIENTS}"
)


@_operator(f"dense_block_backward_(Tensor(a!) grad, {_BLOCK_BACKWARD}")
def _dense_block_backward_(grad: Tensor, output: Tensor, stats: Tensor, z: Tensor, *rest: Any) -> Gradients:
    """Backward that overwrites ``grad``, which is in dense channels_last memory and serves as G."""
    args, options, in_channels, needs_conv_grad = unpack(rest, Arguments, BlockOptions)
    if grad.shape[0] == 0 and args.counts is None:
        return zero_gradients(grad.new_empty(0, in_channels, *grad.shape[2:]), args)
    output, stats, z = dense_channels_last(output), stats.contiguous(), z.contiguous()
    ops, grad = _of_block(output, args, options), dense_channels_last(grad)
    with _without_autocast(output):
        plain = _plain_block(output, in_channels, args, options)
        if plain is not None and ops.plain_blocks is not None:
            found = schedule.plain_backward(ops.plain_blocks, plain, grad, output, z, stats, needs_conv_grad)
            return in_parameter_dtypes(args, *found, [])
        block = _block(output, in_channels, args, options)
        grad_x, layers = schedule.backward(ops, block, grad, output, z, stats, needs_conv_grad)
    weights, biases = zip(*(norm for layer in layers for norm in layer.norms), strict=True)
    convs = [conv for layer in layers for conv in layer.convs]
    conv_biases = [bias for layer in layers for bias in layer.conv_biases]
    return in_parameter_dtypes(args, grad_x, weights, biases, convs, conv_biases)


@_operator(f"dense_block_backward(Tensor grad, {_BLOCK_BACKWARD}")
def _dense_block_backward(grad: Tensor, *rest: Any) -> Gradients:
    buffer = torch.empty_like(grad, memory_format=schedule.channels_last(grad)).copy_(grad)
    return _dense_block_backward_(buffer, *rest)


def _dense_block_backward_fake(
    grad: Tensor, output: Tensor, stats: Tensor, z: Tensor, *rest: Any
) -> Gradients:
    args, _, in_channels, needs_conv_grad = unpack(rest, Arguments, BlockOptions)
    return fake_gradients(schedule.empty_like(output, in_channels), args, needs_conv_grad)


_fake("dense_block_backward_")(_dense_block_backward_fake)
_fake("dense_block_backward")(_dense_block_backward_fake)


def _dense_block_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *rest = inputs
    args, options = unpack(rest, Arguments, BlockOptions)
    out, stats, z = output
    ctx.in_channels = x.shape[1]
    ctx.recomputed = None
    kept = x if options.recompute == "block" else out
    save(ctx, args, kept, stats, z, options.dropout_seeds)
    ctx.options = options._replace(dropout_seeds=None)


def _dense_block_formula(ctx: Any, grad: Tensor) -> Gradients:
    if ctx.options.recompute == "block":
        saved, output = recomputed_output(ctx, last=True)
        args, _, stats, z, seeds = saved
    else:
        args, output, stats, z, seeds = load(ctx)
    options, needed = ctx.options._replace(dropout_seeds=seeds), needs_conv_grad(ctx)
    if differentiates_inside(grad):
        return differentiable.dense_block_backward(grad, output, args, options, ctx.in_channels)
    # The schedule accumulates into the gradient itself if it is exclusive to this call, else into a copy.
    backward = CALLS["dense_block_backward"]
    # Compiled autograd traces this function; it makes the copy a part of its graph.
    if not torch.compiler.is_compiling() and is_exclusive(grad, _probe_ownership) and is_channels_last(grad):
        backward = CALLS["dense_block_backward_"]
    return backward(grad, output, stats, z, *args, *options, ctx.in_channels, needed)


def differentiates_inside(grad: Tensor) -> bool:
    """Whether a backward will be differentiated again, or takes a batch of gradients at once.

    The kernels support neither; :mod:`dense_ext.differentiable` does the same with PyTorch's operators.
    """
    if torch.is_grad_enabled() or torch._C._functorch.is_batchedtensor(grad):
        return True
    return torch._C._dispatch_keys(grad).has(_LEGACY_BATCHED)


class _Recomputed:
    """A block's saved tensors and the X recomputed from them, kept for one backward pass."""

    def __init__(self, saved: tuple[Any, ...], output: Tensor) -> None:
        self.value: tuple[tuple[Any, ...], Tensor] | None = (saved, output)
        self.versions = self._versions(saved)

    @staticmethod
    def _versions(saved: tuple[Any, ...]) -> list[int]:
        args, x, *_ = saved
        return [tensor._version for tensor in (x, *itertools.chain.from_iterable(args.tensors))]

    def check(self) -> None:
        """Raise autograd's error if a loaded tensor was modified since, as by an optimizer in a hook."""
        if self.value is not None and self._versions(self.value[0]) != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                "operation: a dense block's input, parameter or running statistic, during the backward pass"
            )

    def keep(self) -> None:
        """Does nothing; the engine calls it when the pass ends, and holds this object until then."""


def recomputed_output(ctx: Any, last: bool = False) -> tuple[tuple[Any, ...], Tensor]:
    """Returns (saved, X) for a block that kept only its input: its saved tensors, and X recomputed from them.

    Both are kept for the running backward pass, for two reasons. The transition asks for X before the block's
    own backward does, which passes ``last`` and releases them. And checkpointing around the block allows
    loading the saved tensors only once. They are freed when the pass ends or fails. Another pass loads them
    again, and autograd then checks that nothing has modified them.
    """
    kept: _Recomputed | None = ctx.recomputed and ctx.recomputed()
    if kept is None or kept.value is None:
        saved = args, x, _, _, seeds = load(ctx)
        options = ctx.options._replace(dropout_seeds=seeds, recompute="bottleneck")
        # If the backward is differentiated again, this records the path from X to its input and parameters.
        output, _, _ = CALLS["dense_block"](x, *args, *options)
        if last:
            return saved, output
        kept = _Recomputed(saved, output)
        # Outside a backward pass, when a user inspects the saved tensors, queueing fails and nothing is kept.
        with contextlib.suppress(RuntimeError):
            torch.autograd.Variable._execution_engine.queue_callback(kept.keep)
            ctx.recomputed = weakref.ref(kept)
    else:
        kept.check()
    value = kept.value
    assert value is not None
    if last:
        kept.value = None
    return value


def _probe_ownership() -> None:
    """Run a one-layer block's backward with a gradient that is exclusive to it."""
    with torch.enable_grad():
        x, weight = (
            torch.ones(1, 1, 1, 1, device="cpu", requires_grad=True),
            torch.ones(1, 1, 3, 3, device="cpu"),
        )
        one, zero = torch.ones(1, device="cpu"), torch.zeros(1, device="cpu")
        args = Arguments(
            [one], [zero], [weight], [], [zero], [one], [1.0], [False], "relu", "", None, "reference"
        )
        options = BlockOptions(1, 1, None, [0.0], False, "bottleneck")
        out, _, _ = CALLS["dense_block"](x, *args, *options)
        (out * 2).sum().backward()


# --- transition, stem, norm and activation: (x) -> (y, batch statistics) ---------------------------------


def _register_pooling(name: str, schema: str, *kinds: Any) -> None:
    """Define an operator that normalises and pools, or only normalises, and its backward.

    Args:
        name: the operator's name.
        schema: its arguments after x.
        kinds: the named tuples that the arguments are, Arguments first.
    """
    # Without a pool no kernel reads the tensors, and the result is in x's memory format.
    as_read = _unchanged if ActivationOptions in kinds else dense_channels_last

    def parse(rest: Sequence[Any]) -> tuple[Arguments, PoolingOptions, list[Any]]:
        args, *others = unpack(rest, *kinds)
        return (args, others[0], others[1:]) if len(kinds) > 1 else (args, None, others)

    def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        args, options, _ = parse(rest)
        known = options.known_stats if options else None
        with _without_autocast(x):
            return transition.forward(
                _of_pooling(x, args, options), _pooling(x, args, options), as_read(x), known
            )

    def fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        args, options, _ = parse(rest)
        return transition.empty_outputs(_pooling(x, args._replace(counts=None), _constants(options)), x)

    def backward(grad: Tensor, x: Tensor, stats: Tensor, *rest: Any) -> Gradients:
        args, options, (needs_conv_grad,) = parse(rest)
        if x.shape[0] == 0 and args.counts is None:
            return zero_gradients(torch.empty_like(x), args)
        with _without_autocast(x):
            found = transition.backward(
                _of_pooling(x, args, options),
                _pooling(x, args, options),
                as_read(grad),
                as_read(x),
                stats.contiguous(),
                any(needs_conv_grad),
            )
        convs = [found.weight] if args.conv_weights else []
        biases = [] if found.bias is None else [found.bias]
        return in_parameter_dtypes(args, found.x, [found.norm_weight], [found.norm_bias], convs, biases)

    def backward_fake(grad: Tensor, x: Tensor, stats: Tensor, *rest: Any) -> Gradients:
        args, _, (needs_conv_grad,) = parse(rest)
        return fake_gradients(torch.empty_like(as_read(x)), args, needs_conv_grad)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *rest = inputs
        args, options, _ = parse(rest)
        save(ctx, args, x, output[1], getattr(options, "dropout_seed", None))
        ctx.options = _constants(options)

    def formula(ctx: Any, grad: Tensor) -> Gradients:
        args, x, stats, seed = load(ctx)
        options = ctx.options
        if isinstance(options, TransitionOptions):
            options = options._replace(dropout_seed=seed)
        if differentiates_inside(grad):
            return differentiable.pooling_backward(grad, x, args, options)
        return CALLS[f"{name}_backward"](grad, x, stats, *args, *(options or ()), needs_conv_grad(ctx))

    _operator(f"{name}(Tensor x, {schema}) -> (Tensor, Tensor)")(forward)
    _fake(name)(fake)
    _operator(
        f"{name}_backward(Tensor grad, Tensor x, Tensor stats, {schema}, bool[] needs_conv_grad) "
        f"-> {_GRADIENTS}"
    )(backward)
    _fake(f"{name}_backward")(backward_fake)
    CALLS[name] = register(_LIBRARY, name, forward, setup, formula)
    CALLS[f"{name}_backward"] = caller(getattr(torch.ops.dense_ext, f"{name}_backward").default, backward)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _constants(options: PoolingOptions) -> PoolingOptions:
    """The options without their tensors."""
    if isinstance(options, TransitionOptions):
        return options._replace(dropout_seed=None, known_stats=None)
    return options and ActivationOptions(None)


def _of_pooling(x: Tensor, args: Arguments, options: PoolingOptions) -> Primitives:
    pool, last = [2] * (x.dim() - 2), False
    if isinstance(options, TransitionOptions):
        pool, last = options.pool_window, options.pool == "max" or options.drop_rate > 0
    return _primitives(x, args, transition_form(pool, args.activation, last))


_register_pooling("transition", _TRANSITION, Arguments, TransitionOptions)
_register_pooling("stem", _ARGUMENTS, Arguments)
_register_pooling("activation", _ACTIVATION, Arguments, ActivationOptions)
CALLS["dense_block"] = register(
    _LIBRARY, "dense_block", _dense_block, _dense_block_setup, _dense_block_formula
)
for _backward in (_dense_block_backward, _dense_block_backward_):
    _name = _backward.__name__.removeprefix("_")
    CALLS[_name] = caller(getattr(torch.ops.dense_ext, _name).default, _backward)


# --- a transition that directly follows its block ---------------------------------------------------------


class Carried(NamedTuple):
    """A block's information about its output X, for a transition that directly follows it."""

    stats: Tensor | None  # X's batch statistics [2, Ct], None if not computed
    group: str  # the process group over which they were taken
    node: Any  # the block's node in the autograd graph if the block keeps only its input, else None


NOTHING_CARRIED = Carried(None, "", None)


def block_node(out: Tensor) -> Any:
    """The autograd node that made ``out`` if it belongs to a block with ``recompute="block"``, else None."""
    node = None if torch.compiler.is_compiling() else out.grad_fn
    options = getattr(node, "options", None)
    return node if isinstance(options, BlockOptions) and options.recompute == "block" else None


def run_transition(
    x: Tensor, args: Arguments, options: TransitionOptions, carried: Carried
) -> tuple[Tensor, Tensor]:
    """Run the operator ``transition`` with what the block before has carried."""
    options = options._replace(known_stats=carried.stats)
    return _run_without_saving(CALLS["transition"], x, (*args, *options), carried.node)


def run_activation(x: Tensor, args: Arguments, stats: Tensor, carried: Carried) -> Tensor:
    """Run the operator ``activation`` on x, whose batch statistics another operator has returned.

    The norm's running statistics are not updated; that other operator's caller does it.
    """
    args = args._replace(conv_weights=[], conv_biases=[])
    rest = (*args, *ActivationOptions(stats))
    return _run_without_saving(CALLS["activation"], x, rest, carried.node)[0]


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same elements; unlike ``is_set_to``, also of fake tensors."""
    same_memory = x.untyped_storage()._cdata == y.untyped_storage()._cdata
    return same_memory and (x.storage_offset(), x.shape, x.stride()) == (
        y.storage_offset(),
        y.shape,
        y.stride(),
    )


def _run_without_saving(operator: Any, x: Tensor, rest: Sequence[Any], node: Any) -> tuple[Tensor, Tensor]:
    """Run an operator; if x is the output of a block that keeps only its input, the operator does not save x.

    Saving x would keep the very buffer that the block frees. Instead, the operator's backward makes the
    block recompute x; the block's own backward, which runs next, uses the result too. Hooks for saved tensors
    that are active get all other tensors. Where such hooks are forbidden, x is saved.

    Args:
        operator: an operator that takes x and ``rest``.
        node: the block's node in the autograd graph; None if x is not the output of such a block.
    """
    autograd: Any = torch._C._autograd  # these functions are absent from torch's stubs
    if node is None or not autograd._saved_tensors_hooks_is_enabled():
        return operator(x, *rest)
    others = autograd._top_saved_tensors_default_hooks(False)
    # The hooks live as long as the graph, so they must not hold x; `output` is cleared below.
    output = [x.detach()]

    def pack(tensor: Tensor) -> tuple[Any, int] | None:
        if _is_same(tensor, output[0]):
            return None
        return (others[0](tensor), 0) if others else (tensor, tensor._version)

    def unpack(packed: tuple[Any, int] | None) -> Tensor:
        if packed is None:
            return recomputed_output(node)[1]
        tensor, version = packed
        if others:
            return others[1](tensor)
        if tensor._version != version:  # autograd checks only tensors that no hook has packed
            raise RuntimeError(
                f"a tensor {tuple(tensor.shape)} of a transition, needed for gradient computation, has been "
                f"modified by an inplace operation: it is at version {tensor._version}, expected {version}"
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = operator(x, *rest)
    output.clear()
    return result


register_formulas()
