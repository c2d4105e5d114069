"""How much of something fits into memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

_BY_LINE = 8  # looks, before the rest is halved: what is far from a line


def largest(nbytes: Callable[[int], float], budget: int, first: int = 1, at_most: int = sys.maxsize) -> int:
    """The largest n that takes no more than ``budget`` bytes, while n + 1 takes more; 0 if 1 does.

    Memory is nearly in line over a batch or a depth, so each look is where the line through the last two
    leads: three or four do.

    Args:
        nbytes: of n, growing with it; infinite where it ran out of memory.
        budget: bytes.
        first: n to look at first.
        at_most: not to be exceeded; the result where all of it fits.
    """
    fits, too_many = 0, at_most + 1
    before, held_before, n = 0, 0.0, min(first, at_most)
    for look in itertools.count(1):
        held = nbytes(n)
        if held <= budget:
            fits = n
        else:
            too_many = n
        if too_many - fits == 1:
            break
        slope = (held - held_before) / (n - before)
        if look < _BY_LINE and 0 < slope < float("inf"):
            following = n + int((budget - held) // slope)
        else:
            following = (fits + too_many) // 2 if too_many <= at_most else 2 * n
        before, held_before = n, held
        n = min(max(following, fits + 1), too_many - 1)
    return fits
