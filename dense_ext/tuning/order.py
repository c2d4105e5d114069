"""The order of the backends by their times, as ``dense-ext tune --backends`` writes it into a table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..backends import BACKENDS
from ..backends.table import primitive_of
from ..benchmark.errors import UsageError
from ..benchmark.results import Results


def measured_rows(results: Sequence[Results]) -> list[dict[str, Any]]:
    """Rows of :mod:`dense_ext.backends.preference` from results of the suite ``primitives``.

    For each primitive and dtype that more than one backend ran: the backends by the geometric mean of their
    times over the shapes that all of them ran.

    Args:
        results: of one machine; several runs may each have measured some of the backends.

    Raises:
        UsageError: they are of several machines, or of another suite.
    """
    if kinds := {result.kind for result in results} - {"primitives"}:
        raise UsageError(f"the order of backends comes from the suite primitives, not {', '.join(kinds)}")
    places = {(_on(result), str(_measured(result)["where"])) for result in results}
    if len(places) > 1:
        raise UsageError(f"these results are of different machines: {sorted(places)}")
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in (row for result in results for row in result.timed()):
        if row.peer in BACKENDS:
            key = primitive_of(str(row.case["primitive"])), str(row.case["dtype"])
            times[key][row.peer][f"{row.case['where']} {row.case['shape']}"] = row.median
    rows = []
    for (primitive, dtype), of_backend in times.items():
        shapes = set.intersection(*(set(t) for t in of_backend.values()))
        if len(of_backend) > 1 and shapes:
            means = {n: statistics.geometric_mean(t[s] for s in shapes) for n, t in of_backend.items()}
            order = sorted(means, key=means.__getitem__)
            at = {"primitive": primitive, "on": _on(results[0]), "dtype": dtype}
            rows.append({**at, "order": order, "measured": _measured(results[0])})
    return rows


def _on(result: Results) -> str:
    """The device's name in the table. GPUs are NVIDIA's: elsewhere there is one backend to take."""
    gpu, cpu = result.machine["gpu"], result.machine["cpu_capability"]
    return f"sm_{gpu['compute_capability'].replace('.', '')}" if gpu else str(cpu)


def _measured(result: Results) -> dict[str, str | None]:
    gpu = result.machine["gpu"]
    return {
        "where": gpu["name"] if gpu else result.machine["cpu"],
        "when": result.date[:10],
        "torch": result.versions["torch"],
    }
