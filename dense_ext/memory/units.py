"""Memory sizes: parsing them, and the memory of a device."""

from __future__ import annotations

import os
import re

import torch

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """The bytes in a size such as 10**9, ``"80GiB"`` (units of 2**30), ``"1.5 GB"`` (10**9) or ``"4096"``.

    Raises:
        TypeError: size is neither an integer nor a string.
        ValueError: size is not a positive number, or its unit is unknown.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"a memory size must be bytes or a string such as '80GiB', got {size!r}")
    match = _SIZE.fullmatch(str(size))
    if match is None:
        raise ValueError(f"a memory size must be a positive number and a unit, as in '80GiB'; got {size!r}")
    number, unit = match[1], match[2].lower() or "b"
    if unit not in _UNITS:
        raise ValueError(f"{size!r}: the unit must be one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB")
    nbytes = int(float(number) * _UNITS[unit])
    if nbytes < 1:
        raise ValueError(f"a memory size must be at least one byte, got {size!r}")
    return nbytes


def device_memory(device: torch.device) -> int:
    """The bytes that this process can use on a device.

    On a GPU that is the free memory plus what PyTorch has already reserved; on a CPU it is all memory.

    Raises:
        ValueError: the device is neither a CPU nor an available GPU.
    """
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    raise ValueError(f"the memory of {device} is not known here: say how much there is")
