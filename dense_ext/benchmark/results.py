"""Result files: JSON with everything needed to read and to draw them again.

Bytes are bytes, times seconds, rates per second. results.schema.json, beside this file, describes
every key; ``interrupted`` marks a file that holds only what was measured until then.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UsageError
from .machine import commit, machine, versions

Results = dict[str, Any]

# What every file has, and what one of its kind has beside that; those not named are a suite's.
HEAD = {"kind", "date", "machine", "versions", "commit", "options", "interrupted"}
_CONTENT = {"bench": {"peers"}, "models": {"models"}, "train": {"runs"}}
_OF_A_SUITE = {"peers", "rows"}


def new_results(kind: str, options: dict[str, Any]) -> Results:
    """The head of a result file; ``interrupted`` until said otherwise."""
    return {
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "options": options,
        "interrupted": True,
    }


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: a reader sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, results: Results) -> None:
    write_atomically(path, lambda p: p.write_text(as_json(results) + "\n"))


def as_json(results: Results) -> str:
    """The text of a result, which any reader of JSON takes: what is not finite is null."""
    return json.dumps(_finite(results), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def saving(tick: Callable[[str], None], results: Results, path: Path, every: float) -> Callable[[str], None]:
    """The tick, which also writes the results so far where the last time is ``every`` seconds ago."""
    saved = time.monotonic()

    def tick_and_save(text: str) -> None:
        nonlocal saved
        tick(text)
        if time.monotonic() - saved >= every:
            write_json(path, results)
            saved = time.monotonic()

    return tick_and_save


def read_json(path: Path) -> Results:
    results: Results = json.loads(path.read_text())
    return results


def read_results(path: Path) -> Results:
    """A result file somebody names.

    Raises:
        UsageError: it is missing, or none of ours.
    """
    try:
        results = read_json(path)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no result file: {error}") from error
    if not isinstance(results, dict) or not results.keys() >= HEAD:
        raise UsageError(f"{path} is no result file of dense-ext")
    if missing := _CONTENT.get(str(results["kind"]), _OF_A_SUITE) - results.keys():
        raise UsageError(f"{path} is a result of {results['kind']!r} without {', '.join(sorted(missing))}")
    return results


def check_new(path: Path, overwrite: bool) -> None:
    """Raise UsageError if ``path`` holds results that would be lost, or its folder cannot be one."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; pass --overwrite or another --out")
    if path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder")
