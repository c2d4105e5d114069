"""What a training step holds at each moment, without holding it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(eq=False)
class Held:
    """Memory that is alive while somebody uses it, as a tensor's storage is."""

    part: str
    nbytes: int
    users: int = 1


class Timeline:
    """Memory taken and given back in the order of a step; remembers the highest moment."""

    def __init__(self) -> None:
        self.point = ""  # where in the step we are
        self.total = self.peak = 0
        self.peak_point = ""
        self.parts: Counter[str] = Counter()
        self.peak_parts: dict[str, int] = {}

    def hold(self, part: str, nbytes: int) -> Held:
        """Take ``nbytes`` for ``part``."""
        self.total += nbytes
        self.parts[part] += nbytes
        if self.total > self.peak:
            self.peak, self.peak_point, self.peak_parts = self.total, self.point, dict(self.parts)
        return Held(part, nbytes)

    def keep(self, held: Held) -> Held:
        """One more user of ``held``."""
        held.users += 1
        return held

    def release(self, *helds: Held) -> None:
        """One user less of each; its memory goes with the last."""
        for held in helds:
            held.users -= 1
            if held.users == 0:
                self.total -= held.nbytes
                self.parts[held.part] -= held.nbytes

    def need(self, part: str, nbytes: int) -> None:
        """Take ``nbytes`` and give them back at once."""
        self.release(self.hold(part, nbytes))
