"""Casts many tensors in one call, which on a GPU is one launch instead of one for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in ``dtype``, as by :meth:`Tensor.to`; those that have it already are not copied.

    Args:
        tensors: of one device and any shapes and strides, which the results keep.
        dtype: a floating-point dtype.
    """
    # The compiler fuses casts itself.
    if torch.compiler.is_compiling():
        return [tensor.to(dtype) for tensor in tensors]
    found = list(tensors)
    for learned in (False, True):
        chosen = [
            i
            for i, tensor in enumerate(tensors)
            if tensor.dtype != dtype and (tensor.requires_grad and torch.is_grad_enabled()) == learned
        ]
        originals = [tensors[i] for i in chosen]
        if chosen:
            made = _Cast.apply(dtype, *originals) if learned else copies(originals, [dtype] * len(chosen))
            for i, copied in zip(chosen, made, strict=True):
                found[i] = copied
    return found


def copies(
    tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None] | None = None
) -> list[Tensor | None]:
    """Copies of the tensors, each in its own of ``dtypes``, if any; None where there is no tensor."""
    pairs = zip(tensors, dtypes or [None] * len(tensors), strict=True)
    found = [None if t is None else torch.empty_like(t, dtype=dtype) for t, dtype in pairs]
    there = [(to, t) for to, t in zip(found, tensors, strict=True) if to is not None and t is not None]
    if there:
        torch._foreach_copy_([to for to, _ in there], [t for _, t in there])
    return found


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(copies(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a backward pass that can be differentiated again
            pairs = zip(grads, ctx.dtypes, strict=True)
            return None, *(None if grad is None else grad.to(dtype) for grad, dtype in pairs)
        return None, *copies(grads, ctx.dtypes)
