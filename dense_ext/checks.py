"""Refuses bad input before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .backends import check_backend_name
from .backends.base import STORAGE_DTYPES
from .batch_norm import num_features, values_per_channel
from .schedule import RECOMPUTE


def check_options(recompute: str, backend: str, policies: Sequence[str] = RECOMPUTE) -> None:
    """Raise ValueError unless ``recompute`` is one of ``policies``, and ``backend`` a backend's name."""
    if recompute not in policies:
        raise ValueError(f"recompute must be one of {tuple(policies)}, got {recompute!r}")
    check_backend_name(backend)


def check_input(
    where: str, x: Tensor, norm: nn.Module, volumes: bool, minimum: Sequence[int] | None = None
) -> None:
    """Refuse an activation that a dense block, transition or stem cannot take.

    Args:
        where: the module's name, for the message.
        x: expected [N, C, H, W], or for ``volumes`` [N, C, D, H, W], of a floating dtype and with as many
            channels as ``norm``. Signals are images of one row.
        norm: the module's first norm.
        volumes: whether the module is for volumes.
        minimum: the least D, H and W; by default 1.

    Raises:
        TypeError: x is not a tensor, or not of a supported floating dtype.
        ValueError: x has another rank, number of channels or spatial size.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: input must be a torch.Tensor, got {type(x).__name__}")
    shape, channels = tuple(x.shape), num_features(norm)
    if x.dtype not in STORAGE_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in STORAGE_DTYPES)
        raise TypeError(f"{where}: input {shape} has dtype {x.dtype}, expected one of {expected}")
    sizes = ("D", "H", "W") if volumes else ("H", "W")
    if x.dim() != 2 + len(sizes):
        layout = ", ".join(("N", str(channels), *sizes))
        raise ValueError(f"{where}: input must be {2 + len(sizes)}-D [{layout}], got shape {shape}")
    if shape[1] != channels:
        raise ValueError(f"{where}: input {shape} has {shape[1]} channels, expected {channels}")
    least = minimum or [1] * len(sizes)
    if any([length < at_least for length, at_least in zip(shape[2:], least, strict=True)]):  # noqa: C419
        raise ValueError(
            f"{where}: input {shape} is too small, expected at least {max(least)} pixels per side"
        )


def check_batch(where: str, x: Tensor, training: bool) -> None:
    """Raise ValueError if x has only one value per channel in training; eager refuses that too."""
    if training and values_per_channel(x) == 1:
        raise ValueError(
            f"{where}: expected more than 1 value per channel when training, got input {tuple(x.shape)}"
        )


def check_parameters(
    where: str, name: str, parameters: Sequence[Tensor], x: Tensor, dtype: torch.dtype
) -> None:
    """Refuse parameters on another device than x, or of another ``dtype``.

    Vectors may also be float32 if x has 16 bits.

    Raises:
        TypeError: the dtypes can't be combined.
        ValueError: the devices differ.
    """
    # A step's hundreds of parameters share few devices and dtypes, so each combination is checked once.
    for parameter in {(p.device, p.dtype): p for p in reversed(parameters)}.values():
        _check_parameter(where, name, parameter, x, dtype)


def _check_parameter(where: str, name: str, parameter: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if parameter.device != x.device:
        raise ValueError(
            f"{where}: {name} {tuple(parameter.shape)} is on {parameter.device}, "
            f"expected {x.device} like the input {tuple(x.shape)}"
        )
    mixed = (
        parameter.dim() == 1
        and parameter.dtype == torch.float32
        and x.dtype in (torch.bfloat16, torch.float16)
    )
    if parameter.dtype != dtype and not mixed:
        raise TypeError(
            f"{where}: {name} {tuple(parameter.shape)} has dtype {parameter.dtype}, "
            f"expected {dtype} like the input {tuple(x.shape)}"
        )
