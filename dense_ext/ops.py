"""The operators autograd, torch.compile and export see: one per dense block, transition and stem.

Each is a functional operator with a fake kernel and a registered backward; inside, it runs the
schedule over the primitives of a backend. Running statistics are not updated here: the operators
return the batch's, so that a recomputation cannot count a step twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import schedule, transition
from .arguments import (
    Arguments,
    BlockOptions,
    Gradients,
    fake_gradients,
    in_parameter_dtypes,
    zero_gradients,
)
from .autograd import load, needs_conv_grad, register, save
from .backends import Primitives, requested, select
from .backends.base import accumulate_dtype
from .backends.volume import for_volumes
from .batch_norm import in_dtype, values_per_channel
from .ownership import is_exclusive
from .schedule import Block, Layer, Norm

_LIBRARY = torch.library.Library("dense_ext", "FRAGMENT")


_ARGUMENTS = (
    "Tensor[] norm_weights, Tensor[] norm_biases, Tensor[] conv_weights, Tensor[] running_means, "
    "Tensor[] running_vars, float[] eps, bool[] batch_stats, str backend"
)
_BLOCK = f"{_ARGUMENTS}, Tensor? dropout_seeds, float drop_rate, str recompute"
_GRADIENTS = "(Tensor, Tensor[], Tensor[], Tensor[])"


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator and make the decorated function its kernel on every device."""
    _LIBRARY.define(schema)

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")
        return kernel

    return decorate


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"dense_ext::{name}", lib=_LIBRARY)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device; False where the device knows no autocast."""
    device = x.device.type
    # The compiler cannot trace the question whether there is autocast; what it compiles for has it.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)  # type: ignore[attr-defined]
    return available and torch.is_autocast_enabled(device)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off inside a kernel: its inputs already have the types to compute in."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def _primitives(x: Tensor, args: Arguments) -> Primitives:
    asked = requested(args.backend), x.device.type, x.dtype
    primitives, pixels = select(*asked), values_per_channel(x)
    if pixels > primitives.most_pixels:  # looked up by their number only where that can matter
        primitives = select(*asked, pixels)
    return for_volumes(primitives) if x.dim() == 5 else primitives


def _norms(x: Tensor, args: Arguments) -> list[Norm]:
    dtype = accumulate_dtype(x.dtype)
    running = iter(zip(args.running_means, args.running_vars, strict=True))
    norms = []
    for weight, bias, eps, batch in zip(
        args.norm_weights, args.norm_biases, args.eps, args.batch_stats, strict=True
    ):
        frozen = None
        if not batch:
            mean, var = next(running)
            frozen = in_dtype(mean, dtype), in_dtype(var, dtype)
        norms.append(Norm(in_dtype(weight, dtype), in_dtype(bias, dtype), eps, frozen))
    return norms


def _block(x: Tensor, in_channels: int, args: Arguments, options: BlockOptions) -> Block:
    norms, convs = _norms(x, args), args.conv_weights
    per_layer = 2 if convs[0].shape[-1] == 1 else 1
    layers = [
        Layer(norms[i : i + per_layer], convs[i : i + per_layer]) for i in range(0, len(convs), per_layer)
    ]
    bottleneck = convs[0].shape[0] if per_layer == 2 else 0
    return Block(
        layers, in_channels, convs[-1].shape[0], bottleneck, options.drop_rate, options.dropout_seeds
    )


def _is_channels_last(x: Tensor) -> bool:
    """Whether x lies in dense channels_last memory; exact also where a size is 1."""
    _, c, *pixels = x.shape
    strides = [c]  # from the last dimension to the first
    for length in reversed(pixels):
        strides.append(strides[-1] * length)
    return x.stride() == (strides.pop(), 1, *reversed(strides))


def _channels_last(x: Tensor) -> Tensor:
    """The tensor in dense channels_last memory; itself if it is."""
    if _is_channels_last(x):
        return x
    return torch.empty_like(x, memory_format=schedule.channels_last(x)).copy_(x)


def remember_statistics(x: Tensor, stats: Tensor) -> None:
    """Let the batch statistics [2, C] of x travel with it, to a transition that reads x as it is now.

    Not in compiled code: the compiler may put other values into x's memory and leave its version. Not
    with a subclass of Tensor: some hand their attributes on to whatever is computed from them.
    """
    if type(x) is Tensor and not torch.compiler.is_compiling() and not x.is_inference():
        x._dense_ext_statistics = stats, x._version  # type: ignore[attr-defined]


def known_statistics(x: Tensor) -> Tensor | None:
    """The statistics remembered for x, unless x has been written since."""
    stats, version = getattr(x, "_dense_ext_statistics", (None, None))
    return stats if stats is not None and x._version == version else None


# --- dense block: (x) -> (X, batch statistics, z) ----------------------------------------------------


@_operator(f"dense_block(Tensor x, {_BLOCK}) -> (Tensor, Tensor, Tensor)")
def _dense_block(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    args, options = Arguments(*rest[:8]), BlockOptions(*rest[8:])
    block = _block(x, x.shape[1], args, options)
    with _without_autocast(x):
        return schedule.forward(_primitives(x, args), block, x, options.recompute == "none")


@_fake("dense_block")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    args, options = Arguments(*rest[:8]), BlockOptions(*rest[8:])
    block = _block(x, x.shape[1], args, options)
    return schedule.empty_outputs(block, x, options.recompute == "none")


_BLOCK_BACKWARD = (
    f"Tensor output, Tensor stats, Tensor z, {_BLOCK}, int in_channels, bool[] needs_conv_grad) "
    f"-> {_GRADIENTS}"
)


@_operator(f"dense_block_backward_(Tensor(a!) grad, {_BLOCK_BACKWARD}")
def _dense_block_backward_(grad: Tensor, output: Tensor, stats: Tensor, z: Tensor, *rest: Any) -> Gradients:
    """The gradients; ``grad``, in dense channels_last memory, is used up as the schedule's buffer G."""
    args, options = Arguments(*rest[:8]), BlockOptions(*rest[8:11])
    in_channels, needs_conv_grad = rest[11:]
    if grad.shape[0] == 0:
        return zero_gradients(grad.new_empty(0, in_channels, *grad.shape[2:]), args)
    block = _block(output, in_channels, args, options)
    with _without_autocast(output):
        g = schedule.backward(_primitives(output, args), block, grad, output, z, stats, needs_conv_grad)
    return in_parameter_dtypes(args, g.x, g.norm_weights, g.norm_biases, g.convs)


