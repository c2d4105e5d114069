"""The CUDA backend: CUDA C++ kernels for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import PlainBlocks, gpu_unavailable_reason, tf32_allowed
from .compiled import BLOCK_OPS, PACKAGE, CompiledBackend, Library, op
from .table import PRIMITIVES, THROUGH_NORM

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OPS = (*PRIMITIVES, *THROUGH_NORM, *BLOCK_OPS)
HAS_CODE = "has_code"  # takes a GPU's index and returns whether the library was compiled for that GPU
# The ops that multiply matrices; they take an argument that says whether float32 may be rounded to tf32.
PRODUCTS = tuple(name for name in OPS if "conv" in name or name in BLOCK_OPS)


class CUDABackend(CompiledBackend):
    """Runs the primitives as CUDA kernels.

    Args:
        library: the path of the library of compiled kernels.
        namespace: the namespace of the library's ops.
        device_type: the device type of the tensors it takes: "cuda", or "cpu" for an emulated GPU.
    """

    name = "cuda"
    max_pixels = 2**31 - 2**16  # which kernels number in 32 bits

    def __init__(
        self,
        library: Path = PACKAGE / "_cuda.so",
        namespace: str = "dense_ext_cuda",
        device_type: str = "cuda",
    ) -> None:
        absent = (
            f"the CUDA library is not built: {library.name} is not in {library.parent}; installing with nvcc "
            "compiles it for the GPUs of the machine (DENSE_EXT_CUDA=1: for all GPUs, or the install fails)"
        )
        super().__init__(Library([library], namespace, absent, (*OPS, HAS_CODE)))
        self.device_type = device_type
        for name in PRODUCTS:
            self.ops[name] = functools.partial(_multiply, self.ops[name])
        self.plain_blocks = PlainBlocks(*(self.ops[name] for name in BLOCK_OPS))

    bn_relu_pool_conv1x1_norm_backward = op("bn_relu_pool_conv1x1_norm_backward")
    bn_relu_maxpool_norm_backward = op("bn_relu_maxpool_norm_backward")

    def rounds_operands(self, dtype: torch.dtype) -> bool:
        return True

    def unavailable_reason(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.library.reason is not None:
            return self.library.reason
        if primitive not in PRIMITIVES:
            return f"there is no primitive {primitive!r}"
        if device.type != self.device_type:
            return f"runs on {self.device_type}, not on {device.type}"
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not one of {', '.join(str(d) for d in STORAGE_DTYPES)}"
        return _gpu_unavailable_reason(device.index, self.ops[HAS_CODE]) if device.type == "cuda" else None


def _multiply(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a product's op with PyTorch's current setting for tf32."""
    activations: Tensor = args[0] if args else kwargs["weight"]
    return op(*args, **kwargs, tf32=tf32_allowed(activations.dtype))


@functools.cache
def _gpu_unavailable_reason(device: int | None, has_code: Callable[[int], bool]) -> str | None:
    """Why the kernels can't run on GPU ``device``, or None if they can.

    ``device`` None means the current GPU.
    """
    if reason := gpu_unavailable_reason(device):
        return reason
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs, but this PyTorch was built for AMD GPUs"
    try:
        found = has_code(torch.cuda.current_device() if device is None else device)
    except RuntimeError as error:
        return f"the CUDA library can't use this GPU: {error}"
    if not found:
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return (
            "the CUDA library was compiled for other GPUs: install again with TORCH_CUDA_ARCH_LIST "
            f"containing {capability}, or without it"
        )
    return None
