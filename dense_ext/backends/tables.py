"""The tables of what was measured: JSON lists of rows, shipped with the package or the user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import write_atomically


def own_table(name: str, variable: str) -> Path:
    """The user's own table, which ``dense-ext tune`` writes: the environment's, or one in the user's cache.

    Args:
        name: the file's name without its ending.
        variable: the environment variable that names another file.
    """
    if path := os.environ.get(variable):
        return Path(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dense_ext" / f"{name}.json"


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a table, a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_atomically(path, lambda p: p.write_text(f"[\n{lines}\n]\n"))
