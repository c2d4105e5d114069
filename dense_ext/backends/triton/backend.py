"""The Triton backend: for every GPU that Triton reaches. One module a primitive, beside this one."""

from __future__ import annotations

import torch

from ..base import PRIMITIVES, Backend
from .affine_gradient import affine_gradient, scaled_accumulate
from .batch_norm import bn_gradient, bn_scale_shift
from .bn_relu_conv1x1 import bn_relu_conv1x1_backward, bn_relu_conv1x1_forward
from .bn_relu_conv3x3 import bn_relu_conv3x3_backward, bn_relu_conv3x3_forward
from .bn_relu_maxpool import bn_relu_maxpool_backward, bn_relu_maxpool_forward
from .bn_relu_pool_conv1x1 import bn_relu_pool_conv1x1_backward, bn_relu_pool_conv1x1_forward
from .channel_stats import channel_stats
from .launch import INTERPRETED, can_compile

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend(Backend):
    """The primitives as Triton kernels."""

    name = "triton"
    rounds_operands = True

    def can_run(self, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if primitive not in PRIMITIVES:
            return f"there is no primitive {primitive!r}"
        if dtype not in STORAGE_DTYPES:
            return f"dtype {dtype} is not one of {', '.join(str(d) for d in STORAGE_DTYPES)}"
        if INTERPRETED:
            if device.type != "cpu":
                return "TRITON_INTERPRET is set: kernels run in the interpreter, on the CPU"
            # Triton 3.6 computes tl.dot of bfloat16 wrongly there.
            return "the interpreter does not compute in bfloat16" if dtype == torch.bfloat16 else None
        if device.type != "cuda":
            return f"runs on GPUs, not on {device.type}"
        return can_compile(device.index)

    # The functions are the attributes: a call costs no second Python frame.
    channel_stats = staticmethod(channel_stats)
    bn_scale_shift = staticmethod(bn_scale_shift)
    bn_gradient = staticmethod(bn_gradient)
    affine_gradient = staticmethod(affine_gradient)
    scaled_accumulate = staticmethod(scaled_accumulate)
    bn_relu_conv1x1_forward = staticmethod(bn_relu_conv1x1_forward)
    bn_relu_conv1x1_backward = staticmethod(bn_relu_conv1x1_backward)
    bn_relu_conv3x3_forward = staticmethod(bn_relu_conv3x3_forward)
    bn_relu_conv3x3_backward = staticmethod(bn_relu_conv3x3_backward)
    bn_relu_pool_conv1x1_forward = staticmethod(bn_relu_pool_conv1x1_forward)
    bn_relu_pool_conv1x1_backward = staticmethod(bn_relu_pool_conv1x1_backward)
    bn_relu_maxpool_forward = staticmethod(bn_relu_maxpool_forward)
    bn_relu_maxpool_backward = staticmethod(bn_relu_maxpool_backward)
