"""Tables of a result: as commands print them, the report shows them and the README has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from .results import Labels, Measurement, Results, case_text

Columns = dict[str, Callable[[Any], str]]  # by heading: the text of a row's cell


@dataclass(frozen=True)
class Table:
    """Cells as text; all columns but the first ``left`` hold numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    caption: str = ""
    short: bool = False  # for the README and the documentation, made of what other tables say

    @classmethod
    def of(cls, title: str, rows: Iterable[Any], columns: Columns, left: int = 1, **how: Any) -> Table:
        """A line for each of ``rows``, without number columns in which no row has a number."""
        rows = list(rows)
        cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
        kept = [name for i, name in enumerate(cells) if i < left or set(cells[name]) != {"-"}]
        return cls(title, kept, list(zip(*map(cells.get, kept), strict=True)), left, **how)

    @classmethod
    def pivot(cls, title: str, cells: Mapping[tuple[str, str], str], corner: str = "", **how: Any) -> Table:
        """Cells by the names of their row and column; "-" where there is none."""
        rows, columns = (dict.fromkeys(names) for names in zip(*cells, strict=True)) if cells else ({}, {})
        lines = [[row, *(cells.get((row, column), "-") for column in columns)] for row in rows]
        return cls(title, [corner, *columns], lines, **how)


EMPTY = Table("", (), ())


class Kind:
    """A kind of result, and what it looks like: its tables by name, which may be empty."""

    name: ClassVar[str]  # in result files and on the command line
    title: ClassVar[str]  # of its section in the report

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        raise NotImplementedError


def failures(results: Results) -> Table:
    """Which peers were not measured, and why."""
    grouped: dict[tuple[str, str], list[Labels]] = {}
    for row in results.rows:
        if row.failure is not None:
            grouped.setdefault((results.label(row), row.failure), []).append(row.case)
    rows = [
        (peer, case_text(cases[0]) if len(cases) == 1 else f"{len(cases)} cases", failure)
        for (peer, failure), cases in grouped.items()
    ]
    return Table("not measured", ("peer", "where", "why"), rows, left=3)


def shown(value: float | None, spec: str, none: str = "-") -> str:
    """A number, or what says that there is none."""
    return none if value is None else format(value, spec)


def megabytes(measure: str, spec: str = ".1f", per_image: bool = False) -> Callable[[Measurement], str]:
    """A column of a measure in MB, "-" where it was not measured."""

    def cell(row: Measurement) -> str:
        share = int(row.case["batch"]) if per_image else 1
        return format(row.measures[measure] / 1e6 / share, spec) if measure in row.measures else "-"

    return cell


def seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.5 else f"{value:.4g}"


def times(unit: str = "s", text: Callable[[float], str] = seconds) -> Columns:
    """Columns of the median, and of the fastest to the slowest sample."""
    return {
        f"median {unit}": lambda row: text(row.median),
        "min to max": lambda row: f"{text(min(row.seconds))} to {text(max(row.seconds))}",
    }


def images_per_second(row: Measurement) -> str:
    return f"{int(row.case['batch']) / row.median:.1f}"


def ratios(results: Results) -> Columns:
    """Columns of how many times as fast as what speeds are set against."""

    def cell(row: Measurement, name: str) -> str:
        return shown(results.ratios(row)[name], ".2f")

    return {f"{name} = 1": partial(cell, name=name) for name in results.references()}
