"""No primitive accesses memory out of bounds or has undefined behaviour."""

from __future__ import annotations

from ..sanitizers import assert_passed
from .cases import run_sanitized


def test_every_primitive_and_a_network() -> None:
    """In every dtype and size; a single access beyond a tensor or a shared array would end the program."""
    assert_passed(run_sanitized())
