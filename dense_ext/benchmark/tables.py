"""Tables of a result: as commands print them, the report shows them and the README has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .results import Case, Measurement, Results, case_text

Draw = Callable[[Results, Path], None]  # writes a figure of a result into a file


@dataclass(frozen=True)
class Table:
    """Cells as text; all columns but the first ``left`` hold numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    caption: str = ""

    def without_empty_columns(self) -> Table:
        """The table without number columns in which no row has a number."""
        kept = [
            i for i in range(len(self.header)) if i < self.left or any(row[i] != "-" for row in self.rows)
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.title, [self.header[i] for i in kept], rows, self.left, self.caption)


EMPTY = Table("", (), ())


class Kind:
    """A kind of result, and what it looks like: tables, which may be empty, and figures, by name."""

    name: ClassVar[str]  # in result files and on the command line
    title: ClassVar[str]  # of its section in the report

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        raise NotImplementedError

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        """Tables for the README and the documentation, made of what the others say."""
        return {}

    @classmethod
    def figures(cls, results: Results) -> dict[str, Draw]:
        raise NotImplementedError


def failures(results: Results) -> Table:
    """Which peers were not measured, and why."""
    grouped: dict[tuple[str, str], list[Case]] = {}
    for row in results.rows:
        if row.failure is not None:
            grouped.setdefault((results.label(row), row.failure), []).append(row.case)
    rows = [
        (peer, case_text(cases[0]) if len(cases) == 1 else f"{len(cases)} cases", failure)
        for (peer, failure), cases in grouped.items()
    ]
    return Table("not measured", ("peer", "where", "why"), rows, left=3)


def machine_name(results: Results) -> str:
    """The GPU, or the CPU and how many threads ran on it."""
    machine, gpu = results.machine, results.options["device"].startswith("cuda")
    return machine["gpu"]["name"] if gpu else f"{machine['cpu']}, threads: {machine['threads']}"


def number(value: float | None, spec: str) -> str:
    """A number, or that it was not finite."""
    return "not finite" if value is None else format(value, spec)


def megabytes(row: Measurement, measure: str, spec: str = ".1f", share: float = 1) -> str:
    """A measure in MB over ``share``, "-" where it was not measured."""
    return format(row.measures[measure] / 1e6 / share, spec) if measure in row.measures else "-"


def seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.5 else f"{value:.4g}"


def spread(row: Measurement, text: Callable[[float], str] = seconds) -> tuple[str, str]:
    """Median, and fastest to slowest sample."""
    return text(row.median), f"{text(min(row.seconds))} to {text(max(row.seconds))}"


def ratio_columns(results: Results) -> list[str]:
    """The headings of what speeds are set against."""
    return [f"{name} = 1" for name in results.references()]


def ratio_cells(results: Results, row: Measurement) -> list[str]:
    """The cells below them."""
    return ["-" if ratio is None else f"{ratio:.2f}" for ratio in results.ratios(row).values()]
