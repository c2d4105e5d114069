"""Every primitive of the Triton backend in one module. Importing it imports Triton."""

from .affine_gradient import affine_gradient, scaled_accumulate
from .batch_norm import bn_gradient, bn_scale_shift
from .bn_relu_conv1x1 import bn_relu_conv1x1_backward, bn_relu_conv1x1_forward
from .bn_relu_conv3x3 import bn_relu_conv3x3_backward, bn_relu_conv3x3_forward
from .bn_relu_maxpool import (
    bn_relu_maxpool_backward,
    bn_relu_maxpool_forward,
    bn_relu_maxpool_norm_backward,
)
from .bn_relu_pool_conv1x1 import (
    bn_relu_pool_conv1x1_backward,
    bn_relu_pool_conv1x1_forward,
    bn_relu_pool_conv1x1_norm_backward,
)
from .channel_stats import channel_stats
from .launch import unavailable_reason

__all__ = [
    "affine_gradient",
    "bn_gradient",
    "bn_relu_conv1x1_backward",
    "bn_relu_conv1x1_forward",
    "bn_relu_conv3x3_backward",
    "bn_relu_conv3x3_forward",
    "bn_relu_maxpool_backward",
    "bn_relu_maxpool_forward",
    "bn_relu_maxpool_norm_backward",
    "bn_relu_pool_conv1x1_backward",
    "bn_relu_pool_conv1x1_forward",
    "bn_relu_pool_conv1x1_norm_backward",
    "bn_scale_shift",
    "channel_stats",
    "scaled_accumulate",
    "unavailable_reason",
]
