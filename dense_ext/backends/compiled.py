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
def _load(path: Path, namespace: str, names: tuple[str, ...]) -> None:
    """Load a library with ops of these names, once.

    Raises:
        OSError: it can't be loaded.
        AttributeError: it is another version's, and lacks an op.
    """
    torch.ops.load_library(path)
    for name in names:
        # Ops that only write into what they are given: on fake tensors there is nothing to do.
        if not getattr(getattr(torch.ops, namespace), name).default._schema.returns:
            torch.library.register_fake(f"{namespace}::{name}", lambda *args: None)


class Library:
    """The first of some libraries that was built, loaded.

    Args:
        paths: where they would be.
        namespace: of their ops.
        absent: why there is none, if none is there.
        names: of their ops.

    Attributes:
        path: the library in use, None if there is none.
        reason: why there is none, else None.
    """

    def __init__(
        self, paths: Sequence[Path], namespace: str, absent: str, names: tuple[str, ...] = PRIMITIVES
    ) -> None:
        self.namespace, self.names = namespace, names
        self.path: Path | None = None
        self.reason: str | None = None
        for path in paths:
            if path.exists():
                try:
                    _load(path, namespace, names)
                    self.path = path
                except (OSError, AttributeError) as error:
                    self.reason = f"{path.name} can't be loaded: {error}"
                return
        self.reason = absent

    def __str__(self) -> str:
        """The library in use, e.g. ``_cpu_avx512.so``, or the reason why there is none."""
        return self.path.name if self.path is not None else str(self.reason)

    def op(self, name: str) -> Callable[..., Any]:
        """The op, called with its arguments; without the library, an error."""
        if self.path is None:
            return functools.partial(_unavailable, f"{name}: {self.reason}")
        return getattr(getattr(torch.ops, self.namespace), name).default


def _unavailable(why: str, *args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(why)


def op(name: str) -> Any:
    """The op itself as the attribute: it takes no self, and a call costs no second Python frame."""
    return property(lambda self: self.ops[name])


class CompiledBackend(Backend):
    """The primitives as a library's ops, ``torch.ops.<namespace>.*``; see csrc/ops.cpp."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.ops = {name: library.op(name) for name in library.names}

    channel_stats = op("channel_stats")
    bn_scale_shift = op("bn_scale_shift")
    bn_gradient = op("bn_gradient")
    affine_gradient = op("affine_gradient")
    scaled_accumulate = op("scaled_accumulate")
    bn_relu_conv1x1_forward = op("bn_relu_conv1x1_forward")
    bn_relu_conv1x1_backward = op("bn_relu_conv1x1_backward")
    bn_relu_conv3x3_forward = op("bn_relu_conv3x3_forward")
    bn_relu_conv3x3_backward = op("bn_relu_conv3x3_backward")
    bn_relu_pool_conv1x1_forward = op("bn_relu_pool_conv1x1_forward")
    bn_relu_pool_conv1x1_backward = op("bn_relu_pool_conv1x1_backward")
    bn_relu_maxpool_forward = op("bn_relu_maxpool_forward")
    bn_relu_maxpool_backward = op("bn_relu_maxpool_backward")
