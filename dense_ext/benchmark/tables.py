"""A result's tables, as commands print them and the report shows them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..schedule import RECOMPUTE
from .compare import case_text
from .family import MEMORY_KINDS
from .relative import ratios, references, speeds
from .results import Results

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text; all columns but the first ``left`` hold numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def tables(results: Results) -> list[Table]:
    """Every table the results have data for; of an interrupted run what was measured until then."""
    found = _BY_KIND[results["kind"]](results)
    return [table for table in (*found, _failures(results)) if table.rows]


def _failures(results: Results) -> Table:
    peers = results.get("peers", {})
    rows = [(peer["label"], "", peer["failure"]) for peer in peers.values() if peer.get("failure")]
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in results.get("rows", []):
        if row["failure"] is not None:
            grouped.setdefault((row["peer"], row["failure"]), []).append(case_text(row["case"]))
    for (peer, failure), cases in grouped.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        rows.append((peers[peer]["label"], where, failure))
    return Table("not measured", ("peer", "where", "why"), rows, left=3)


# --- the quick run and the family ----------------------------------------------------------------------


def _bench(results: Results) -> list[Table]:
    return [_memory(results), _speed(results), _depth(results)]


def _memory(results: Results) -> Table:
    options, memory = results["options"], results.get("memory", {})
    largest = max((m["saved_bytes_per_image"] for m in memory.values()), default=0)
    images = f"{options['memory_batch']} images of {options['memory_size']}x{options['memory_size']}"
    setting = f"{options['model']}, {images}, {options['dtype']}"
    return Table(
        f"memory of a training step in MB (1e6 bytes) per image: {setting}",
        ("peer", "kept for backward", "largest / this", "allocator's peak"),
        [
            (
                results["peers"][name]["label"],
                f"{m['saved_bytes_per_image'] / 1e6:.1f}",
                f"{largest / m['saved_bytes_per_image']:.1f}",
                f"{m['peak_bytes_per_image'] / 1e6:.1f}",
            )
            for name, m in memory.items()
        ],
    )


def _speed(results: Results) -> Table:
    options = results["options"]
    images = f"{options['batch']} images of {options['size']}x{options['size']}"
    return Table(
        f"speed of a training step: {options['model']}, {images}, {options['dtype']}",
        ("peer", "seconds", "min to max", "images/s", *ratio_columns(results), "of matmul rate"),
        [
            (
                results["peers"][name]["label"],
                f"{s['median']:.4g}",
                f"{s['min']:.4g} to {s['max']:.4g}",
                f"{s['images_per_second']:.4g}",
                *ratio_cells(s["ratios"]),
                f"{s['matmul_share']:.0%}",
            )
            for name, s in speeds(results).items()
        ],
    )


def ratio_columns(results: Results) -> list[str]:
    """The headings of what speeds are set against."""
    return [f"{name} = 1" for name in references(results)]


def ratio_cells(found: dict[str, float | None]) -> list[str]:
    """The cells below them, from :func:`dense_ext.benchmark.relative.ratios`."""
    return ["-" if ratio is None else f"{ratio:.2f}" for ratio in found.values()]


def _depth(results: Results) -> Table:
    return Table(
        "memory of one dense block against its depth, kept for backward per image",
        ("peer", "layers", "MB at the deepest", "line: kB a layer", "line: R^2"),
        [
            (
                results["peers"][name]["label"],
                f"{d['layers'][0]} to {d['layers'][-1]}",
                f"{d['saved_bytes'][-1] / 1e6:.2f}",
                f"{d['line']['slope'] / 1e3:.3g}",
                f"{d['line']['r2']:.6f}",
            )
            for name, d in results.get("depth", {}).get("peers", {}).items()
        ],
    )


def _models(results: Results) -> list[Table]:
    rows = []
    for row in results["models"]:
        saved = row["saved_bytes_per_image"]
        cells = [f"{saved[kind] / 1e6:.1f}" if kind in saved else "-" for kind in MEMORY_KINDS]
        rows.append((
            row["name"], str(row["size"]), f"{row['parameters'] / 1e6:.2f}",
            f"{row['forward_flops_per_image'] / 1e9:.3g}", *cells,
        ))  # fmt: skip
    title = "kept for backward in MB (1e6 bytes) per image: eager, memory_efficient, dense_ext by recompute"
    costs = Table(title, ("network", "pixels", "M parameters", "GFLOP forward", *MEMORY_KINDS), rows)
    return [costs, _accuracies(results)]


def _accuracies(results: Results) -> Table:
    """Top-1 accuracy beside what it costs, the most accurate network first."""
    known = [row for row in results["models"] if row["imagenet_top1_percent"] is not None]
    kinds = ("default", *RECOMPUTE)
    rows = [
        (
            row["name"],
            f"{row['imagenet_top1_percent']:.2f}",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['forward_flops_per_image'] / 1e9:.3g}",
            *(f"{row['step_bytes'][kind] / 1e9:.2f}" if kind in row["step_bytes"] else "-" for kind in kinds),
        )
        for row in sorted(known, key=lambda row: -row["imagenet_top1_percent"])
    ]
    title = (
        f"ImageNet top-1 accuracy in % ({results['accuracy_source']}) beside what a training step of "
        f"{results['step_batch']} images holds in GB (1e9 bytes): eager, dense_ext by recompute"
    )
    header = ("network", "top-1 %", "M parameters", "GFLOP forward", *kinds)
    return Table(title, header, rows)


def _train(results: Results) -> list[Table]:
    rows = [
        (name, str(len(h)), f"{h[-1]['test_accuracy']:.2%}", _finite(h[-1]["test_loss"], ".3f"),
         f"{sum(epoch['seconds'] for epoch in h):.0f}")
        for name, run in results["runs"].items() if (h := run["history"])
    ]  # fmt: skip
    title = f"training {results['options']['model']} on {results['data']}"
    return [Table(title, ("network", "epochs", "test accuracy", "test loss", "seconds"), rows)]


def _finite(value: float | None, spec: str) -> str:
    """A number, or that it was none."""
    return "not finite" if value is None else format(value, spec)


# --- suites --------------------------------------------------------------------------------------------


def _measured(results: Results, *measures: str) -> list[Row]:
    """The rows with one of these measures, or with samples where "seconds" is asked for."""
    return [
        row
        for row in results["rows"]
        if any(row["seconds"] if name == "seconds" else name in row["measures"] for name in measures)
    ]


def _counted(results: Results) -> list[Table]:
    peers, found = results["peers"], []
    counted = _measured(results, "saved_bytes")
    for vary in dict.fromkeys(row["case"]["vary"] for row in counted):
        rows = [
            (
                peers[row["peer"]]["label"],
                case_text({k: v for k, v in row["case"].items() if k not in ("vary", vary)}),
                str(row["case"][vary]),
                *(
                    f"{row['measures'][name] / 1e6:.2f}" if name in row["measures"] else "-"
                    for name in ("saved_bytes", "peak_bytes", "reserved_bytes", "lasting_bytes")
                ),
            )
            for row in counted
            if row["case"]["vary"] == vary
        ]
        what = vary.replace("_", " ")
        header = ("peer", "network", what, "kept for backward", "peak", "reserved", "lasting")
        found.append(
            Table(f"memory of a training step in MB (1e6 bytes) against {what}", header, rows, left=2)
        )
    for measure, what in (("largest_batch", "largest batch"), ("deepest", "deepest network")):
        rows = [
            (
                peers[row["peer"]]["label"],
                case_text({k: v for k, v in row["case"].items() if k != "budget_bytes"}),
                f"{row['case']['budget_bytes'] / 1e9:g}",
                str(row["measures"][measure]),
            )
            for row in _measured(results, measure)
        ]
        found.append(Table(f"{what} that fits", ("peer", "network", "budget, GB", what), rows, left=2))
    return found


def sides(results: Results, case: dict[str, Any]) -> str:
    """An image's or a volume's size in pixels."""
    return "x".join([str(case["size"])] * (3 if results["kind"] == "volumes" else 2))


def _timed(results: Results) -> list[Table]:
    peers, rates = results["peers"], results.get("work", {}).get("matmul_flops_per_second", {})
    rows = []
    for row in _measured(results, "seconds"):
        case, measures, median = row["case"], row["measures"], statistics.median(row["seconds"])
        rows.append((
            f"{case['model']}, {case['batch']} x {sides(results, case)}, {case['dtype']}",
            peers[row["peer"]]["label"],
            f"{median:.4g}",
            f"{min(row['seconds']):.4g} to {max(row['seconds']):.4g}",
            f"{case['batch'] / median:.4g}",
            *ratio_cells(ratios(results, case, median)),
            f"{measures['flops'] / median / rates[case['dtype']]:.0%}",
            *(f"{measures[n] / 1e6:.1f}" if n in measures else "-" for n in ("saved_bytes", "peak_bytes")),
        ))  # fmt: skip
    what = {"step": "training steps", "inference": "inference", "volumes": "training steps on volumes"}
    header = ("network", "peer", "seconds", "min to max", "images/s", *ratio_columns(results),
              "of matmul rate", "kept, MB", "peak, MB")  # fmt: skip
    return [Table(f"speed of {what[results['kind']]}", header, rows, left=2)]


def _primitives(results: Results) -> list[Table]:
    peers, work = results["peers"], results.get("work", {})
    timed = _measured(results, "seconds")
    unfused: dict[str, float] = {}
    aten_name = next((name for name, peer in peers.items() if not peer["ours"]), None)  # the first
    for row in timed:
        if row["peer"] == aten_name:
            unfused[str(row["case"])] = statistics.median(row["seconds"])
    rows = []
    for row in timed:
        case, measures, median = row["case"], row["measures"], statistics.median(row["seconds"])
        bandwidth, rate = measures["minimum_bytes"] / median, measures["flops"] / median
        aten = unfused.get(str(case))
        rows.append((
            case["primitive"], f"{case['where']}: {case['shape']}", case["dtype"],
            peers[row["peer"]]["label"],
            f"{median * 1e6:.4g}",
            f"{min(row['seconds']) * 1e6:.4g} to {max(row['seconds']) * 1e6:.4g}",
            f"{aten / median:.2f}" if aten else "-",
            f"{bandwidth / 1e9:.3g}", f"{bandwidth / work['copy_bytes_per_second']:.0%}",
            f"{rate / 1e9:.4g}", f"{rate / work['matmul_flops_per_second'][case['dtype']]:.0%}",
            _finite(measures["relative_error"], ".1e"),
        ))  # fmt: skip
    header = ("primitive", "where", "dtype", "by", "median us", "min to max us", "ATen = 1",
              "GB/s at least", "of copy", "GFLOP/s", "of matmul", "error")  # fmt: skip
    return [Table("primitives, from empty caches", header, rows, left=4)]


_BY_KIND = {
    "bench": _bench,
    "models": _models,
    "train": _train,
    "memory": _counted,
    "paper": _counted,
    "step": _timed,
    "inference": _timed,
    "volumes": _timed,
    "primitives": _primitives,
}
