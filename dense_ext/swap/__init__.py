"""Swap the dense parts of an existing DenseNet for fused ones, in place, and restore the originals.

A swapped module stays the same object; only its class changes, to one that inherits from the original and
replaces ``forward``. So parameters, buffers, hooks, names, mode, dtype and device stay the same, and
``isinstance`` still holds. The original's forward runs whenever a call can't be fused.
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
from ..recognise import Recognised, wants_copies
from ..schedule import RECOMPUTE
from .adapter import ADDED, Adapter, Candidate, adapters, called_one_by_one, outputs_kept_anyway
from .automatic import policies_that_fit
from .recognition import Recognition, restore_recognised
from .report import Report, Row, swapped_rows

__all__ = ["Report", "Row", "report", "restore", "restored", "swap"]

Model = TypeVar("Model", bound=nn.Module)


def _candidates(
    model: nn.Module, traces: bool, finds_blocks: bool = True
) -> tuple[list[tuple[Adapter | Recognition, Candidate]], set[nn.Module]]:
    """Every part of the model that an adapter knows or that tracing finds; not all can be swapped.

    Recognition checks the modules that adapters do not know, and those that they refuse.

    Args:
        model: the model; it is not changed.
        traces: whether to trace modules of unknown classes.
        finds_blocks: whether tracing looks for blocks, too, or only for stems and transitions that a forward
            calls one by one.

    Returns:
        The parts with what swaps them, and the norms that tracing serves although they are called one by one.
    """
    found: list[tuple[Adapter | Recognition, Candidate]] = [
        (adapter, candidate) for adapter in adapters() for candidate in adapter.candidates(model)
    ]
    if not traces:
        return found, set()
    in_pieces = {module for module, _ in called_one_by_one(model)}
    around = {c.module for _, c in found if c.kind in ("features", "stem")}
    accepted = {c.module for _, c in found if c.reason is None} - around
    recognition = Recognition(model, accepted, around, in_pieces, finds_blocks)
    served = recognition.served
    found = [(a, c) for a, c in found if c.module not in in_pieces or served.isdisjoint(c.module.children())]
    more = list(recognition.candidates(model))
    recognised = {candidate.module for candidate in more if candidate.reason is None}
    # If both refuse a module, give the adapter's reason, which is more specific.
    refused = {candidate.module for _, candidate in found} - recognised
    return [
        *((adapter, c) for adapter, c in found if c.module not in recognised),
        *((recognition, c) for c in more if c.reason is None or not refused & set(c.module.modules())),
    ], served


def _called_whole(by: Adapter | Recognition, candidate: Candidate) -> bool:
    """Whether a candidate is a block or transition that is a module, not pieces that a forward calls."""
    if isinstance(by, Recognition):
        return candidate.module in by.plans or isinstance(candidate.module, Recognised)
    return candidate.kind in ("dense block", "transition")


def _reasons(candidates: Sequence[Candidate]) -> str:
    """The refused candidates with their reasons, those with the same reason together."""
    names: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate.reason is not None:
            names.setdefault(candidate.reason, []).append(candidate.name or "the model")
    shown = {
        reason: ", ".join(of[:3]) + (f" and {len(of) - 3} more" if len(of) > 3 else "")
        for reason, of in names.items()
    }
    return "; ".join(f"{of}: {reason}" for reason, of in shown.items())


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

    ``state_dict()`` keys and order, Parameter objects, buffers, train/eval mode, ``requires_grad``, dtype and
    device stay the same. A part that can't be fused exactly stays unchanged; one warning and :func:`report`
    give the reason. Swapping again changes the options.

    Args:
        model: any densely connected network. Classes of torchvision, timm, MONAI and
            TorchXRayVision are known; other modules are recognised by what their forward computes.
        recompute: as for :class:`dense_ext.DenseBlock`, or ``"auto"``. A block whose output is kept anyway,
            because the next transition is called child by child and not fused, takes ``"bottleneck"`` instead
            of ``"block"``. ``"auto"`` chooses each block's policy so that a training step with AdamW's state
            fits into memory and recomputes as little as possible (:meth:`dense_ext.memory.Planner.choose`).
            The model must then be a DenseNet for images (on a CPU also for volumes), or contain one;
            input_shape is that of the DenseNet's input. The activations of a model around it, such as a
            decoder's, are not counted: subtract them from ``memory``.
        backend: as for :class:`dense_ext.DenseBlock`.
        strict: whether to raise, before anything is changed, if a part can't be fused.
        recognise: whether to trace modules of unknown classes, and fuse those that compute dense blocks or
            transitions, and forwards that call a stem's or transition's modules one by one. Each traced
            module is compared with its original in float64 once, which takes seconds. With False, only known
            classes are fused.
        input_shape: for ``"auto"``, the shape [N, C, H, W] of a step's images, or [N, C, D, H, W] of its
            volumes.
        memory: for ``"auto"``, the memory to fit into, in bytes or as in ``"80GiB"``; None for the memory
            that the model's device has available to this process.
        dtype: for ``"auto"``, the activations' dtype under autocast; None for the parameters' dtype.

    Raises:
        TypeError: model is not a module, or memory is not a size.
        ValueError: an option is unknown, or the model has no dense block. With ``strict``: a part can't be
            fused. With ``"auto"``: input_shape is missing, there is no DenseNet whose parts can all be fused,
            or no policy fits. Without ``"auto"``: input_shape, memory or dtype is given. The model is
            then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    automatic = recompute == "auto"
    check_options(recompute, backend, (*RECOMPUTE, "auto"))
    if not automatic and any(option is not None for option in (input_shape, memory, dtype)):
        raise ValueError(
            f'input_shape, memory and dtype go with recompute="auto", got recompute={recompute!r}'
        )
    # The planner supports only DenseNets of known classes.
    found, served = _candidates(model, recognise, finds_blocks=not automatic)
    refused = _reasons([candidate for _, candidate in found])
    if all(c.kind == "features" or (c.reason and isinstance(by, Recognition)) for by, c in found):
        how = "knows or recognises" if recognise and not automatic else "knows"
        why = f" ({refused})" if refused else ""
        raise ValueError(f"{type(model).__name__} contains no dense block that dense_ext {how}{why}")
    if refused:
        message = f"left as they are: {refused}"
        if strict or automatic:
            option = "strict=True" if strict else 'recompute="auto"'
            raise ValueError(f"dense_ext.swap({option}): {message}")
        warnings.warn(f"dense_ext.swap: {message}", stacklevel=2)
    policies = policies_that_fit(model, input_shape, memory, dtype, backend) if automatic else {}
    kept_anyway = outputs_kept_anyway(model, served) if recompute == "block" else set()
    parts = {c.name: c.module for by, c in found if c.reason is None and _called_whole(by, c)}
    copies = wants_copies(model, parts) if recognise else set(parts)
    for adapter, candidate in found:
        policy = "bottleneck" if candidate.module in kept_anyway else recompute
        returns_copy = candidate.name in copies
        adapter.swap(candidate, policies.get(candidate.name, policy), backend, returns_copy)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`swap` in place; returns ``model``. Modules that were never swapped stay unchanged."""
    for adapter in adapters():
        adapter.restore(model)
    restore_recognised(model)
    return model


@contextmanager
def restored(model: Model) -> Iterator[Model]:
    """Restore the original model inside the context, and swap it back with the same options afterwards.

    Some tools need the original's classes: ``with dense_ext.restored(model): tool(model)``. Tracing,
    scripting and exporting do not; they record the original's operators in any case.
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
    """How each dense part of ``model`` runs: a table to print, with ``rows`` to read.

    There is a row for each dense block, transition and stem. If the part is fused, the row gives its
    recompute policy and the backends for the parameters' device and dtype; else the reason why it is not
    fused.
    """
    return Report([*swapped_rows(model), *(
        Row(c.name, c.kind, "eager", "", c.reason or "not swapped")
        for _, c in _candidates(model, traces=True)[0]
        if not c.swapped and c.kind != "features"
    )])  # fmt: skip
