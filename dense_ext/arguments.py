"""The operators' arguments and the gradients they return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch_norm import in_dtype

# The gradients of x, norm_weights, norm_biases and conv_weights; a convolution's is empty if not needed.
Gradients = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


TENSOR_LISTS = 5  # the first fields of Arguments


class Arguments(NamedTuple):
    """The arguments that every operator takes after its activations: constants of its norms and convolutions.

    ``running_means`` and ``running_vars`` have an entry for each norm whose ``batch_stats`` is False, in the
    norms' order. For the stem, which has no convolution, ``conv_weights`` is empty.
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
    """The further arguments that only a dense block takes."""

    dropout_seeds: Tensor | None  # [L] int64 on the CPU
    drop_rate: float  # 0 when dropout is off
    recompute: str


def zero_gradients(grad_x: Tensor, args: Arguments) -> Gradients:
    """The gradients for an empty batch: zeros."""
    weights, biases, convs = ([torch.zeros_like(t) for t in group] for group in args.tensors[:3])
    return grad_x, weights, biases, convs


def in_parameter_dtypes(
    args: Arguments,
    grad_x: Tensor,
    norm_weights: Iterable[Tensor],
    norm_biases: Iterable[Tensor],
    convs: Iterable[Tensor | None],
) -> Gradients:
    """The gradients as an operator returns them, with the norms' gradients in their parameters' dtypes."""
    return (
        grad_x,
        [in_dtype(g, w.dtype) for g, w in zip(norm_weights, args.norm_weights, strict=True)],
        [in_dtype(g, b.dtype) for g, b in zip(norm_biases, args.norm_biases, strict=True)],
        [grad_x.new_empty(0) if g is None else g for g in convs],
    )


def fake_gradients(grad_x: Tensor, args: Arguments, needs_conv_grad: Sequence[bool]) -> Gradients:
    """Uninitialised gradients of the right shapes and dtypes."""
    convs = [
        torch.empty_like(w) if needed else grad_x.new_empty(0)
        for w, needed in zip(args.conv_weights, needs_conv_grad, strict=True)
    ]
    weights, biases = ([torch.empty_like(t) for t in group] for group in args.tensors[:2])
    return grad_x, weights, biases, convs
