"""Options of several commands, and checking options before anything is measured or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..backends import check_backend_name, unavailable_reasons
from ..benchmark.errors import UsageError


def option(help: str, default: str) -> typer.models.OptionInfo:
    """An option whose default is said in words, because it depends on others."""
    return typer.Option(help=f"{help} (default: {default})", show_default=False)


Backend = Annotated[str, typer.Option(help="dense_ext's backend.")]
Device = Annotated[str | None, option("cpu or cuda.", "a GPU if there is one")]
Out = Annotated[Path, typer.Option(help="Folder for results and figures.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def listed(values: list[str]) -> list[str]:
    """A repeatable option whose values may also be separated by commas."""
    return [name for value in values for name in value.replace(" ", "").split(",") if name]


def check(condition: bool, message: str) -> None:
    """Raise UsageError with ``message`` unless the condition holds."""
    if not condition:
        raise UsageError(message)


def check_positive(**options: int | float | None) -> None:
    """Raise UsageError for an option below one; None means it was left out."""
    for name, value in options.items():
        check(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_writable(path: Path) -> None:
    """Raise UsageError unless a file can be made there, in folders that may have to be made first."""
    check(not path.is_dir(), f"{path} is a folder")
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    check(folder.is_dir(), f"{folder} is not a folder")
    check(os.access(folder, os.W_OK | os.X_OK), f"{folder} can't be written to")


def check_new(path: Path, overwrite: bool) -> None:
    """Raise UsageError if ``path`` holds results that would be lost."""
    check(overwrite or not path.exists(), f"{path} exists; pass --overwrite or another --out")


def check_device(name: str | None) -> torch.device:
    """The device of this name, a GPU if there is one and none is named.

    Raises:
        UsageError: torch does not know it, or it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    check(device.type in ("cpu", "cuda"), f"--device must be cpu or cuda, got {name}")
    present = device.type == "cpu" or (device.index or 0) < torch.cuda.device_count()
    check(present, f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream and clock are measured
    return device


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError unless the backend exists and runs here."""
    try:
        check_backend_name(name)
    except ValueError as error:
        raise UsageError(f"--backend: {error}") from error
    reason = None if name == "auto" else unavailable_reasons(device, dtype)[name]
    check(reason is None, f"--backend {name}: {reason}")


def check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``known``."""
    check(value in known, f"{option} must be one of {', '.join(known)}; got {value!r}")
