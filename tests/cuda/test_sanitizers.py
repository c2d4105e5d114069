"""No primitive leaves its memory or computes what C++ leaves undefined."""

from __future__ import annotations

from ..sanitizers import assert_passed
from .cases import run_sanitized


def test_every_primitive_and_a_network() -> None:
    """In every dtype and size: one access beyond a tensor or an array in shared memory ends the program."""
    assert_passed(run_sanitized())
