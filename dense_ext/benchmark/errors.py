"""What ends a command, and with which exit code."""

from __future__ import annotations


class UsageError(Exception):
    """Bad options or input; nothing was written. Exit code 2."""

    exit_code = 2


class MeasurementError(Exception):
    """What was measured must not be believed. Exit code 1."""

    exit_code = 1