@_operator(f"dense_block_backward(Tensor grad, {_BLOCK_BACKWARD}")
def _dense_block_backward(grad: Tensor, *rest: Any) -> Gradients:
    buffer = torch.empty_like(grad, memory_format=schedule.channels_last(grad)).copy_(grad)
    return _dense_block_backward_(buffer, *rest)


def _dense_block_backward_fake(
    grad: Tensor, output: Tensor, stats: Tensor, z: Tensor, *rest: Any
) -> Gradients:
    in_channels, needs_conv_grad = rest[11:]
    grad_x = schedule.empty_like(output, in_channels)
    return fake_gradients(grad_x, Arguments(*rest[:8]), needs_conv_grad)


_fake("dense_block_backward_")(_dense_block_backward_fake)
_fake("dense_block_backward")(_dense_block_backward_fake)


def _dense_block_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, args, options = inputs[0], Arguments(*inputs[1:9]), BlockOptions(*inputs[9:])
    out, stats, z = output
    ctx.in_channels = x.shape[1]
    ctx.recomputed = ctx.loaded = None
    kept = x if options.recompute == "block" else out
    save(ctx, args, kept, stats, z, options.dropout_seeds)
    ctx.options = options._replace(dropout_seeds=None)


def _dense_block_formula(ctx: Any, grad: Tensor) -> Gradients:
    recomputed = recomputed_output(ctx) if ctx.options.recompute == "block" else None
    args, kept, stats, z, seeds = ctx.loaded or load(ctx)
    output = kept if recomputed is None else recomputed
    ctx.recomputed = ctx.loaded = None
    # The schedule accumulates into the gradient it is given; where others may see it, into a copy.
    backward = torch.ops.dense_ext.dense_block_backward
    if is_exclusive(grad, _probe_ownership) and _is_channels_last(grad):
        backward = torch.ops.dense_ext.dense_block_backward_
    options = ctx.options._replace(dropout_seeds=seeds)
    return backward(grad, output, stats, z, *args, *options, ctx.in_channels, needs_conv_grad(ctx))


def recomputed_output(ctx: Any) -> Tensor:
    """X of a block that kept only its input, computed again; kept on ``ctx`` for its own backward.

    What was saved is loaded once, since checkpointing around the block allows no second time.
    """
    if ctx.recomputed is None:
        args, x, _, _, seeds = ctx.loaded = load(ctx)
        options = BlockOptions(seeds, ctx.options.drop_rate, "bottleneck")
        with torch.no_grad():
            ctx.recomputed, _, _ = torch.ops.dense_ext.dense_block(x, *args, *options)
    return ctx.recomputed


