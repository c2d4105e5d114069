"""Two runs of the same benchmark: what got worse by more than noise explains.

Times are dense_ext's beside those of the other peers in the same round, for a machine is faster on one day
than on another, and all peers with it; without peers in common they are compared as they are. They changed
if the samples of both runs differ by the two-sided Mann-Whitney rank test, at a false discovery rate of 1 %
over all rows (Benjamini and Hochberg), and their medians by more than a threshold, since the rank test knows
the noise within a run but not that between two. Bytes, counts and errors have no samples: each has a share
that it may change by.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .errors import UsageError
from .results import Results

FALSE_DISCOVERY_RATE = 0.01
THRESHOLD = 0.05  # of a median, unless told otherwise
FEWEST_SAMPLES = 5  # on each side: with fewer the rank test cannot reach 1 %

# By how much of itself a measure may get worse. Saved bytes follow from the shapes; a peak depends on
# what libraries need on the way; rounding errors change with the order of a sum.
NOISE = {
    "saved_bytes": 0.001, "lasting_bytes": 0.001, "peak_bytes": 0.02, "reserved_bytes": 0.05,
    "largest_batch": 0.02, "deepest": 0.02, "relative_error": 1.0,
}  # fmt: skip
_MORE_IS_BETTER = ("largest_batch", "deepest")

Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One measure of one row that changed beyond noise.

    Args:
        case, peer, measure: what it is; "time beside others" or "seconds" for the median of the samples,
            "failure" for a row that has none any more. What dense_ext's rows lost without a failure is
            "missing": all "samples", all "measures", or the "row" itself.
        old, new: its values.
        worse: whether this is a regression.
    """

    case: str
    peer: str
    measure: str
    old: float | str | None
    new: float | str | None
    worse: bool

    @property
    def ratio(self) -> float | None:
        """New over old."""
        if isinstance(self.old, (int, float)) and isinstance(self.new, (int, float)) and self.old:
            return self.new / self.old
        return None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Args:
        changes: beyond noise, regressions first.
        compared: rows that both runs have.
        undecided: rows of dense_ext with too few samples to tell their times apart.
        only_old, only_new: rows that one run lacks.
        differences: what else differs between the runs, e.g. the machine, or that one was interrupted.
    """

    changes: list[Change]
    compared: int
    undecided: int
    only_old: list[str]
    only_new: list[str]
    differences: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.worse]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rows_of(results: Results) -> list[Row]:
    """A result's rows: those of a suite, or what the quick run measured of each peer.

    Raises:
        UsageError: it is no benchmark's.
    """
    if "rows" in results:
        return list(results["rows"])
    if results["kind"] != "bench":
        raise UsageError(f"a result of dense-ext {results['kind']} has nothing to compare")
    seconds = results.get("speed", {}).get("seconds", {})
    case = {name: results["options"][name] for name in ("model", "dtype", "batch", "size")}
    return [
        {
            "case": case,
            "peer": name,
            "failure": peer.get("failure"),
            "measures": {
                key.removesuffix("_per_image"): value
                for key, value in results.get("memory", {}).get(name, {}).items()
            },
            "seconds": seconds.get(name, []),
        }
        for name, peer in results["peers"].items()
    ]


def case_text(case: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in case.items())


def _by_key(results: Results) -> dict[str, Row]:
    return {f"{case_text(row['case'])}: {row['peer']}": row for row in rows_of(results)}


def _differences(old: Results, new: Results) -> Iterator[str]:
    for which, results in (("old", old), ("new", new)):
        if results["interrupted"]:
            yield f"{which} result was interrupted, and lacks what came after"
    for name in ("cpu", "threads", "gpu"):
        before, now = old["machine"].get(name), new["machine"].get(name)
        if before != now:
            yield f"machine's {name}: {before}, now {now}"
    for name in ("torch", "torchvision", "timm", "monai", "triton", "cuda"):
        before, now = old["versions"].get(name), new["versions"].get(name)
        if before != now:
            yield f"version of {name}: {before}, now {now}"


def compare(old: Results, new: Results, threshold: float = THRESHOLD) -> Comparison:
    """What changed from one run to another.

    Args:
        old, new: the content of two result files of the same benchmark.
        threshold: share by which a median time must differ.

    Raises:
        UsageError: results of different benchmarks, or without a row in common.
    """
    if old["kind"] != new["kind"]:
        raise UsageError(f"results of different kinds: {old['kind']} and {new['kind']}")
    before, now = _by_key(old), _by_key(new)
    both = [(before[key], now[key]) for key in before if key in now]
    if not both:
        raise UsageError("the results have no row in common")
    changes = [change for a, b in both for change in _measures_changed(a, b)]
    ours = [key for key, row in before.items() if old["peers"][row["peer"]]["ours"]]
    changes += [change for key in ours for change in _missing(before[key], now.get(key))]
    timed = [(a, b) for a, b in both if a["seconds"] and b["seconds"]]
    others = [pair for pair in timed if not old["peers"][pair[0]["peer"]]["ours"]]
    mine = [pair for pair in timed if old["peers"][pair[0]["peer"]]["ours"]]
    decided = [p for p in mine if min(len(row["seconds"]) for row in p) >= FEWEST_SAMPLES]
    changes += _times_changed([_timing(pair, others) for pair in decided], threshold)
    return Comparison(
        sorted(changes, key=lambda change: not change.worse),
        len(both),
        len(mine) - len(decided),
        [key for key in before if key not in now],
        [key for key in now if key not in before],
        [*_differences(old, new), *_drift(others, threshold)],
    )


@dataclass(frozen=True)
class _Timing:
    """The samples of one of dense_ext's rows, in both runs and by the same measure."""

    row: Row
    measure: str
    old: list[float]
    new: list[float]


