"""The common part of the compiled backends: finding and loading a library of PyTorch ops.

Each library registers its ops in its own namespace (csrc/ops.cpp), so that several libraries can be loaded
into one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .base import Backend

# The ops of :class:`PlainBlocks`, in the order of its fields.
BLOCK_OPS = ("plain_block_forward", "plain_block_backward")

# The folder in which setup.py puts the libraries.
PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def _load(path: Path, namespace: str, names: tuple[str, ...]) -> None:
    """Load the library at ``path``, once, and check that it has ops of these ``names``.

    Raises:
        OSError: the library can't be loaded.
        AttributeError: the library lacks an op, since it was built from another version.
    """
    torch.ops.load_library(path)
    for name in names:
        # Ops that return nothing only write into their arguments; on fake tensors they have nothing to do.
        if not getattr(getattr(torch.ops, namespace), name).default._schema.returns:
            torch.library.register_fake(f"{namespace}::{name}", lambda *args: None)


class Library:
    """Loads the first library that exists among several candidates.

    Args:
        paths: the candidates, best first.
        namespace: the namespace of their ops.
        absent: the reason to give if no candidate exists.
        names: the names of their ops.

    Attributes:
        path: the library in use, None if there is none.
        reason: why no library is in use, None if one is.
    """

    def __init__(self, paths: Sequence[Path], namespace: str, absent: str, names: tuple[str, ...]) -> None:
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
        """The op of that name; without a library, a function that raises RuntimeError with the reason."""
        if self.path is None:
            return functools.partial(_unavailable, f"{name}: {self.reason}")
        return getattr(getattr(torch.ops, self.namespace), name).default


def _unavailable(why: str, *args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(why)


def op(name: str) -> Any:
    """A property that returns the op itself, so that calling it as a method adds no Python frame."""
    return property(lambda self: self.ops[name])


class CompiledBackend(Backend):
    """Runs each primitive as an op of a library, ``torch.ops.<namespace>.*``; see csrc/ops.cpp."""

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
