"""Whether a gradient handed to a backward is ours alone, so that it may be overwritten.

The largest block's gradient is the largest tensor of a training step; copying it before
accumulating into it would raise the step's peak memory by a quarter. Autograd does not say who
else holds a gradient (a hook, the user, another node), but every holder shows in one of three
counts: references to the Python object, to the tensor, to the storage. They are compared with the
counts of a gradient known to be exclusive, taken once on the same path. Any difference, or a PyTorch
without these counters, means "not exclusive": then the caller copies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

Counts = tuple[int, int, int]

_exclusive: Counts | None = None
_probed = False


def _counts(tensor: Tensor) -> Counts:
    storage = tensor.untyped_storage()
    tensor_uses = tensor._use_count()  # type: ignore[attr-defined]  # absent from torch's stubs
    return sys.getrefcount(tensor), tensor_uses, torch._C._storage_Use_Count(storage._cdata)


def is_exclusive(grad: Tensor, probe: Callable[[], None]) -> bool:
    """Whether nobody but the calling backward can see ``grad``.

    Args:
        grad: the gradient, as the caller received it.
        probe: runs a backward that reaches this very call with a gradient nobody else holds.
            Called once in the life of the process.
    """
    global _exclusive, _probed
    if type(grad) is not Tensor or not hasattr(torch._C, "_storage_Use_Count"):
        return False
    if not _probed:
        _probed = True
        probe()
    counts = _counts(grad)
    if _exclusive is None:  # this is the probe's own call
        _exclusive = counts
    return counts == _exclusive
