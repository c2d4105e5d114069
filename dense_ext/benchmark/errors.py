"""What ends a command, and with which exit code."""

from __future__ import annotations

import torch

_LONGEST = 200  # characters of a reason


class UsageError(Exception):
    """Bad options or input; nothing was written. Exit code 2."""

    exit_code = 2


class MeasurementError(Exception):
    """What was measured must not be believed. Exit code 1."""

    exit_code = 1


class UnavailableError(UsageError):
    """A peer cannot run here: something is not installed, or not made for this device."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def reason(error: Exception) -> str:
    """What went wrong, in a line: for the row of a peer that failed."""
    if is_out_of_memory(error):
        return "out of memory"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, UsageError):  # ours: they say all there is to say
        return text
    return f"{type(error).__name__}: {text}"[:_LONGEST]
