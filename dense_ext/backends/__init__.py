"""The backends, and the choice of the one that runs each primitive.

For each primitive, ``auto`` takes the first backend that can run it, in the order of
:mod:`dense_ext.backends.preference`. A backend that was requested by name runs every primitive, or the call
raises the reason why it can't.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from . import preference
from .base import Backend
from .cpu import CPUBackend
from .cuda import CUDABackend
from .preference import PREFERENCE
from .reference import ReferenceBackend
from .table import BLOCK_PRIMITIVES, PRIMITIVES, THROUGH_NORM
from .triton import TritonBackend

CPU, CUDA = CPUBackend(), CUDABackend()
BACKENDS: dict[str, Backend] = {b.name: b for b in (CPU, TritonBackend(), CUDA, ReferenceBackend())}

ENVIRONMENT_VARIABLE = "DENSE_EXT_BACKEND"

_forced: ContextVar[str | None] = ContextVar("dense_ext_backend", default=None)


class Primitives:
    """The primitives for one block, each bound to the backend that runs it."""

    def __init__(self, table: dict[str, Backend]) -> None:
        self.table = table
        for primitive, backend in table.items():
            setattr(self, primitive, getattr(backend, primitive))
        for name, primitive in THROUGH_NORM.items():
            setattr(self, name, getattr(table[primitive], name))
        self.max_pixels = min(backend.max_pixels for backend in table.values())
        self.takes_volumes = all(backend.takes_volumes for backend in table.values())
        # Whole blocks run only where one backend runs all that they consist of.
        of_blocks = {table[name] for name in BLOCK_PRIMITIVES}
        only = of_blocks.pop() if len(of_blocks) == 1 else None
        self.frozen_blocks = only.frozen_blocks if only is not None else None
        self.plain_blocks = only.plain_blocks if only is not None else None
        self.frozen_transitions = table["bn_relu_pool_conv1x1_forward"].frozen_transitions

    def takes_weights(self, dtype: torch.dtype, weights: torch.dtype) -> bool:
        """Whether all of them take weights of that dtype, as :meth:`Backend.takes_weights` says."""
        return all(backend.takes_weights(dtype, weights) for backend in self.table.values())

    def __getattr__(self, name: str) -> Any:  # tells mypy that the attributes set above exist
        raise AttributeError(name)

    def summary(self) -> str:
        """The backends in use, e.g. ``cpu`` or ``cpu, reference (bn_relu_maxpool_forward)``."""
        served: dict[str, list[str]] = {}
        for primitive, backend in self.table.items():
            served.setdefault(backend.name, []).append(primitive)
        main = max(served, key=lambda name: len(served[name]))
        others = [f"{name} ({', '.join(p)})" for name, p in served.items() if name != main]
        return ", ".join([main, *others])


def check_backend_name(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or a backend's name."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")


def requested(name: str = "auto") -> str:
    """The requested backend: ``name``, or for "auto" the one set by `use_backend` or the environment."""
    if name == "auto":
        name = _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    check_backend_name(name)
    return name


@functools.cache
def _warn_not_built(reason: str) -> None:
    """Warn, once per process, that the slow reference backend runs because the fast one is missing."""
    warnings.warn(f"dense_ext runs on its reference backend: {reason}", stacklevel=2)


@functools.lru_cache(maxsize=256)
def select(name: str, device_type: str, dtype: torch.dtype, pixels: int = 0) -> Primitives:
    """The primitives for the backend ``name`` that `requested` returned, and activations of M ``pixels``.

    Raises:
        RuntimeError: no backend that ``name`` allows can run some primitive. The message names the
            primitive and gives each backend's reason.
    """
    device = torch.device(device_type)
    if name == "auto" and device_type == "cpu" and CPU.library.reason is not None:
        _warn_not_built(CPU.library.reason)
    table: dict[str, Backend] = {}
    for primitive in PRIMITIVES:
        candidates = preference.order(primitive, device, dtype) if name == "auto" else (name,)
        reasons = []
        for candidate in candidates:
            backend = BACKENDS[candidate]
            reason = backend.unavailable_reason(primitive, device, dtype)
            if reason is None and pixels > backend.max_pixels:
                reason = f"takes up to {backend.max_pixels} pixels, got {pixels}"
            if reason is None:
                table[primitive] = backend
                break
            reasons.append(f"{candidate}: {reason}")
        else:
            raise RuntimeError(
                f"no backend runs {primitive} for {dtype} on {device_type} ({'; '.join(reasons)})"
            )
    return Primitives(table)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make ``name`` the backend of every module with ``backend="auto"``, in this thread.

    Threads started inside the context, such as DataParallel's, ignore it; the environment variable
    ``DENSE_EXT_BACKEND`` applies to all threads. A backward pass uses its forward pass's backend, even if it
    runs after the context has ended.

    Raises:
        ValueError: there is no backend of that name.
    """
    check_backend_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def unavailable_reasons(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """Maps each backend's name to the reason why it can't run every primitive, or to None if it can.

    Args:
        device: the tensors' device.
        dtype: the tensors' dtype.
    """
    device = torch.device(device)
    result: dict[str, str | None] = {}
    for name, backend in BACKENDS.items():
        reasons = [r for p in PRIMITIVES if (r := backend.unavailable_reason(p, device, dtype))]
        result[name] = reasons[0] if reasons else None
    return result


def available_backends(
    device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> list[str]:
    """The names of the backends that run every primitive, fastest first.

    Args:
        device: the tensors' device; None for any device of this machine.
        dtype: the tensors' dtype.
    """
    devices = [device] if device is not None else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    usable = {
        name for d in devices for name, reason in unavailable_reasons(d, dtype).items() if reason is None
    }
    return [name for name in PREFERENCE if name in usable]
