"""The Triton backend, for every GPU that Triton supports. Each primitive has a module in this package.

Triton is imported only when a GPU first needs it, or if ``TRITON_INTERPRET`` is set. So machines without
a GPU do not wait for the import.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

from ..base import Backend
from ..table import PRIMITIVES

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _kernels() -> ModuleType | str:
    """The module with every primitive, or the reason why it can't be imported."""
    try:
        return importlib.import_module(".kernels", __name__)
    except ImportError as error:
        return f"Triton can't be imported: {error}"


def _kernel(name: str) -> Any:
    """A property that returns the function itself, so that calling it as a method adds no Python frame."""

    def function(self: Backend) -> Any:
        module = _kernels()
        if isinstance(module, str):
            raise RuntimeError(f"{name}: {module}")
        return getattr(module, name)

    return property(function)


class TritonBackend(Backend):
    """Runs the primitives as Triton kernels."""

    name = "triton"
    # Offsets are 64-bit but pixel indices are 32-bit, and the last tile's may exceed M; hence the margin.
    max_pixels = 2**31 - 2**16

    def rounds_operands(self, dtype: torch.dtype) -> bool:
        return True

    def unavailable_reason(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if primitive not in PRIMITIVES:
            return f"there is no primitive {primitive!r}"
        if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            return f"runs on GPUs, not on {device.type}"
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not one of {', '.join(str(d) for d in STORAGE_DTYPES)}"
        module = _kernels()
        return module if isinstance(module, str) else module.unavailable_reason(device, dtype)

    channel_stats = _kernel("channel_stats")
    bn_scale_shift = _kernel("bn_scale_shift")
    bn_gradient = _kernel("bn_gradient")
    affine_gradient = _kernel("affine_gradient")
    scaled_accumulate = _kernel("scaled_accumulate")
    bn_relu_conv1x1_forward = _kernel("bn_relu_conv1x1_forward")
    bn_relu_conv1x1_backward = _kernel("bn_relu_conv1x1_backward")
    bn_relu_conv3x3_forward = _kernel("bn_relu_conv3x3_forward")
    bn_relu_conv3x3_backward = _kernel("bn_relu_conv3x3_backward")
    bn_relu_pool_conv1x1_forward = _kernel("bn_relu_pool_conv1x1_forward")
    bn_relu_pool_conv1x1_backward = _kernel("bn_relu_pool_conv1x1_backward")
    bn_relu_pool_conv1x1_norm_backward = _kernel("bn_relu_pool_conv1x1_norm_backward")
    bn_relu_maxpool_forward = _kernel("bn_relu_maxpool_forward")
    bn_relu_maxpool_backward = _kernel("bn_relu_maxpool_backward")
    bn_relu_maxpool_norm_backward = _kernel("bn_relu_maxpool_norm_backward")