def _timing(pair: tuple[Row, Row], others: list[tuple[Row, Row]]) -> _Timing:
    """A row's samples over the geometric mean of the others' in the same round, where there are some."""
    row = pair[0]
    rounds = [len(one["seconds"]) for one in pair]
    beside = [
        other for other in others
        if other[0]["case"] == row["case"] and [len(one["seconds"]) for one in other] == rounds
    ]  # fmt: skip
    if not beside:
        return _Timing(row, "seconds", *(one["seconds"] for one in pair))
    relative = (
        [
            seconds / statistics.geometric_mean(in_round)
            for seconds, *in_round in zip(one["seconds"], *(o["seconds"] for o in of_others), strict=True)
        ]
        for one, *of_others in zip(pair, *beside, strict=True)
    )
    return _Timing(row, "time beside others", *relative)


def _drift(others: list[tuple[Row, Row]], threshold: float) -> Iterator[str]:
    """That the machine, or PyTorch, has another speed."""
    ratios = [statistics.median(b["seconds"]) / statistics.median(a["seconds"]) for a, b in others]
    if ratios and abs((ratio := statistics.median(ratios)) - 1) > threshold:
        yield f"speed of the other peers: they take {ratio:.2f} times as long"


def _times_changed(timings: list[_Timing], threshold: float) -> list[Change]:
    if not timings:
        return []
    from scipy.stats import false_discovery_control, mannwhitneyu  # tables are made without it

    p_values = [float(mannwhitneyu(timing.old, timing.new).pvalue) for timing in timings]
    changes = []
    for timing, p in zip(timings, false_discovery_control(p_values), strict=True):
        old, new = statistics.median(timing.old), statistics.median(timing.new)
        if p < FALSE_DISCOVERY_RATE and abs(new / old - 1) > threshold:
            where = case_text(timing.row["case"]), timing.row["peer"]
            changes.append(Change(*where, timing.measure, old, new, new > old))
    return changes


def _missing(old: Row, new: Row | None) -> Iterator[Change]:
    """What a row has no more, and no failure says why."""
    where = case_text(old["case"]), old["peer"]
    if new is None and old["failure"] is None:
        yield Change(*where, "row", "measured", "missing", True)
    if new is not None and new["failure"] is None:
        for part, name in (("seconds", "samples"), ("measures", "measures")):
            if old[part] and not new[part]:
                yield Change(*where, name, "measured", "missing", True)


def _measures_changed(old: Row, new: Row) -> Iterator[Change]:
    where = case_text(old["case"]), old["peer"]
    if (old["failure"] is None) != (new["failure"] is None):
        yield Change(*where, "failure", old["failure"], new["failure"], new["failure"] is not None)
    for name, share in NOISE.items():
        before, now = old["measures"].get(name), new["measures"].get(name)
        if before is not None and now is None and name in new["measures"]:
            yield Change(*where, name, before, "not finite", True)
        if before is None or now is None:
            continue
        high, low = max(before, now), min(before, now)
        if high > low * (1 + share):
            yield Change(*where, name, before, now, (now < before) == (name in _MORE_IS_BETTER))
