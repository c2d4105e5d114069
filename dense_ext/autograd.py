"""Registers the operators' backward with autograd, saves tensors for it, and calls the operators.

:func:`torch.library.register_autograd` would work, but its handling of lists of tensors takes longer than a
block's schedule takes to run. Here each tensor is an argument of its own to autograd.

PyTorch's dispatcher converts hundreds of tensors in every call. So in plain eager mode an operator's
functions are called without it. All that sees the call in between (the compiler, dispatch modes, subclasses
of tensors, profilers and so on) gets the operator.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import TENSOR_LISTS, Arguments, Gradients
from .backends import requested


def register(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
    formula: Callable[[Any, Tensor], Gradients],
) -> Callable[..., tuple[Tensor, ...]]:
    """Make an operator ``dense_ext::name(x, *Arguments, ...)`` differentiable in its first output.

    Args:
        library: the library that defines the operator.
        kernel: the operator's kernel on every device.
        setup_context: stores on the context what backward needs; called with the context, the operator's
            arguments and its outputs.
        formula: returns the gradients, given the context and the gradient of the first output.

    Returns:
        A function that calls the operator.
    """
    operator = getattr(torch.ops.dense_ext, name).default

    def forward(
        ctx: Any, x: Tensor, run: Any, sizes: list[int], rest: tuple[Any, ...], *tensors: Tensor
    ) -> Any:
        arguments = (x, *grouped(tensors, sizes), *rest)
        outputs = run(*arguments)
        ctx.set_materialize_grads(False)
        ctx.list_sizes = sizes
        # Eager's gradient has the layout of x, which is channels_last if the channels are next to each other.
        ctx.contiguous = x.stride(1) != 1
        ctx.mark_non_differentiable(*outputs[1:])
        setup_context(ctx, arguments, outputs)
        return outputs

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needed)
        grad_x, *groups = formula(ctx, grad)
        if ctx.contiguous and needed[0]:
            grad_x = grad_x.contiguous()
        gradients = [grad_x, None, None, None, *itertools.chain.from_iterable(groups)]
        gradients += [None] * (len(needed) - len(gradients))  # of running statistics
        if not all(needed[4:]):
            return tuple(g if n else None for g, n in zip(gradients, needed, strict=True))
        gradients[0] = grad_x if needed[0] else None
        return tuple(gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"dense_ext_{name}", (torch.autograd.Function,), methods)

    def differentiable(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def call(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            # AOTInductor passes None for an empty list.
            lists = [list(group or []) for group in rest[:TENSOR_LISTS]]
            rest = (*lists, *rest[TENSOR_LISTS:])
            recording = torch.is_grad_enabled() and _records()
            if recording and _trains_only_biases(lists):
                # Eager's backward does not read biases, so that an optimizer may write into them before it.
                for biases in (lists[1], lists[3]):
                    biases[:] = [bias.clone() for bias in biases]
            tensors = list(itertools.chain.from_iterable(lists))
            if recording and any(t.requires_grad for t in (x, *tensors)):
                return function.apply(x, run, [len(group) for group in lists], rest[TENSOR_LISTS:], *tensors)
            return run(x, *rest)

        return call

    library.impl(name, differentiable(_below_autograd(operator)), "Autograd")
    return _caller(operator, differentiable(_below_autograd(kernel)))


def caller(operator: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls an operator without a derivative, in plain eager mode by its kernel.

    Args:
        operator: takes tensors, followed by Arguments and others.
        kernel: the operator's kernel on every device.
    """
    return _caller(operator, _below_autograd(kernel))


def _caller(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return (function if _is_eager(arguments) else operator)(*arguments)

    return call


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, without autograd's part of each operator that it calls."""

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)

    return run


def _records() -> bool:
    """Whether autograd is not excluded, as it is inside an operator's kernel."""
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradOther)


_autograd: Any = torch._C._autograd  # its functions are absent from torch's stubs
# The types of an operator's arguments, and of what is in its lists, where nothing else sees the call.
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, bool, int, float, str, type(None)))


@functools.cache
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of a device's plain tensors: those for autograd, and those of inference mode."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


def _is_eager(arguments: Sequence[Any]) -> bool:
    """Whether nothing but PyTorch's kernels would see an operator's call with these arguments."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or _autograd._profiler_enabled()
    ):
        return False
    types: set[type] = set()
    for argument in arguments:
        if type(argument) is list:
            types.update(map(type, argument))
            continue
        types.add(type(argument))
        # Not those of each parameter, which takes longer: their other classes are found by their types.
        if isinstance(argument, Tensor):
            device = argument.device.type
            if device == "meta" or torch._C._dispatch_keys(argument).raw_repr() not in _plain_keys(device):
                return False
    return types <= _PLAIN_TYPES


def _trains_only_biases(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether some of an operator's biases require a gradient, and none of its weights."""
    norm_weights, norm_biases, conv_weights, conv_biases, *_ = lists
    weights, biases = (*norm_weights, *conv_weights), (*norm_biases, *conv_biases)
    return not any(t.requires_grad for t in weights) and any(t.requires_grad for t in biases)


def needs_conv_grad(ctx: Any) -> list[bool]:
    """For each of an operator's convolutions, whether its weight gradient is needed."""
    sizes, (_, _, _, _, *tensors) = ctx.list_sizes, ctx.needs_input_grad
    return grouped(tensors, sizes)[2]


def save(ctx: Any, args: Arguments, *activations: Tensor | None) -> None:
    """Save an operator's tensors, and the constants that its backward needs.

    The backward runs on the backend that was requested for the forward, even if another is requested by then.
    """
    ctx.constants = (*args[TENSOR_LISTS:-1], requested(args.backend))
    ctx.save_for_backward(*activations, *(tensor for group in args.tensors for tensor in group))


def load(ctx: Any) -> tuple[Any, ...]:
    """The arguments and activations that `save` kept, as ``(args, *activations)``."""
    saved = ctx.saved_tensors
    activations = len(saved) - sum(ctx.list_sizes)
    lists: Any = grouped(saved[activations:], ctx.list_sizes)
    return Arguments(*lists, *ctx.constants), *saved[:activations]


def grouped(members: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """The members split, in their order, into lists of these sizes."""
    ends = itertools.accumulate(sizes)
    return [list(members[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
