"""``dense-ext tune``: the tables of Triton configurations and of backends, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import torch
import typer

from .console import print_json, print_table, progress, remark
from .options import (
    Device,
    Json,
    check,
    check_choice,
    check_device,
    check_positive,
    check_writable,
    listed,
    option,
)
from .output import end, measure

if TYPE_CHECKING:
    from ..backends.triton.configs import Row
    from ..benchmark.results import Results
    from ..benchmark.suites import Options
    from ..benchmark.suites.primitives import PrimitiveCase
    from ..tuning.triton import Tuned

T = TypeVar("T")


def tune(
    backends: Annotated[
        bool, typer.Option("--backends", help="Measure the order of the backends instead, on any device.")
    ] = False,
    model: Annotated[str, typer.Option(help="Whose layers: a name from dense-ext models.")] = "densenet121",
    batch: Annotated[int | None, option("Images a step.", "64; on a CPU 2")] = None,
    size: Annotated[int | None, option("Height and width in pixels.", "224; CIFAR networks: 32")] = None,
    dtype: Annotated[
        str | None,
        option("float32, bfloat16, float16; --backends takes several.", "bfloat16; --backends: all"),
    ] = None,
    device: Device = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option("--from", help="For --backends: take results of bench --suite primitives instead."),
    ] = None,
    table: Annotated[Path | None, option("The table to improve.", "the user's own")] = None,
    json: Json = False,
) -> None:
    """Measure neighbours of each Triton kernel's configuration on this GPU, and keep the faster ones.

    Writes a table that the Triton backend reads before the one shipped with the package. Rows for
    other shapes and chips that it has stay, and those that nothing is faster than. A faster row is
    written as soon as it is found: Ctrl-C loses none.

    With --backends, measures each primitive in every backend that runs here, on a CPU too, and writes the
    order in which "auto" tries them from then on. Ctrl-C leaves that table as it was.
    """
    from ..benchmark.networks import check_model_name, image_size
    from ..benchmark.step import DTYPES
    from ..benchmark.suites import Options

    check_model_name(model)
    check_positive(batch=batch, size=size)
    dtypes = listed([dtype or (",".join(DTYPES) if backends else "bfloat16")])
    for name in dtypes:
        check_choice("--dtype", name, tuple(DTYPES))
    where = check_device(device)
    batch, size = batch or (64 if where.type == "cuda" else 2), size or image_size(model)
    if backends:
        options = Options(models=(model,), batch=batch, size=size, dtypes=tuple(dtypes), device=str(where))
        _tune_backends(options, measured or [], table, json)
        return
    check(not measured, "--from needs --backends")
    check(len(dtypes) == 1, f"--dtype takes one dtype without --backends, got {dtype}")
    _tune_triton(model, batch, size, dtypes[0], where, table, json)


def _tune_backends(options: Options, measured: list[Path], table: Path | None, json: bool) -> None:
    """Write the order of the backends, as measured here or in result files."""
    from ..backends.preference import read_rows, user_table, write_rows
    from ..benchmark.results import read_results
    from ..tuning.order import measured_rows

    path = table or user_table()
    _read(path, read_rows)
    results = [read_results(file) for file in measured] or [_measure_primitives(options)]
    rows = measured_rows(results)
    interrupted = any(result.interrupted for result in results)
    wrote = bool(rows) and not interrupted
    if wrote:
        write_rows(path, rows)
    if json:
        print_json({"table": str(path), "interrupted": interrupted, "rows": rows})
    else:
        cells = [(row["primitive"], row["dtype"], row["on"], ", ".join(row["order"])) for row in rows]
        header = ("primitive", "dtype", "on", "backends, fastest first")
        print_table("order of the backends", header, cells, left=len(header))
    remark(f"{len(rows)} orders of backends; wrote {path if wrote else 'nothing'}")
    end(interrupted)


def _measure_primitives(options: Options) -> Results:
    from ..benchmark.results import new_results
    from ..benchmark.suites import SUITES

    results = new_results("primitives", options.as_json())
    suite = SUITES["primitives"](options, [], results)
    results.interrupted = measure(suite.run, suite.ticks())
    return results


def _tune_triton(
    model: str, batch: int, size: int, dtype: str, device: torch.device, table: Path | None, json: bool
) -> None:
    """Write the configurations of Triton's kernels that are faster than the table's."""
    from ..backends import unavailable_reasons
    from ..backends.triton.configs import forget_tables, read_rows, trying, user_table, write_rows
    from ..benchmark.step import DTYPES

    path = table or user_table()
    rows: Iterable[Row] = _read(path, lambda path: list(read_rows(path)) if path.exists() else [])
    cases = _cases(model, batch, size)
    reason = unavailable_reasons(device, DTYPES[dtype])["triton"]
    check(reason is None, f"the Triton backend can't run here: {reason}")

    from ..tuning import triton as tuning

    setting = DTYPES[dtype], device
    found: dict[tuning.Key, Tuned] = {}

    def keep(tuned: Tuned) -> None:
        found[tuned.row.key] = tuned
        if tuned.faster:
            write_rows(path, [tuned.row])

    with ExitStack() as stack:
        for row in rows:  # what candidates have to beat
            stack.enter_context(trying(*row.key, row.config))
        with progress(len(cases)) as tick:
            places = tuning.find_places(cases, *setting, tick)
        interrupted = measure(partial(tuning.tune, places, *setting, keep), tuning.ticks(places))
    forget_tables()
    if json:
        print_json({
            "model": model, "batch": batch, "size": size, "dtype": dtype, "table": str(path),
            "interrupted": interrupted, "rows": [tuned.as_json() for tuned in found.values()],
        })  # fmt: skip
    else:
        _print(list(found.values()))
    faster = sum(tuned.faster for tuned in found.values())
    wrote = f"wrote {path}" if faster else "wrote nothing"
    remark(f"{faster} of {len(found)} configurations measured got faster; {wrote}")
    end(interrupted)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """What the table has, which can be written.

    Raises:
        UsageError: it can't be, or is no table.
    """
    check_writable(path)
    from ..benchmark.errors import UsageError

    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _cases(model: str, batch: int, size: int) -> list[PrimitiveCase]:
    """The calls whose kernels are tuned.

    Raises:
        UsageError: the images are too small for the network.
    """
    from ..benchmark.errors import UsageError
    from ..benchmark.suites.primitives import model_cases
    from ..models import MODELS

    try:
        return model_cases(MODELS[model], batch, size)
    except ValueError as error:
        raise UsageError(f"--size {size}: {error}") from error


def _print(found: list[Tuned]) -> None:
    from ..tuning.triton import described

    rows = [
        (
            tuned.row.kernel, tuned.row.shape, f"{tuned.before * 1e6:.1f}", f"{tuned.seconds * 1e6:.1f}",
            described(tuned.row.config) if tuned.faster else "as it was",
        )
        for tuned in found
    ]  # fmt: skip
    header = ("kernel", "shape", "us before", "us", "configuration")
    print_table("configurations of the Triton kernels", header, rows, left=2)