def _probe_ownership() -> None:
    """A one-layer block's backward with a gradient that nobody else holds."""
    with torch.enable_grad():
        x = torch.ones(1, 1, 1, 1, requires_grad=True)
        one, zero = torch.ones(1), torch.zeros(1)
        args = Arguments([one], [zero], [torch.ones(1, 1, 3, 3)], [zero], [one], [1.0], [False], "reference")
        out, _, _ = torch.ops.dense_ext.dense_block(x, *args, None, 0.0, "bottleneck")
        (out * 2).sum().backward()


# --- transition and stem: (x) -> (y, batch statistics) ------------------------------------------------


def _norm_and_conv(x: Tensor, args: Arguments) -> tuple[Norm, Tensor | None]:
    return _norms(x, args)[0], (args.conv_weights[0] if args.conv_weights else None)


def _pooling_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    args = Arguments(*rest)
    with _without_autocast(x):
        known = known_statistics(x)
        return transition.forward(_primitives(x, args), *_norm_and_conv(x, args), _channels_last(x), known)


def _pooling_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return transition.empty_outputs(_norm_and_conv(x, Arguments(*rest))[1], x)


def _pooling_backward(grad: Tensor, x: Tensor, stats: Tensor, *rest: Any) -> Gradients:
    args, needs_conv_grad = Arguments(*rest[:8]), rest[8]
    if x.shape[0] == 0:
        return zero_gradients(torch.empty_like(x), args)
    norm, conv = _norm_and_conv(x, args)
    with _without_autocast(x):
        grad_x, grad_weight, grad_bias, grad_conv = transition.backward(
            _primitives(x, args),
            norm,
            conv,
            _channels_last(grad),
            _channels_last(x),
            stats,
            any(needs_conv_grad),
        )
    convs = [] if conv is None else [grad_conv]
    return in_parameter_dtypes(args, grad_x, [grad_weight], [grad_bias], convs)


def _pooling_backward_fake(grad: Tensor, x: Tensor, stats: Tensor, *rest: Any) -> Gradients:
    grad_x = torch.empty_like(x, memory_format=schedule.channels_last(x))
    return fake_gradients(grad_x, Arguments(*rest[:8]), rest[8])


def _pooling_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, args = inputs[0], Arguments(*inputs[1:])
    save(ctx, args, x, output[1])


def _pooling_formula(backward: str) -> Callable[[Any, Tensor], Gradients]:
    def formula(ctx: Any, grad: Tensor) -> Gradients:
        args, x, stats = load(ctx)
        return getattr(torch.ops.dense_ext, backward)(grad, x, stats, *args, needs_conv_grad(ctx))

    return formula


for _name in ("transition", "stem"):
    _operator(f"{_name}(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor)")(_pooling_forward)
    _fake(_name)(_pooling_fake)
    _operator(
        f"{_name}_backward(Tensor grad, Tensor x, Tensor stats, {_ARGUMENTS}, bool[] needs_conv_grad) "
        f"-> {_GRADIENTS}"
    )(_pooling_backward)
    _fake(f"{_name}_backward")(_pooling_backward_fake)
    register(_LIBRARY, _name, _pooling_setup, _pooling_formula(f"{_name}_backward"))
register(_LIBRARY, "dense_block", _dense_block_setup, _dense_block_formula)


# --- a transition after a block that keeps only its input ----------------------------------------------


def run_transition(x: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    """The operator ``transition``; after a block with ``recompute="block"`` it does not keep x.

    It would keep the very buffer that the block lets go. Instead its backward has the block compute
    x again, and leaves it for the block's own backward, which comes next.
    """
    operator = torch.ops.dense_ext.transition
    node = None if torch.compiler.is_compiling() else x.grad_fn
    options = getattr(node, "options", None)
    if not isinstance(options, BlockOptions) or options.recompute != "block":
        return operator(x, *args)
    # The hooks live as long as the graph: what pack compares with must not.
    output = [x.detach()]

    def pack(tensor: Tensor) -> Tensor | None:
        return None if tensor.is_set_to(output[0]) else tensor

    def unpack(packed: Tensor | None) -> Tensor:
        return recomputed_output(node) if packed is None else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = operator(x, *args)
    output.clear()
    return result
