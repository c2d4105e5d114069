"""dense_ext: DenseNets in linear memory, by fused BN-ReLU-convolution kernels.

Swap the dense blocks of an existing model with :func:`swap`, or build with :class:`DenseNet`.
"""

from . import functional, memory
from .backends import available_backends, use_backend
from .eligibility import fused_export
from .graphed import GraphedModel, make_graphed
from .models import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_40_12,
    densenet_bc_40_12,
    densenet_bc_100_12,
    densenet_bc_190_40,
    densenet_bc_250_24,
)
from .modules import DenseBlock, DenseLayer, Transition
from .packing import pack_weights
from .recognise import register
from .swap import report, restore, restored, swap
from .version import __version__

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "GraphedModel",
    "Transition",
    "__version__",
    "available_backends",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_40_12",
    "densenet_bc_40_12",
    "densenet_bc_100_12",
    "densenet_bc_190_40",
    "densenet_bc_250_24",
    "functional",
    "fused_export",
    "make_graphed",
    "memory",
    "pack_weights",
    "register",
    "report",
    "restore",
    "restored",
    "swap",
    "use_backend",
]
