"""The C++ backend for CPUs: loads the library built for this machine, and forwards to its ops.

setup.py compiles the same sources for several instruction sets; the one that PyTorch itself uses
here (``torch.backends.cpu.get_cpu_capability()``) is loaded once, when this module is imported. If
it can't be, the reason is kept, and :meth:`CPUBackend.can_run` returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from .base import PRIMITIVES, STORAGE_DTYPES, Backend, accumulate_dtype

# PyTorch's name for the instruction set -> the libraries such a machine runs, best first.
LIBRARIES = {
    "AVX512": ("_cpu_avx512", "_cpu_avx2", "_cpu_default"),
    "AVX2": ("_cpu_avx2", "_cpu_default"),
}
ELSEWHERE = ("_cpu_default",)


def _load() -> tuple[Path | None, str | None]:
    """Load the best library that was built: its path and None, or None and the reason why not."""
    capability = torch.backends.cpu.get_cpu_capability()
    package = Path(__file__).resolve().parent.parent
    names = LIBRARIES.get(capability, ELSEWHERE)
    built = [path for name in names if (path := package / f"{name}.so").exists()]
    if not built:
        return None, f"the C++ backend is not built: none of {', '.join(names)} is in {package}"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        return None, f"{built[0].name} can't be loaded: {error}"
    return built[0], None


LIBRARY, REASON = _load()


def library() -> str:
    """The library in use, e.g. ``_cpu_avx512.so``, or the reason why there is none."""
    return LIBRARY.name if LIBRARY is not None else str(REASON)


def _op(primitive: str) -> Any:
    """The compiled op, called with the primitive's arguments; without the library, an error."""
    if LIBRARY is None:
        return _unavailable(primitive)
    # The ops only write into what they are given: on fake tensors there is nothing to do.
    torch.library.register_fake(f"dense_ext::{primitive}", lambda *args: None)
    return getattr(torch.ops.dense_ext, primitive).default


def _unavailable(primitive: str) -> Callable[..., NoReturn]:
    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"{primitive}: {REASON}")

    return fail


# The most values in the matrix product's vectors and panels, over instruction sets; see csrc/cpu/gemm.h.
_VECTOR, _PANEL = 16, 32


def _whole(channels: int, width: int) -> int:
    """``channels`` rounded up to a multiple of ``width``."""
    return -(-channels // width) * width


class CPUBackend(Backend):
    """The primitives as compiled ops, ``torch.ops.dense_ext.*``; see csrc/ops.cpp."""

    name = "cpu"

    def can_run(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if REASON is not None:
            return REASON
        if primitive not in PRIMITIVES:
            return f"there is no primitive {primitive!r}"
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not one of {', '.join(str(d) for d in STORAGE_DTYPES)}"
        return None

    def scratch_bytes(
        self, primitive: str, pixels: int, in_channels: int, out_channels: int, dtype: torch.dtype
    ) -> int:
        threads, wide = torch.get_num_threads(), accumulate_dtype(dtype).itemsize
        sums = 2 * 8 * threads * max(in_channels, out_channels)  # in float64
        if "conv" not in primitive:
            return sums
        # The weight, packed; backward packs it transposed, and each thread has a gradient of its own.
        taps = 9 if "conv3x3" in primitive else 1
        transposed = taps * _whole(in_channels, _PANEL) * out_channels
        if primitive.endswith("forward"):
            return sums + wide * taps * in_channels * _whole(out_channels, _PANEL)
        gradient = taps * in_channels * _whole(out_channels, _VECTOR) if taps > 1 else transposed
        return sums + wide * (transposed + threads * gradient)

    # The op itself is the attribute: it takes no self, and a call costs no second Python frame.
    channel_stats = _op("channel_stats")
    bn_scale_shift = _op("bn_scale_shift")
    bn_gradient = _op("bn_gradient")
    affine_gradient = _op("affine_gradient")
    scaled_accumulate = _op("scaled_accumulate")
    bn_relu_conv1x1_forward = _op("bn_relu_conv1x1_forward")
    bn_relu_conv1x1_backward = _op("bn_relu_conv1x1_backward")
    bn_relu_conv3x3_forward = _op("bn_relu_conv3x3_forward")
    bn_relu_conv3x3_backward = _op("bn_relu_conv3x3_backward")
    bn_relu_pool_conv1x1_forward = _op("bn_relu_pool_conv1x1_forward")
    bn_relu_pool_conv1x1_backward = _op("bn_relu_pool_conv1x1_backward")
    bn_relu_maxpool_forward = _op("bn_relu_maxpool_forward")
    bn_relu_maxpool_backward = _op("bn_relu_maxpool_backward")
