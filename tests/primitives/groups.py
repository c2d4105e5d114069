"""The test classes of all primitives that address pixels, for tests that run all of their cases."""

from __future__ import annotations

from . import (
    test_affine_gradient,
    test_bn_relu_conv1x1,
    test_bn_relu_conv3x3,
    test_bn_relu_maxpool,
    test_bn_relu_pool_conv1x1,
    test_channel_stats,
)
from .common import PrimitiveTests

GROUPS: list[type[PrimitiveTests]] = [
    test_affine_gradient.TestAffineGradient,
    test_bn_relu_conv1x1.TestBnReluConv1x1,
    test_bn_relu_conv3x3.TestBnReluConv3x3,
    test_bn_relu_maxpool.TestBnReluMaxpool,
    test_bn_relu_pool_conv1x1.TestBnReluPoolConv1x1,
    test_channel_stats.TestChannelStats,
]
