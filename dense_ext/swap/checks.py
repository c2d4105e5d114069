"""Whether modules are exactly what the fused operators compute; the reason if not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..modules import Fused, has_hooks

_CONV = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros", "bias": None}
_SIZES = ("kernel_size", "stride", "padding", "ceil_mode")
_AVERAGE = {**dict(zip(_SIZES, (2, 2, 0, False), strict=True)), "divisor_override": None}
_MAX = {**dict(zip(_SIZES, (3, 2, 1, False), strict=True)), "dilation": 1, "return_indices": False}
_POOLS: dict[type[nn.Module], dict[str, Any]] = {nn.AvgPool2d: _AVERAGE, nn.MaxPool2d: _MAX}


def parts_reason(fused: type[Fused], modules: Mapping[str, Any]) -> str | None:
    """Not None unless modules are those that ``fused`` stands for, in order, with its settings."""
    expected = [name for name in fused.parts if name not in ("act", "drop")]  # a norm's own
    for name, module in modules.items():
        if reason := part_reason(fused, name, module):
            return reason
    if list(modules) != expected:
        return f"its children are {', '.join(modules)}, expected {', '.join(expected)}"
    return None


def part_reason(fused: type[Fused], name: str, module: Any) -> str | None:
    """Not None if a module by this name is not what ``fused`` takes it for."""
    expected = fused.parts.get(name)
    if expected is None:
        return f"{name} ({type(module).__name__}) is not among {', '.join(fused.parts)}"
    if type(module) is not expected:
        return f"{name} is {type(module).__name__}, not {expected.__name__}"
    if isinstance(module, nn.Conv2d):
        return _conv_reason(name, module, 3 if name == "conv2" else 1)
    if settings := _POOLS.get(expected):
        got = {attribute: _single(getattr(module, attribute)) for attribute in settings}
        if got != settings:
            shown = ", ".join(f"{k}={v}" for k, v in list(settings.items())[:3])
            return f"{name} is {module}, expected {expected.__name__}({shown})"
    for child in module._modules:
        if reason := part_reason(fused, child, module._modules[child]):
            return f"{name}.{reason}"
    return None


def _single(value: Any) -> Any:
    """One number for a pair of equal ones."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _conv_reason(name: str, conv: nn.Conv2d, kernel_size: int) -> str | None:
    """Not None unless it is a plain convolution: stride 1, same size, no bias, one group."""
    padding = kernel_size // 2
    expected = {"kernel_size": (kernel_size, kernel_size), "padding": (padding, padding), **_CONV}
    for attribute, value in expected.items():
        if (actual := getattr(conv, attribute)) != value:
            shown = "a bias" if attribute == "bias" else f"{attribute} {actual}"
            return f"{name} has {shown}, expected {'none' if attribute == 'bias' else value}"
    return None


def hook_reason(module: nn.Module) -> str | None:
    """Not None if anybody listens to a module inside ``module`` being called."""
    for name, inner in module.named_modules():
        if inner is not module and has_hooks(inner):
            return f"{name} carries a hook, which a fused call would pass over"
    return None
