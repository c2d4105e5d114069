"""What the operators take and give back, and how autograd's context carries it to the backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import requested

# Of x, norm_weights, norm_biases and conv_weights; a convolution's is [0] if not needed.
Gradients = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


class Arguments(NamedTuple):
    """What every operator takes after its activations: constants of the norms and convolutions.

    ``running_means`` and ``running_vars`` have an entry for each norm whose ``batch_stats`` is
    False, in the norms' order. The stem has no convolution.
    """

    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    conv_weights: list[Tensor]
    running_means: list[Tensor]
    running_vars: list[Tensor]
    eps: list[float]
    batch_stats: list[bool]
    backend: str

    @property
    def tensors(self) -> tuple[list[Tensor], ...]:
        return self[:5]


class BlockOptions(NamedTuple):
    """What only a dense block takes."""

    dropout_seeds: Tensor | None  # [L] int64 on the CPU
    drop_rate: float  # 0 when dropout is off
    recompute: str


def zero_gradients(grad_x: Tensor, args: Arguments) -> Gradients:
    """The gradients of an empty batch."""
    weights, biases, convs = ([torch.zeros_like(t) for t in group] for group in args.tensors[:3])
    return grad_x, weights, biases, convs


def in_parameter_dtypes(
    args: Arguments,
    grad_x: Tensor,
    norm_weights: Iterable[Tensor],
    norm_biases: Iterable[Tensor],
    convs: Iterable[Tensor | None],
) -> Gradients:
    """The gradients as an operator returns them, the norms' in their parameters' dtypes."""
    return (
        grad_x,
        [g.to(w.dtype) for g, w in zip(norm_weights, args.norm_weights, strict=True)],
        [g.to(b.dtype) for g, b in zip(norm_biases, args.norm_biases, strict=True)],
        [grad_x.new_empty(0) if g is None else g for g in convs],
    )


def fake_gradients(grad_x: Tensor, args: Arguments, needs_conv_grad: Sequence[bool]) -> Gradients:
    """Unwritten gradients of the right shapes and dtypes."""
    convs = [
        torch.empty_like(w) if needed else grad_x.new_empty(0)
        for w, needed in zip(args.conv_weights, needs_conv_grad, strict=True)
    ]
    weights, biases = ([torch.empty_like(t) for t in group] for group in args.tensors[:2])
    return grad_x, weights, biases, convs


# --- autograd's context ----------------------------------------------------------------------


def refuse_double_backward() -> None:
    """Raise RuntimeError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "dense_ext has no second derivatives: backward with create_graph=True is not supported; "
            "dense_ext.restore(model) gives back modules that have them"
        )


def save(ctx: Any, args: Arguments, *activations: Tensor | None) -> None:
    """Save an operator's tensors, and what else its backward needs.

    The backward runs on the backend the forward was asked for, whatever is asked for by then.
    """
    ctx.set_materialize_grads(False)
    ctx.constants = (args.eps, args.batch_stats, requested(args.backend))
    ctx.list_sizes = [len(group) for group in args.tensors]
    ctx.save_for_backward(*activations, *(t for group in args.tensors for t in group))


def load(ctx: Any) -> tuple[Any, ...]:
    """The arguments and activations that `save` kept, as ``(args, *activations)``."""
    saved = list(ctx.saved_tensors)
    groups: list[Any] = []
    for size in reversed(ctx.list_sizes):
        split = len(saved) - size
        groups.insert(0, saved[split:])
        del saved[split:]
    return Arguments(*groups, *ctx.constants), *saved


def no_gradients(ctx: Any) -> tuple[Any, ...]:
    """None for everything, in the operator's argument structure."""
    return (None, *([None] * size for size in ctx.list_sizes), None, None, None)


def returned(ctx: Any, gradients: Gradients) -> tuple[Any, ...]:
    """The gradients in the operator's argument structure, None where nobody asked."""
    grad_x, *lists = gradients
    needed = ctx.needs_input_grad
    wanted = [
        [g if n else None for g, n in zip(grads, flags, strict=True)]
        for grads, flags in zip(lists, needed[1:4], strict=True)
    ]
    unused = [[None] * size for size in ctx.list_sizes[3:]]
    return (grad_x if needed[0] else None, *wanted, *unused, None, None, None)
