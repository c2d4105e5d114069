"""``dense-ext tune``: the Triton kernels' configurations, measured on this GPU."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from .console import print_json, print_table, progress, remark
from .options import Json, check, check_choice, check_positive, check_writable, default_size, option
from .output import end, measure

if TYPE_CHECKING:
    from ..backends.triton.configs import Row
    from ..benchmark.primitives import PrimitiveCase
    from ..benchmark.tune import Tuned

DEVICE = "cuda"


def tune(
    model: Annotated[str, typer.Option(help="Whose layers: a name from dense-ext models.")] = "densenet121",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    size: Annotated[int | None, option("Height and width in pixels.", "224; CIFAR networks: 32")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    table: Annotated[Path | None, option("The table to improve.", "the user's own")] = None,
    json: Json = False,
) -> None:
    """Measure neighbours of each Triton kernel's configuration on this GPU, and keep the faster ones.

    Writes a table that the Triton backend reads before the one shipped with the package. Rows for
    other shapes and chips that it has stay, and those that nothing is faster than. A faster row is
    written as soon as it is found: Ctrl-C loses none.
    """
    from ..backends import unavailable_reasons
    from ..backends.triton.configs import forget_tables, trying, user_table, write_rows
    from ..benchmark.networks import check_model_name
    from ..benchmark.step import DTYPES

    check_model_name(model)
    check_positive(batch=batch, size=size)
    check_choice("--dtype", dtype, tuple(DTYPES))
    path, size = table or user_table(), size or default_size(model)
    rows = _rows(path)
    cases = _cases(model, batch, size)
    reason = unavailable_reasons(DEVICE, DTYPES[dtype])["triton"]
    check(reason is None, f"the Triton backend can't run here: {reason}")

    from ..benchmark import tune as tuning

    setting = DTYPES[dtype], torch.device(DEVICE)
    found: dict[tuning.Key, Tuned] = {}

    def keep(tuned: Tuned) -> None:
        found[tuned.row.key] = tuned
        if tuned.faster:
            write_rows(path, [tuned.row])

    results: dict[str, Any] = {
        "model": model, "batch": batch, "size": size, "dtype": dtype, "table": str(path), "interrupted": True
    }  # fmt: skip
    with ExitStack() as stack:
        for row in rows:  # what candidates have to beat
            stack.enter_context(trying(*row.key, row.config))
        with progress(len(cases)) as tick:
            places = tuning.find_places(cases, *setting, tick)
        measure(partial(tuning.tune, places, *setting, keep), tuning.ticks(places), results)
    forget_tables()
    if json:
        print_json(results | {"rows": [tuned.as_json() for tuned in found.values()]})
    else:
        _print(list(found.values()))
    faster = sum(tuned.faster for tuned in found.values())
    wrote = f"wrote {path}" if faster else "wrote nothing"
    remark(f"{faster} of {len(found)} configurations measured got faster; {wrote}")
    end(results)


def _rows(path: Path) -> list[Row]:
    """The rows of the table, which can be written.

    Raises:
        UsageError: it can't be, or is no table.
    """
    from ..backends.triton.configs import read_rows
    from ..benchmark.errors import UsageError

    check_writable(path)
    try:
        return list(read_rows(path)) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _cases(model: str, batch: int, size: int) -> list[PrimitiveCase]:
    """The calls whose kernels are tuned.

    Raises:
        UsageError: the images are too small for the network.
    """
    from ..benchmark.errors import UsageError
    from ..benchmark.primitives import model_cases
    from ..models import MODELS

    try:
        return model_cases(MODELS[model], batch, size)
    except ValueError as error:
        raise UsageError(f"--size {size}: {error}") from error


def _print(found: list[Tuned]) -> None:
    from ..benchmark.tune import described

    rows = [
        (
            tuned.row.kernel, tuned.row.shape, f"{tuned.before * 1e6:.1f}", f"{tuned.seconds * 1e6:.1f}",
            described(tuned.row.config) if tuned.faster else "as it was",
        )
        for tuned in found
    ]  # fmt: skip
    header = ("kernel", "shape", "us before", "us", "configuration")
    print_table("configurations of the Triton kernels", header, rows, left=2)
