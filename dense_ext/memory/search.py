"""Finds the largest number (a batch size, a depth) that fits into memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

_SECANT_STEPS = 8  # the number of secant steps before the search bisects; memory may be far from linear


def largest(nbytes: Callable[[int], float], budget: int, first: int = 1, at_most: int = sys.maxsize) -> int:
    """The largest n for which ``nbytes(n)`` is within ``budget``; 0 if ``nbytes(1)`` is not.

    Memory is nearly linear in a batch size or a depth, so the search is a secant method: each step follows
    the line through the last two points. Three or four steps usually suffice.

    Args:
        nbytes: the memory for n in bytes, growing with n; infinite if n ran out of memory.
        budget: the memory to fit into, in bytes.
        first: the first n to try.
        at_most: the largest n to try; the result if it fits.
    """
    fits, too_many = 0, at_most + 1
    before, held_before, n = 0, 0.0, min(first, at_most)
    for tries in itertools.count(1):
        held = nbytes(n)
        if held <= budget:
            fits = n
        else:
            too_many = n
        if too_many - fits == 1:
            break
        slope = (held - held_before) / (n - before)
        if tries < _SECANT_STEPS and 0 < slope < float("inf"):
            following = n + int((budget - held) // slope)
        else:
            following = (fits + too_many) // 2 if too_many <= at_most else 2 * n
        before, held_before = n, held
        n = min(max(following, fits + 1), too_many - 1)
    return fits
