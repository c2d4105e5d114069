"""``dense-ext info``: what is installed and which backend runs where."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import BACKENDS, CPU, CUDA, select, unavailable_reasons
from ..backends.base import STORAGE_DTYPES
from .console import print_json, print_table
from .options import Json


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _auto(device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" takes; a primitive served by another backend than the rest is named."""
    try:
        return select("auto", device.type, dtype).summary()
    except RuntimeError as error:
        return str(error)


def _collect() -> dict[str, Any]:
    from ..machine import machine, versions

    rows = []
    for device in _devices():
        for dtype in STORAGE_DTYPES:
            rows.append({
                "device": str(device),
                "dtype": str(dtype).removeprefix("torch."),
                "auto": _auto(device, dtype),
                "backends": unavailable_reasons(device, dtype),
            })  # fmt: skip
    return {
        "versions": versions(),
        "machine": machine(),
        "compiled_libraries": {backend.name: str(backend.library) for backend in (CPU, CUDA)},
        "backends": rows,
    }


def _print(found: dict[str, Any]) -> None:
    machine = found["machine"]
    gpu = machine["gpu"]
    facts = [
        *((name, str(version or "not installed")) for name, version in found["versions"].items()),
        ("CPU library", found["compiled_libraries"]["cpu"]),
        ("CUDA library", found["compiled_libraries"]["cuda"]),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}"),
        ("threads", str(machine["threads"])),
        ("memory", f"{machine['memory_bytes'] / 2**30:.1f} GiB"),
        ("GPU", f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else "none"),
    ]
    print_table("dense_ext", ("what", "is"), facts, left=2)
    reasons: dict[str, str] = {}
    rows = []
    for row in found["backends"]:
        cells = []
        for name in BACKENDS:
            reason = row["backends"][name]
            if reason is not None:
                reasons.setdefault(f"{name}, {row['device']}", reason)
            cells.append("no" if reason else "yes")
        rows.append((row["device"], row["dtype"], *cells, row["auto"]))
    print_table("backends", ("device", "dtype", *BACKENDS, "auto takes"), rows, left=3 + len(BACKENDS))
    for where, reason in reasons.items():
        print(f"{where}: {reason}")


def info(json: Json = False) -> None:
    """Versions, devices, and which backend serves which device and dtype."""
    found = _collect()
    if json:
        print_json(found)
    else:
        _print(found)
