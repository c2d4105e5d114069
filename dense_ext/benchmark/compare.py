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
from dataclasses import dataclass

from .errors import UsageError
from .results import Measurement, Results, case_text

FALSE_DISCOVERY_RATE = 0.01
THRESHOLD = 0.05  # of a median, unless told otherwise
FEWEST_SAMPLES = 5  # on each side: with fewer the rank test cannot reach 1 %

# By how much of itself a measure may get worse. Saved bytes follow from the shapes; a peak depends on
# what libraries need on the way; rounding errors change with the order of a sum.
NOISE = {
    "saved_bytes": 0.001, "lasting_bytes": 0.001, "peak_bytes": 0.02, "reserved_bytes": 0.05,
    "largest_batch": 0.02, "deepest": 0.02, "relative_error": 1.0,
}  # fmt: skip
_NO_BENCHMARKS = ("models", "train")
_MORE_IS_BETTER = ("largest_batch", "deepest")

Pair = tuple[Measurement, Measurement]  # the same row of the old and the new run


@dataclass(frozen=True)
class Change:
    """One measure of one row that changed beyond noise."""

    case: str
    peer: str
    # "time beside others" or "seconds" for the median of the samples, "failure" for a row that has none any
    # more. What dense_ext's rows lost without a failure: all "samples", all "measures", or the "row" itself.
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
    """What :func:`compare` found."""

    changes: list[Change]  # beyond noise, regressions first
    compared: int  # rows that both runs have
    undecided: int  # rows of dense_ext with too few samples to tell their times apart
    only_old: list[str]  # rows that the other run lacks
    only_new: list[str]
    differences: list[str]  # what else differs, e.g. the machine, or that a run was interrupted

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.worse]


def compare(old: Results, new: Results, threshold: float = THRESHOLD) -> Comparison:
    """What changed from one run to another of the same benchmark.

    Args:
        old, new: the results.
        threshold: share by which a median time must differ.

    Raises:
        UsageError: results of different benchmarks or of none, or without a row in common.
    """
    if old.kind != new.kind:
        raise UsageError(f"results of different kinds: {old.kind} and {new.kind}")
    if old.kind in _NO_BENCHMARKS:
        raise UsageError(f"a result of dense-ext {old.kind} has nothing to compare")
    before, now = ({f"{case_text(row.case)}: {row.peer}": row for row in run.rows} for run in (old, new))
    both = [(before[key], now[key]) for key in before if key in now]
    if not both:
        raise UsageError("the results have no row in common")
    changes = [change for pair in both for change in _measures_changed(*pair)]
    for key, row in before.items():
        if old.ours(row):
            changes += _missing(row, now.get(key))
    timed = [pair for pair in both if pair[0].seconds and pair[1].seconds]
    others = [pair for pair in timed if not old.ours(pair[0])]
    mine = [pair for pair in timed if old.ours(pair[0])]
    decided = [pair for pair in mine if min(len(row.seconds) for row in pair) >= FEWEST_SAMPLES]
    changes += _times_changed(decided, others, threshold)
    return Comparison(
        sorted(changes, key=lambda change: not change.worse),
        len(both),
        len(mine) - len(decided),
        [key for key in before if key not in now],
        [key for key in now if key not in before],
        list(_differences(old, new, others, threshold)),
    )


def _differences(old: Results, new: Results, others: list[Pair], threshold: float) -> Iterator[str]:
    """What else differs: whether they are complete, the machine, the versions, and the others' speed."""
    for which, results in (("old", old), ("new", new)):
        if results.interrupted:
            yield f"{which} result was interrupted, and lacks what came after"
    packages = ("torch", "torchvision", "timm", "monai", "triton", "cuda")
    for what, names, sides in (
        ("machine's ", ("cpu", "threads", "gpu"), (old.machine, new.machine)),
        ("version of ", packages, (old.versions, new.versions)),
    ):
        for name in names:
            before, now = (side.get(name) for side in sides)
            if before != now:
                yield f"{what}{name}: {before}, now {now}"
    ratios = [now.median / before.median for before, now in others]
    if ratios and abs((ratio := statistics.median(ratios)) - 1) > threshold:
        yield f"speed of the other peers: they take {ratio:.2f} times as long"


def _samples(pair: Pair, others: list[Pair]) -> tuple[str, list[list[float]]]:
    """Old and new samples over the geometric mean of the others' in the same round, where there are some."""
    from scipy.stats import gmean

    rounds = [len(row.seconds) for row in pair]
    beside = [
        other for other in others
        if other[0].case == pair[0].case and [len(row.seconds) for row in other] == rounds
    ]  # fmt: skip
    if not beside:
        return "seconds", [row.seconds for row in pair]
    return "time beside others", [
        (row.seconds / gmean([other.seconds for other in of_others])).tolist()
        for row, *of_others in zip(pair, *beside, strict=True)
    ]


def _times_changed(pairs: list[Pair], others: list[Pair], threshold: float) -> Iterator[Change]:
    if not pairs:
        return
    from scipy.stats import false_discovery_control, mannwhitneyu  # tables are made without it

    samples = [_samples(pair, others) for pair in pairs]
    p_values = [float(mannwhitneyu(*runs).pvalue) for _, runs in samples]
    for (row, _), (measure, runs), p in zip(pairs, samples, false_discovery_control(p_values), strict=True):
        old, new = map(statistics.median, runs)
        if p < FALSE_DISCOVERY_RATE and abs(new / old - 1) > threshold:
            yield Change(case_text(row.case), row.peer, measure, old, new, new > old)


def _missing(old: Measurement, new: Measurement | None) -> Iterator[Change]:
    """What a row has no more, and no failure says why."""
    if new is None:
        lost = [] if old.failure else ["row"]
    else:
        parts = {"samples": (old.seconds, new.seconds), "measures": (old.measures, new.measures)}
        lost = [name for name, (before, now) in parts.items() if before and not now and not new.failure]
    for name in lost:
        yield Change(case_text(old.case), old.peer, name, "measured", "missing", True)


def _measures_changed(old: Measurement, new: Measurement) -> Iterator[Change]:
    where = case_text(old.case), old.peer
    if (old.failure is None) != (new.failure is None):
        yield Change(*where, "failure", old.failure, new.failure, new.failure is not None)
    for name, share in NOISE.items():
        before, now = old.measures.get(name), new.measures.get(name)
        if before is not None and now is None and name in new.measures:
            yield Change(*where, name, before, "not finite", True)
        elif before is not None and now is not None and max(before, now) > min(before, now) * (1 + share):
            yield Change(*where, name, before, now, (now < before) == (name in _MORE_IS_BETTER))
