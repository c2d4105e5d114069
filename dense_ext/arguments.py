"""The operators' arguments and the gradients they return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The gradients of x, norm_weights, norm_biases, conv_weights and conv_biases; a convolution's weight gradient
# is empty if not needed.
Gradients = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


TENSOR_LISTS = 6  # the first fields of Arguments
TRAINABLE_LISTS = 4  # those of them that have gradients


class Arguments(NamedTuple):
    """The arguments that every operator takes after its activations: its norms, convolutions and activation.

    ``running_means`` and ``running_vars`` have an entry for each norm whose ``batch_stats`` is False, in the
    norms' order. For the stem, which has no convolution, ``conv_weights`` is empty. ``conv_biases`` has an
    entry for each convolution, or none at all.
    """

    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    conv_weights: list[Tensor]
    conv_biases: list[Tensor]
    running_means: list[Tensor]
    running_vars: list[Tensor]
    eps: list[float]
    batch_stats: list[bool]
    activation: str  # as :func:`dense_ext.activations.activation` takes it
    group: str  # the process group that shares batch statistics; "" if each process has its own
    counts: Tensor | None  # with a group: the number of values per channel in each process [W]
    backend: str

    @property
    def tensors(self) -> tuple[list[Tensor], ...]:
        lists: Any = self[:TENSOR_LISTS]
        return lists

    def bias(self, index: int) -> Tensor | None:
        """The bias of convolution ``index``."""
        return self.conv_biases[index] if self.conv_biases else None


class BlockOptions(NamedTuple):
    """The further arguments that only a dense block takes."""

    convs_per_layer: int  # 2 with a bottleneck, else 1
    dilation: int  # of each layer's last convolution
    dropout_seeds: Tensor | None  # one int64 for each convolution, on the CPU
    drop_rates: list[float]  # after each convolution of a layer; 0 when dropout is off
    drops_channels: bool  # whether dropout drops whole channels of an image
    recompute: str


class TransitionOptions(NamedTuple):
    """The further arguments that only a transition takes."""

    pool: str  # "average" or "max"
    pool_window: list[int]  # also its stride
    dropout_seed: Tensor | None  # one int64, on the CPU
    drop_rate: float  # between convolution and pool
    drops_channels: bool
    known_stats: Tensor | None  # the input's batch statistics if the block before has computed them


class ActivationOptions(NamedTuple):
    """The further argument that only norm and activation without a pool take."""

    known_stats: Tensor | None  # the input's batch statistics; None if the norm uses running statistics


# A transition's options, or those of norm and activation alone; None for the stem.
PoolingOptions = TransitionOptions | ActivationOptions | None


def unpack(flat: Sequence[Any], *kinds: Any) -> list[Any]:
    """An operator's flat arguments as these named tuples, followed by the arguments that are left.

    The first of the tuples is Arguments. AOTInductor passes None for an empty list of tensors.
    """
    flat = [*(tensors or [] for tensors in flat[:TENSOR_LISTS]), *flat[TENSOR_LISTS:]]
    found, start = [], 0
    for kind in kinds:
        end = start + len(kind._fields)
        found.append(kind(*flat[start:end]))
        start = end
    return [*found, *flat[start:]]


def zero_gradients(grad_x: Tensor, args: Arguments) -> Gradients:
    """The gradients for an empty batch: zeros."""
    weights, biases, convs, conv_biases = (
        [torch.zeros_like(t) for t in group] for group in args.tensors[:TRAINABLE_LISTS]
    )
    return grad_x, weights, biases, convs, conv_biases


def in_parameter_dtypes(
    args: Arguments,
    grad_x: Tensor,
    norm_weights: Iterable[Tensor],
    norm_biases: Iterable[Tensor],
    convs: Iterable[Tensor | None],
    conv_biases: Iterable[Tensor],
) -> Gradients:
    """The gradients as an operator returns them, those of vectors in their parameters' dtypes."""

    def vectors(gradients: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(gradients, parameters, strict=True)
        return [g if g.dtype == p.dtype else g.to(p.dtype) for g, p in pairs]  # no call for most of hundreds

    return (
        grad_x,
        vectors(norm_weights, args.norm_weights),
        vectors(norm_biases, args.norm_biases),
        [grad_x.new_empty(0) if g is None else g for g in convs],
        vectors(conv_biases, args.conv_biases),
    )


def fake_gradients(grad_x: Tensor, args: Arguments, needs_conv_grad: Sequence[bool]) -> Gradients:
    """Uninitialised gradients of the right shapes and dtypes."""
    convs = [
        torch.empty_like(w) if needed else grad_x.new_empty(0)
        for w, needed in zip(args.conv_weights, needs_conv_grad, strict=True)
    ]
    weights, biases, conv_biases = (
        [torch.empty_like(t) for t in group]
        for group in (args.norm_weights, args.norm_biases, args.conv_biases)
    )
    return grad_x, weights, biases, convs, conv_biases
