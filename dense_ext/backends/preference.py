"""The order in which ``auto`` tries the backends: a measured order where there is one, else the general one.

A table is a list of rows ``{"primitive", "on", "dtype", "order", "measured"}``. ``on`` is a CPU's instruction
set such as "AVX512_BF16", or a GPU's architecture such as "sm_90" or "gfx942". ``order`` names backends,
fastest first. ``measured`` says where, when and with which PyTorch the order was measured. Rows of the user's
own table, which ``dense-ext tune --backends`` writes, take precedence over those of ``preference.json``,
which the package ships.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .cpu import instruction_set
from .tables import own_table, write_table

# The general order, fastest first.
PREFERENCE = ("cpu", "cuda", "triton", "reference")

SHIPPED = Path(__file__).with_name("preference.json")
ENVIRONMENT_VARIABLE = "DENSE_EXT_PREFERENCE_TABLE"

Key = tuple[str, str, str]  # primitive, device and dtype


def user_table() -> Path:
    """The user's own table: ``$DENSE_EXT_PREFERENCE_TABLE``, or one in the user's cache."""
    return own_table("preference", ENVIRONMENT_VARIABLE)


def _by_key(rows: Iterable[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    return {(row["primitive"], row["on"], row["dtype"]): row for row in rows}


def read_rows(path: Path) -> dict[Key, dict[str, Any]]:
    """The rows of a table, by what they are for; none if there is no such file.

    Raises:
        ValueError: the file is not a table; the message names the file and the reason.
    """
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        if unknown := {name for row in rows for name in row["order"]} - set(PREFERENCE):
            raise ValueError(f"there are no backends {', '.join(sorted(unknown))}")
        return _by_key(rows)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of orders of backends: {error!r}") from error


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a table; the rows that it has for other primitives, devices and dtypes stay."""
    table = read_rows(path) | _by_key(rows)
    write_table(path, [table[key] for key in sorted(table)])
    _measured.cache_clear()


@functools.cache
def _measured() -> dict[Key, dict[str, Any]]:
    return read_rows(SHIPPED) | read_rows(user_table())


def architecture(device: torch.device) -> str:
    """The device's name in the ``on`` field of a table."""
    if device.type == "cpu":
        return instruction_set()
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def order(primitive: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends in the order to try them: those of a measured row, then the others in general order."""
    row = _measured().get((primitive, architecture(device), str(dtype).removeprefix("torch.")))
    return tuple(dict.fromkeys((*(row["order"] if row else ()), *PREFERENCE)))
