"""Whether modules are exactly what the fused operators compute; the reason if not."""

from __future__ import annotations

from torch import nn

from ..modules import has_hooks


def norm_reason(name: str, module: nn.Module | None) -> str | None:
    if type(module) is not nn.BatchNorm2d:
        return f"{name} is {type(module).__name__}, not BatchNorm2d"
    return None


def relu_reason(name: str, module: nn.Module | None) -> str | None:
    return None if type(module) is nn.ReLU else f"{name} is {type(module).__name__}, not ReLU"


def conv_reason(name: str, module: nn.Module | None, kernel_size: int) -> str | None:
    """Not None unless it is a plain convolution: stride 1, same size, no bias, one group."""
    if type(module) is not nn.Conv2d:
        return f"{name} is {type(module).__name__}, not Conv2d"
    padding = kernel_size // 2
    expected = {
        "kernel_size": (kernel_size, kernel_size),
        "stride": (1, 1),
        "padding": (padding, padding),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
        "bias": None,
    }
    for attribute, value in expected.items():
        if (actual := getattr(module, attribute)) != value:
            shown = "a bias" if attribute == "bias" else f"{attribute} {actual}"
            return f"{name} has {shown}, expected {'none' if attribute == 'bias' else value}"
    return None


def hook_reason(module: nn.Module) -> str | None:
    """Not None if anybody listens to a module inside ``module`` being called."""
    for name, inner in module.named_modules():
        if inner is not module and has_hooks(inner):
            return f"{name} carries a hook, which a fused call would pass over"
    return None
