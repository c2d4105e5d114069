"""In which order ``auto`` tries the backends: by what was measured, else the general order.

``preference.json`` is a list of rows ``{"primitive", "on", "dtype", "order", "measured"}``. ``on`` is
"cpu", or a GPU's architecture as in "sm_90" and "gfx942"; ``order`` names backends, fastest first;
``measured`` says where, when and with which PyTorch. While it is null nobody has measured, and the
row does not count.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

# Fastest first.
PREFERENCE = ("cpu", "triton", "cuda", "reference")

SHIPPED = Path(__file__).with_name("preference.json")


@functools.cache
def _measured() -> dict[tuple[str, str, str], tuple[str, ...]]:
    rows = json.loads(SHIPPED.read_text())
    return {(r["primitive"], r["on"], r["dtype"]): tuple(r["order"]) for r in rows if r["measured"]}


def architecture(device: torch.device) -> str:
    """The device's name in the table's column ``on``."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def order(primitive: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends in the order to try them in; what a measured row leaves out comes after it."""
    key = primitive, architecture(device), str(dtype).removeprefix("torch.")
    return tuple(dict.fromkeys((*_measured().get(key, ()), *PREFERENCE)))
