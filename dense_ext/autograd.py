"""Registers the operators' backward with autograd, and saves tensors for it.

:func:`torch.library.register_autograd` would work, but its handling of lists of tensors takes longer than a
block's schedule takes to run. Here each tensor is an argument of its own to autograd.
"""

from __future__ import annotations

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
    setup_context: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
    formula: Callable[[Any, Tensor], Gradients],
) -> None:
    """Make an operator ``dense_ext::name(x, *Arguments, ...)`` differentiable in its first output.

    Args:
        library: the library that defines the operator.
        setup_context: stores on the context what backward needs; called with the context, the operator's
            arguments and its outputs.
        formula: returns the gradients, given the context and the gradient of the first output.
    """
    operator = getattr(torch.ops.dense_ext, name).default

    def run(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, *rest)

    def forward(ctx: Any, x: Tensor, sizes: list[int], rest: tuple[Any, ...], *tensors: Tensor) -> Any:
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
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_x, *groups = formula(ctx, grad)
        if ctx.contiguous and ctx.needs_input_grad[0]:
            grad_x = grad_x.contiguous()
        gradients = [grad_x, None, None, *(gradient for group in groups for gradient in group)]
        gradients += [None] * (len(ctx.needs_input_grad) - len(gradients))  # of running statistics
        return tuple(g if n else None for g, n in zip(gradients, ctx.needs_input_grad, strict=True))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"dense_ext_{name}", (torch.autograd.Function,), methods)

    def differentiable(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        # AOTInductor passes None for an empty list.
        lists = [list(group or []) for group in rest[:TENSOR_LISTS]]
        rest = (*lists, *rest[TENSOR_LISTS:])
        if torch.is_grad_enabled() and _trains_only_biases(lists):
            # Eager's backward does not read biases, so that an optimizer may write into them before it.
            for biases in (lists[1], lists[3]):
                biases[:] = [bias.clone() for bias in biases]
        tensors = [tensor for group in lists for tensor in group]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
            return function.apply(x, [len(group) for group in lists], rest[TENSOR_LISTS:], *tensors)
        return run(x, *rest)

    library.impl(name, differentiable, "Autograd")


def _trains_only_biases(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether some of an operator's biases require a gradient, and none of its weights."""
    norm_weights, norm_biases, conv_weights, conv_biases, *_ = lists
    weights, biases = (*norm_weights, *conv_weights), (*norm_biases, *conv_biases)
    return not any(t.requires_grad for t in weights) and any(t.requires_grad for t in biases)


def needs_conv_grad(ctx: Any) -> tuple[bool, ...]:
    """For each of an operator's convolutions, whether its weight gradient is needed."""
    sizes, (_, _, _, *tensors) = ctx.list_sizes, ctx.needs_input_grad
    return tuple(grouped(tensors, sizes)[2])


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
