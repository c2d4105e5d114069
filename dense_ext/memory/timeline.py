"""Counts the memory that a training step holds at each moment, without allocating it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(eq=False)
class Held:
    """Memory that is held until its last user releases it, like a tensor's storage."""

    part: str
    nbytes: int
    users: int = 1


class Timeline:
    """Memory held and released in the order of a step; it records the peak with its breakdown."""

    def __init__(self) -> None:
        self.point = ""  # the current point in the step
        self.total = self.peak = 0
        self.peak_point = ""
        self.parts: Counter[str] = Counter()
        self.peak_parts: dict[str, int] = {}

    def hold(self, part: str, nbytes: int) -> Held:
        """Hold ``nbytes`` for ``part``, with one user."""
        self.total += nbytes
        self.parts[part] += nbytes
        if self.total > self.peak:
            self.peak, self.peak_point, self.peak_parts = self.total, self.point, dict(self.parts)
        return Held(part, nbytes)

    def keep(self, held: Held) -> Held:
        """Add a user to ``held``."""
        held.users += 1
        return held

    def release(self, *helds: Held) -> None:
        """Remove one user from each; memory without users is freed."""
        for held in helds:
            held.users -= 1
            if held.users == 0:
                self.total -= held.nbytes
                self.parts[held.part] -= held.nbytes

    def need(self, part: str, nbytes: int) -> None:
        """Hold ``nbytes`` and release them at once."""
        self.release(self.hold(part, nbytes))
