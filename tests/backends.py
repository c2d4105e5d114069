"""Runs a backend of the tests' own in place of the one of its name."""

from __future__ import annotations

from dense_ext.backends import BACKENDS, select
from dense_ext.backends.base import Backend


def put_in_place(backend: Backend) -> None:
    """Make it the backend of its name."""
    BACKENDS[backend.name] = backend
    select.cache_clear()
