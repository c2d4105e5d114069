"""No primitive leaves its memory or computes what C++ leaves undefined."""

from __future__ import annotations

from .cases import run_sanitized


def test_every_primitive_and_a_network() -> None:
    """In every dtype and size: one access beyond a tensor or an array in shared memory ends the program."""
    ran = run_sanitized()
    assert ran.returncode == 0, f"after {ran.stdout.splitlines()[-1:]}:\n{ran.stderr}"
    assert ran.stdout.splitlines()[-1:] == ["a training step"], ran.stderr
