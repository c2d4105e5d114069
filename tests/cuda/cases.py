"""Every primitive's cases, by name, and a program that runs them through some build of the kernels.

As a program, for what a sanitizer ends: python -m tests.cuda.cases LIBRARY NAMESPACE [PRIMITIVE...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dense_ext.backends.base import Backend
from dense_ext.backends.cuda import STORAGE_DTYPES

from ..emulator import Emulator
from ..primitives import (
    test_affine_gradient,
    test_batch_norm,
    test_bn_relu_conv1x1,
    test_bn_relu_conv3x3,
    test_bn_relu_maxpool,
    test_channel_stats,
)
from ..primitives.common import MakeCase, Size
from ..primitives.harness import Maker, check_values

CPU = torch.device("cpu")
CONV1X1 = test_bn_relu_conv1x1.TestBnReluConv1x1
CONV3X3 = test_bn_relu_conv3x3.TestBnReluConv3x3
GROUPS = [
    test_affine_gradient.TestAffineGradient,
    CONV1X1,
    CONV3X3,
    test_bn_relu_maxpool.TestBnReluMaxpool,
    test_channel_stats.TestChannelStats,
]
