"""The primitives in Triton."""

from __future__ import annotations

from ..base import Backend, Unavailable


def load() -> Backend:
    """The backend; where Triton can't be imported, one that says why."""
    try:
        from .backend import TritonBackend
    except ImportError as error:
        return Unavailable("triton", f"Triton can't be imported: {error}")
    return TritonBackend()
