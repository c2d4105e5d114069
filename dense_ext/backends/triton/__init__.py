"""The Triton backend: for every GPU that Triton reaches. One module a primitive beside this one.

Triton is imported when a GPU's tensor first asks for it, or at once where ``TRITON_INTERPRET`` is
set: whoever has no GPU does not wait for a compiler.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

from ..base import PRIMITIVES, Backend

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _kernels() -> ModuleType | str:
    """The module with every primitive, or the reason why there is none."""
    try:
        return importlib.import_module(".kernels", __name__)
    except ImportError as error:
        return f"Triton can't be imported: {error}"


def _kernel(name: str) -> Any:
    """The primitive's function itself: a call costs no second Python frame."""

    def function(self: Backend) -> Any:
        module = _kernels()
        if isinstance(module, str):
            raise RuntimeError(f"{name}: {module}")
        return getattr(module, name)

    return property(function)


class TritonBackend(Backend):
    """The primitives as Triton kernels."""

    name = "triton"
    rounds_operands = True
    # Offsets are 64-bit; the number of a pixel, also of one beyond the last tile, is 32-bit.
    max_pixels = 2**31 - 2**16

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
