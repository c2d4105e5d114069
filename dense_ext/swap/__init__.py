"""Swap the dense parts of an existing DenseNet for fused ones, in place, and back.

A swapped module stays the same object: only its class changes, to one that inherits from the
original and replaces ``forward``. So parameters, buffers, hooks, names, mode, dtype and device
stay by construction, ``isinstance`` still holds, and what the fusion cannot serve at run time is
served by the original's forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ..checks import check_options
from ..eligibility import Fused
from .adapter import ADDED, Adapter, Candidate, adapters
from .automatic import policies_that_fit
from .recognition import Recognition, restore_recognised
from .report import Report, Row, served_by

__all__ = ["Report", "Row", "report", "restore", "restored", "swap"]

Model = TypeVar("Model", bound=nn.Module)


def _candidates(model: nn.Module, recognise: bool) -> list[tuple[Adapter | Recognition, Candidate]]:
    """Every part of the model that is, or looks like, something that can be swapped.

    Recognition looks at what adapters do not know, and at what they refuse.
    """
    found: list[tuple[Adapter | Recognition, Candidate]] = [
        (adapter, candidate) for adapter in adapters() for candidate in adapter.candidates(model)
    ]
    if not recognise:
        return found
    served = {candidate.module for _, candidate in found if candidate.reason is None}
    recognition = Recognition(model, served - {c.module for _, c in found if c.kind in ("features", "stem")})
    more = list(recognition.candidates(model))
    recognised = {candidate.module for candidate in more if candidate.reason is None}
    # An adapter's reason is the better one.
    refused = {candidate.module for _, candidate in found} - recognised
    return [
        *((adapter, c) for adapter, c in found if c.module not in recognised),
        *((recognition, c) for c in more if not refused & set(c.module.modules())),
    ]


def swap(
    model: Model,
    *,
    recompute: str = "bottleneck",
    backend: str = "auto",
    strict: bool = False,
    recognise: bool = True,
    input_shape: Sequence[int] | None = None,
    memory: int | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Make a DenseNet's dense blocks, transitions and stem run fused. In place; returns ``model``.

    ``state_dict()`` keys and order, Parameter objects, buffers, train/eval mode, ``requires_grad``,
    dtype and device stay. A part that cannot be served exactly stays as it is; one warning and
    :func:`report` say why. Swapping again changes the options.

    Args:
        model: any densely connected network. Classes of torchvision, timm, MONAI (2-D, 3-D) and
            TorchXRayVision are known; other modules are recognised by what their forward computes.
        recompute: as :class:`dense_ext.DenseBlock`; or ``"auto"``: for each block what computes least
            again while a training step with AdamW's state still fits
            (:meth:`dense_ext.memory.Planner.choose`). The model is then itself a DenseNet, for images.
        backend: as :class:`dense_ext.DenseBlock`.
        strict: raise, before anything is changed, if a part cannot be served.
        recognise: trace modules whose classes are unknown, and fuse those that compute dense blocks or
            transitions; False for known classes only. A recognised module has been compared with its
            original in float64, which takes seconds, once.
        input_shape: for ``"auto"``, N, C, H, W of the images of a step.
        memory: for ``"auto"``, the bytes to fit into, also as ``"80GiB"``; None for what the model's
            device has for this process.
        dtype: for ``"auto"``, the activations' under autocast, None for the parameters' own.

    Raises:
        TypeError: model is not a module, or memory is no size.
        ValueError: an unknown option; no dense block in the model; with ``strict``, a part that
            cannot be served; ``"auto"`` without input_shape, or for a model that is not a whole
            DenseNet of parts that can be served, or no policy fits; input_shape, memory or dtype
            without ``"auto"``. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    automatic = recompute == "auto"
    check_options("none" if automatic else recompute, backend)
    if not automatic and any(option is not None for option in (input_shape, memory, dtype)):
        raise ValueError(
            f'input_shape, memory and dtype go with recompute="auto", got recompute={recompute!r}'
        )
    # What the planner follows is a DenseNet of known classes.
    found = _candidates(model, recognise and not automatic)
    if not any(candidate.kind != "features" for _, candidate in found):
        how = "knows or recognises" if recognise and not automatic else "knows"
        raise ValueError(f"{type(model).__name__} contains no dense block that dense_ext {how}")
    refused = [f"{c.name}: {c.reason}" for _, c in found if c.reason is not None]
    if refused:
        message = "left as they are: " + "; ".join(refused)
        if strict or automatic:
            option = "strict=True" if strict else 'recompute="auto"'
            raise ValueError(f"dense_ext.swap({option}): {message}")
        warnings.warn(f"dense_ext.swap: {message}", stacklevel=2)
    policies = policies_that_fit(model, input_shape, memory, dtype, backend) if automatic else {}
    for adapter, candidate in found:
        adapter.swap(candidate, policies.get(candidate.name, recompute), backend)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`swap`, in place; returns ``model``. What was never swapped stays as it is."""
    for adapter in adapters():
        adapter.restore(model)
    restore_recognised(model)
    return model


@contextmanager
def restored(model: Model) -> Iterator[Model]:
    """The original model inside the context, the swapped one with its options behind it.

    For tools that need the original's classes: ``with dense_ext.restored(model): tool(model)``. Tracing,
    scripting and exporting do not: they see the original's operators anyway.
    """
    own = (*ADDED, "forward")
    swapped = [
        (module, type(module), {name: module.__dict__[name] for name in own if name in module.__dict__})
        for module in model.modules()
        if isinstance(module, Fused)
    ]
    restore(model)
    try:
        yield model
    finally:
        for module, kind, attributes in swapped:
            module.__class__ = kind
            module.__dict__.update(attributes)


def report(model: nn.Module) -> Report:
    """What runs each dense part of ``model``: a table to print, rows to read.

    A row is a dense block, transition or stem: fused with its recompute policy and the backend
    that serves it for the parameters' device and dtype, or the reason why it is not.
    """
    return Report([*served_by(model), *(
        Row(c.name, c.kind, "eager", "", c.reason or "not swapped")
        for _, c in _candidates(model, recognise=True)
        if not c.swapped and c.kind != "features"
    )])  # fmt: skip
