"""Bad input is refused here, before anything is written: one function per operator's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .backends import check_backend_name
from .backends.base import STORAGE_DTYPES
from .batch_norm import num_features, values_per_channel
from .schedule import RECOMPUTE


def check_options(recompute: str, backend: str) -> None:
    """Raise ValueError for an unknown recompute policy or backend."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")
    check_backend_name(backend)


def check_input(where: str, x: Tensor, norm: nn.BatchNorm2d, minimum_size: int = 1) -> None:
    """Refuse an activation that a dense block, transition or stem cannot take.

    Args:
        where: the module's name, for the message.
        x: expected [N, C, H, W], for a norm of volumes [N, C, D, H, W], with C = ``norm.num_features``,
            floating, and D, H and W >= ``minimum_size``.
        norm: the module's first norm.

    Raises:
        TypeError: not a tensor, or not of a floating dtype that is served.
        ValueError: another rank, channel count or spatial size; or, where the norm uses the batch's
            statistics, a single value per channel.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: input must be a torch.Tensor, got {type(x).__name__}")
    shape, channels = tuple(x.shape), num_features(norm)
    if x.dtype not in STORAGE_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in STORAGE_DTYPES)
        raise TypeError(f"{where}: input {shape} has dtype {x.dtype}, expected one of {expected}")
    sizes = ("D", "H", "W") if isinstance(norm, nn.BatchNorm3d) else ("H", "W")
    if x.dim() != 2 + len(sizes):
        layout = ", ".join(("N", str(channels), *sizes))
        raise ValueError(f"{where}: input must be {2 + len(sizes)}-D [{layout}], got shape {shape}")
    if shape[1] != channels:
        raise ValueError(f"{where}: input {shape} has {shape[1]} channels, expected {channels}")
    if min(shape[2:]) < minimum_size:
        raise ValueError(
            f"{where}: input {shape} is too small, expected at least {minimum_size} pixels a side"
        )


def check_batch(where: str, x: Tensor, training: bool) -> None:
    """Refuse one value per channel where a norm in training mode would take its variance, as eager does."""
    if training and values_per_channel(x) == 1:
        raise ValueError(
            f"{where}: expected more than 1 value per channel when training, got input {tuple(x.shape)}"
        )


def check_parameters(where: str, name: str, parameters: Sequence[Tensor], x: Tensor) -> None:
    """Refuse parameters on another device than x, or of a dtype that does not go with it.

    A convolution's weight has x's dtype. A norm's may also be float32 beside 16-bit activations.

    Raises:
        TypeError: the dtypes do not go together.
        ValueError: the devices differ.
    """
    # Hundreds of parameters a step have one device and one dtype: look at each combination once.
    for parameter in {(p.device, p.dtype): p for p in reversed(parameters)}.values():
        _check_parameter(where, name, parameter, x)


def _check_parameter(where: str, name: str, parameter: Tensor, x: Tensor) -> None:
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
    if parameter.dtype != x.dtype and not mixed:
        raise TypeError(
            f"{where}: {name} {tuple(parameter.shape)} has dtype {parameter.dtype}, "
            f"expected {x.dtype} like the input {tuple(x.shape)}"
        )
