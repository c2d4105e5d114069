"""Put the order in which ``auto`` tries backends into the shipped table, by what was measured on a machine.

    python benchmarks/preference.py run/primitives_cuda.json run/primitives_triton.json

For each primitive and dtype that more than one backend ran, the backends by the geometric mean of their
times over the shapes that all of them ran. GPUs are NVIDIA's: elsewhere there is one backend to take.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from dense_ext.backends import BACKENDS
from dense_ext.backends.preference import SHIPPED
from dense_ext.backends.table import primitive_of
from dense_ext.benchmark.results import Results, read_results


def measured_rows(results: list[Results]) -> list[dict[str, Any]]:
    """Rows of the table from results of the suite ``primitives``, of one machine."""
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in (row for result in results for row in result.timed()):
        if row.peer in BACKENDS:
            key = primitive_of(str(row.case["primitive"])), str(row.case["dtype"])
            times[key][row.peer][f"{row.case['where']} {row.case['shape']}"] = row.median
    places = [_where(result) for result in results]
    if len({place["where"] for place in places}) > 1:
        raise SystemExit(f"the results are of different machines: {places}")
    measured, gpu, cpu = places[0], results[0].machine["gpu"], results[0].machine["cpu_capability"]
    on = f"sm_{gpu['compute_capability'].replace('.', '')}" if gpu else cpu
    rows = []
    for (primitive, dtype), of_backend in times.items():
        shapes = set.intersection(*(set(t) for t in of_backend.values()))
        if len(of_backend) > 1 and shapes:
            means = {n: statistics.geometric_mean(t[s] for s in shapes) for n, t in of_backend.items()}
            order = sorted(means, key=means.__getitem__)
            rows.append(
                {"primitive": primitive, "on": on, "dtype": dtype, "order": order, "measured": measured}
            )
    return rows


def _where(result: Results) -> dict[str, str | None]:
    gpu = result.machine["gpu"]
    return {
        "where": gpu["name"] if gpu else result.machine["cpu"],
        "when": result.date[:10],
        "torch": result.versions["torch"],
    }


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, a new one in the place of an old one for the same."""
    table = {(row["primitive"], row["on"], row["dtype"]): row for row in (*old, *new)}
    return [table[key] for key in sorted(table)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of dense-ext bench --suite primitives")
    parser.add_argument("--table", type=Path, default=SHIPPED, help="the table to change")
    options = parser.parse_args()
    new = measured_rows([read_results(path) for path in options.results])
    rows = merged(json.loads(options.table.read_text()), new)
    lines = ",\n".join(json.dumps(row) for row in rows)
    options.table.write_text(f"[\n{lines}\n]\n" if rows else "[]\n")
    for row in new:
        print(f"{row['on']} {row['dtype']} {row['primitive']}: {', '.join(row['order'])}")


if __name__ == "__main__":
    main()
