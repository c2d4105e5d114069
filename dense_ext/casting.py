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
            copies = _Cast.apply(dtype, *originals) if learned else _copies(originals, [dtype] * len(chosen))
            for i, copied in zip(chosen, copies, strict=True):
                found[i] = copied
    return found


def _copies(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(_copies(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a backward pass that can be differentiated again
            pairs = zip(grads, ctx.dtypes, strict=True)
            return None, *(None if grad is None else grad.to(dtype) for grad, dtype in pairs)
        found = [(grad, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True) if grad is not None]
        done = iter(_copies(*zip(*found, strict=True)) if found else ())
        return None, *(None if grad is None else next(done) for grad in grads)
