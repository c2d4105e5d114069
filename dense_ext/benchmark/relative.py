"""Speeds read from a result: what each peer's samples say, and how they stand to the fastest other's."""

from __future__ import annotations

import statistics
from typing import Any

from .compare import rows_of
from .results import Results
from .timing import spread

Speed = dict[str, Any]


def references(results: Results) -> dict[str, list[str]]:
    """What speeds are set against: by its name, the peers of which the fastest counts.

    "fastest eager" are those that run PyTorch's operators one by one; "fastest other" is there too where
    some were compiled or recorded as a graph. Peers without samples are left out, and so is dense_ext.
    """
    timed = {row["peer"] for row in rows_of(results) if row["seconds"]}
    modes = {
        name: p.get("mode", "eager")
        for name, p in results["peers"].items()
        if name in timed and not p["ours"]
    }
    eager = [name for name, mode in modes.items() if mode == "eager"]
    found = {"fastest eager": eager} if eager else {}
    return {**found, "fastest other": list(modes)} if len(modes) > len(eager) else found


def fastest(results: Results, case: dict[str, Any], peers: list[str]) -> float | None:
    """The shortest median in seconds of a case among ``peers``, None if none has samples."""
    medians = [
        statistics.median(row["seconds"])
        for row in rows_of(results)
        if row["case"] == case and row["seconds"] and row["peer"] in peers
    ]
    return min(medians, default=None)


def ratios(results: Results, case: dict[str, Any], seconds: float) -> dict[str, float | None]:
    """How many times as fast as each of the :func:`references` a call of ``seconds`` is."""
    best = {name: fastest(results, case, peers) for name, peers in references(results).items()}
    return {name: least / seconds if least else None for name, least in best.items()}


def speeds(results: Results) -> dict[str, Speed]:
    """From a quick run's samples, by peer: seconds (median, min, max), images/s and what they mean.

    ``ratios`` are those of the median; ``matmul_share`` is the step's arithmetic over the machine's rate
    of matrix products. Empty where no peer but dense_ext has samples.
    """
    if not references(results):
        return {}
    batch, work = results["options"]["batch"], results["work"]
    ideal = batch * work["step_flops_per_image"] / work["matmul_flops_per_second"]
    found = {}
    for row in rows_of(results):
        if row["seconds"]:
            s = spread(row["seconds"])
            found[row["peer"]] = {
                **s,
                "images_per_second": batch / s["median"],
                "ratios": ratios(results, row["case"], s["median"]),
                "matmul_share": ideal / s["median"],
            }
    return found
