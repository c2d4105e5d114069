"""Running a measurement and handing its results over, also when it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .console import print_json, print_table, progress, remark
from .options import check_writable

if TYPE_CHECKING:
    from ..benchmark.results import Results

INTERRUPTED = 130
SAVED_EVERY = 60.0  # seconds


def measure(
    run: Callable[[Callable[[str], None]], None],
    ticks: int,
    results: Results | None = None,
    path: Path | None = None,
) -> bool:
    """Let ``run`` measure, with a progress bar; returns whether Ctrl-C ended it.

    Any other exception is raised again, after what is there was written to the file.

    Args:
        run: is given what to call before each part.
        ticks: how often it will call that.
        results: what it fills.
        path: gets the results so far every minute: a system out of memory kills without a warning.

    Raises:
        UsageError: nothing can be written there; nothing was run.
    """
    from ..benchmark.results import saving, write_json

    if path:
        check_writable(path)
    try:
        with progress(ticks) as tick:
            run(saving(tick, results, path, SAVED_EVERY) if results and path else tick)
    except KeyboardInterrupt:
        return True
    except Exception:
        if results and path:
            write_json(path, results)
            remark(f"wrote {path}: what was measured until it failed")
        raise
    return False


def print_tables(results: Results) -> None:
    """What was measured; an interrupted run leaves some of it out."""
    from ..benchmark.kinds import tables_of

    for table in tables_of(results):
        print_table(table.title, table.header, table.rows, table.left)
        if table.caption:
            print(f"{table.caption}.")
        print()


def publish(
    results: Results,
    path: Path,
    draw: Callable[[Results, Path], list[Path]],
    show: Callable[[Results], None] | None,
) -> None:
    """Write the results and their figures, and print them.

    Args:
        results: what to write.
        path: the JSON file; ``draw`` puts figures beside it.
        draw: ``figures.draw_all``, imported by the command, so that a missing package shows at once.
        show: prints the results, e.g. :func:`print_tables`; None prints the JSON instead.

    Raises:
        typer.Exit: with code 130, if the measurement was interrupted.
    """
    from ..benchmark.results import write_json

    write_json(path, results)
    figures = draw(results, path.parent)
    if show is None:
        print_json(results)
    else:
        show(results)
    remark(f"wrote {', '.join(str(p) for p in (path, *figures))}")
    end(results.interrupted)


def end(interrupted: bool) -> None:
    """Say that results are not complete, where Ctrl-C ended them, and exit with code 130."""
    if interrupted:
        remark("interrupted: these are the results until then")
        raise typer.Exit(INTERRUPTED)
