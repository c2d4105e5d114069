"""Decides whether a gradient passed to a backward is exclusive to it, so that it may be overwritten.

The largest block's gradient is the largest tensor of a training step. Copying it before accumulating into it
would raise the step's peak memory by a quarter. Autograd does not report what else holds a gradient (a hook,
the user, another node). But every holder shows in one of four counts: the references to the Python objects of
the tensor and of its storage, to the tensor, and to the storage. They are compared with the counts of a
gradient known to be exclusive, which are taken once on the same code path. If any differs, if the memory is
not PyTorch's own, or if this PyTorch lacks the counters, the gradient counts as shared and the caller copies
it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

Counts = tuple[int, int, int, int]

# The counts of a gradient known to be exclusive, once a thread has taken them.
_exclusive: Counts | None = None
_calibration = threading.Lock()
_probing = threading.local()


def _counts(tensor: Tensor) -> Counts:
    storage = tensor.untyped_storage()
    tensor_uses = tensor._use_count()  # type: ignore[attr-defined]  # absent from torch's stubs
    storage_uses = torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(tensor), sys.getrefcount(storage), tensor_uses, storage_uses


def _counts_are_exact() -> bool:
    """Whether this PyTorch has the counters, and this Python's reference counts are exact (it has a GIL)."""
    with_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return hasattr(torch._C, "_storage_Use_Count") and with_gil


def _counts_of(probe: Callable[[], None]) -> Counts | None:
    _probing.active, _probing.counts = True, None
    probe()
    return _probing.counts


def is_exclusive(grad: Tensor, probe: Callable[[], None]) -> bool:
    """Whether only the calling backward holds ``grad``.

    Args:
        grad: the gradient, as the caller received it.
        probe: runs a backward that reaches this very call with an exclusive gradient. It runs in a thread of
            its own, where no mode or hook of this one keeps gradients and makes the counts too high. In the
            meantime, gradients in other threads count as shared.
    """
    global _exclusive
    if type(grad) is not Tensor or not _counts_are_exact():
        return False
    if getattr(_probing, "active", False):  # this is the probe's own call
        _probing.counts = _counts(grad)
        return True
    if _exclusive is None:
        if sys.gettrace() is not None or sys.getprofile() is not None:  # a debugger may hold what it looks at
            return False
        if not _calibration.acquire(blocking=False):
            return False
        try:
            with ThreadPoolExecutor(1) as executor:
                _exclusive = executor.submit(_counts_of, probe).result()
        finally:
            _calibration.release()
    return _counts(grad) == _exclusive and _is_torchs_memory(grad)


def _is_torchs_memory(tensor: Tensor) -> bool:
    """Whether PyTorch has allocated the memory, for this process alone: NumPy and DLPack show in no count."""
    storage = tensor.untyped_storage()
    # Of CUDA's storages, all say that they are shared.
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())
