"""What commands print: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..benchmark.results import Results

_WIDE = 200  # columns


def print_json(results: Results | dict[str, Any]) -> None:
    from ..benchmark.results import as_json

    print(as_json(results))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on stdout; all columns but the first ``left`` hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width to fit: rows stay whole.
    Console(width=None if sys.stdout.isatty() else _WIDE, markup=False, emoji=False).print(table)


def remark(text: str) -> None:
    """A line on stderr."""
    Console(stderr=True, markup=False, emoji=False).print(text, highlight=False, soft_wrap=True)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, none if that is no terminal; call what it gives before each part."""
    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        begun = False

        def tick(text: str) -> None:
            nonlocal begun
            bar.update(task, description=text, advance=1 if begun else 0, refresh=True)
            begun = True

        yield tick
