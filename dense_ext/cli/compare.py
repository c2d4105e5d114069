"""``dense-ext bench --compare``: what got worse from one run to another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .console import print_json, print_table, remark


def compare_files(old: Path, new: Path, threshold: float, json: bool) -> None:
    """Print what changed beyond noise.

    Raises:
        UsageError: a file is no result, or they cannot be compared.
        MeasurementError: something got worse.
    """
    from ..benchmark.compare import FEWEST_SAMPLES, compare
    from ..benchmark.errors import MeasurementError
    from ..benchmark.results import read_results

    found = compare(read_results(old), read_results(new), threshold)
    if json:
        print_json(asdict(found))
    elif found.changes:
        rows = [
            (
                "worse" if change.worse else "better", change.peer, change.case, change.measure,
                _text(change.old), _text(change.new), f"{change.ratio:.3f}" if change.ratio else "",
            )
            for change in found.changes
        ]  # fmt: skip
        header = ("", "peer", "case", "measure", "old", "new", "new / old")
        print_table("changed beyond noise", header, rows, left=4)
    for difference in found.differences:
        remark(f"note: the {difference}")
    for which, keys in (("old", found.only_old), ("new", found.only_new)):
        if keys:
            remark(f"only in the {which} result: {len(keys)} rows, such as {keys[0]}")
    if found.undecided:
        remark(f"{found.undecided} rows have fewer than {FEWEST_SAMPLES} samples: their times say nothing")
    remark(f"{found.compared} rows compared, {len(found.regressions)} measures got worse beyond noise")
    if found.regressions:
        raise MeasurementError(f"{new} is worse than {old}")


def _text(value: float | str | None) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) else value or ""
