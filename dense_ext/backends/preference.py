"""The order in which ``auto`` tries the backends: a measured order where there is one, else the general one.

``preference.json`` is a list of rows ``{"primitive", "on", "dtype", "order", "measured"}``. ``on`` is a CPU's
instruction set such as "AVX512_BF16", or a GPU's architecture such as "sm_90" or "gfx942". ``order`` names
backends, fastest first. ``measured`` says where, when and with which PyTorch the order was measured; rows
where it is null have not been measured and are ignored.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from .cpu import instruction_set

# The general order, fastest first.
PREFERENCE = ("cpu", "cuda", "triton", "reference")

SHIPPED = Path(__file__).with_name("preference.json")


@functools.cache
def _measured() -> dict[tuple[str, str, str], tuple[str, ...]]:
    rows = json.loads(SHIPPED.read_text())
    return {(r["primitive"], r["on"], r["dtype"]): tuple(r["order"]) for r in rows if r["measured"]}


def architecture(device: torch.device) -> str:
    """The device's name in the ``on`` field of ``preference.json``."""
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
    key = primitive, architecture(device), str(dtype).removeprefix("torch.")
    return tuple(dict.fromkeys((*_measured().get(key, ()), *PREFERENCE)))
