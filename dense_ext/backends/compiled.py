"""What the compiled backends share: a library of ops, found and loaded, or the reason why there is none.

Each library has its ops in a namespace of its own (csrc/ops.cpp), so that every one of them can be
loaded, in any process and beside the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .base import PRIMITIVES, Backend

# Where setup.py puts the libraries.
PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def _load(path: Path, namespace: str) -> None:
    """Load a library, once.

    Raises:
        OSError: it can't be loaded.
    """
    torch.ops.load_library(path)
    for primitive in PRIMITIVES:
        # The ops only write into what they are given: on fake tensors there is nothing to do.
        torch.library.register_fake(f"{namespace}::{primitive}", lambda *args: None)


class Library:
    """The first of some libraries that was built, loaded.

    Attributes:
        path: the library in use, None if there is none.
        reason: why there is none, else None.
    """

    def __init__(self, paths: Sequence[Path], namespace: str, absent: str) -> None:
        self.namespace = namespace
        self.path: Path | None = None
        self.reason: str | None = None
        for path in paths:
            if path.exists():
                try:
                    _load(path, namespace)
                    self.path = path
                except OSError as error:
                    self.reason = f"{path.name} can't be loaded: {error}"
                return
        self.reason = absent

    def __str__(self) -> str:
        """The library in use, e.g. ``_cpu_avx512.so``, or the reason why there is none."""
        return self.path.name if self.path is not None else str(self.reason)

    def op(self, primitive: str) -> Callable[..., Any]:
        """The primitive's op, called with its arguments; without the library, an error."""
        if self.path is None:
            return functools.partial(_unavailable, f"{primitive}: {self.reason}")
        return getattr(getattr(torch.ops, self.namespace), primitive).default


def _unavailable(why: str, *args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(why)


def _op(primitive: str) -> Any:
    """The op itself as the attribute: it takes no self, and a call costs no second Python frame."""
    return property(lambda self: self.ops[primitive])


class CompiledBackend(Backend):
    """The primitives as a library's ops, ``torch.ops.<namespace>.*``; see csrc/ops.cpp."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.ops = {primitive: library.op(primitive) for primitive in PRIMITIVES}

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
