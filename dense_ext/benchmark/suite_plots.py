"""Figures of the suites: each function draws one from one result file's rows."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plot_style import INK, machine_name, save, styles, title
from .relative import fastest, references
from .results import Results
from .tables import sides

_TITLES = {"step": "Training steps", "inference": "Inference", "volumes": "Training steps on volumes"}
_DETAILS = ("depth", "growth_rate", "batch", "size", "dtype")


def _legend(figure: Figure, axes: Axes) -> None:
    """The peers below the panels."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=9)


def varied(results: Results) -> list[str]:
    """What the memory was counted against."""
    rows = (row for row in results["rows"] if "saved_bytes" in row["measures"])
    return list(dict.fromkeys(row["case"]["vary"] for row in rows if "vary" in row["case"]))


def memory_lines(results: Results, path: Path, vary: str) -> None:
    """Bytes kept for backward and at peak against ``vary``, a line per peer; its first dtype."""
    rows = [r for r in results["rows"] if r["case"].get("vary") == vary and r["measures"]]
    dtype = rows[0]["case"]["dtype"]
    by_peer: dict[str, list[Any]] = {}
    for row in rows:
        if row["case"]["dtype"] == dtype:
            by_peer.setdefault(row["peer"], []).append(row)
    style = styles(by_peer)
    fixed = ", ".join(f"{n.replace('_', ' ')} {rows[0]['case'][n]}" for n in _DETAILS if n != vary)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for axes, (measure, what) in zip(
            panels, {"saved_bytes": "kept for backward", "peak_bytes": "peak of a step"}.items(), strict=True
        ):
            for name, measured in by_peer.items():
                values = [row["measures"][measure] / 1e6 for row in measured]
                label = results["peers"][name]["label"]
                axes.plot(
                    [row["case"][vary] for row in measured], values, label=label, markersize=4, **style[name]
                )
            axes.set(title=what, xlabel=vary.replace("_", " "), ylabel="MB")
            axes.set_ylim(bottom=0)
        _legend(figure, panels[0])
        title(figure, f"Memory of a training step against {vary.replace('_', ' ')}", fixed)

    save(path, 9, 4 + 0.12 * len(by_peer), draw)


def speed_dots(results: Results, path: Path) -> None:
    """Speed relative to the fastest other network, eager where one is, a row per case and a dot per peer."""
    rows = [row for row in results["rows"] if row["seconds"]]
    cases = list({str(row["case"]): row["case"] for row in rows}.values())
    style = styles(dict.fromkeys(row["peer"] for row in rows))
    reference, among = next(iter(references(results).items()))

    # Within a case's band each peer has its own height, so that equal speeds do not cover each other.
    heights = dict(zip(style, np.linspace(-0.35, 0.35, len(style)) if len(style) > 1 else [0.0], strict=True))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, look in style.items():
            points = [
                (least / statistics.median(row["seconds"]), cases.index(row["case"]) + heights[name])
                for row in rows
                if row["peer"] == name and (least := fastest(results, row["case"], among))
            ]
            if points:
                label = results["peers"][name]["label"]
                axes.plot(*zip(*points, strict=True), label=label, linestyle="", **look)
        axes.grid(axis="y", visible=False)
        axes.axvline(1, color=INK, linewidth=1, linestyle=":")
        axes.set_xlim(left=0)
        axes.set_xlabel(f"speed, {reference} network = 1")
        labels = [f"{c['model']}\n{c['batch']} x {sides(results, c)}, {c['dtype']}" for c in cases]
        axes.set_yticks(range(len(cases)), labels)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        _legend(figure, axes)
        title(figure, _TITLES[results["kind"]], machine_name(results))

    save(path, 9, 1.8 + (0.3 + 0.06 * len(style)) * len(cases) + 0.12 * len(style), draw)


def roofline(results: Results, path: Path, dtype: str) -> None:
    """Operations per second against operations per byte, under what the machine copies and multiplies."""
    work = results["work"]
    copy, matmul = work["copy_bytes_per_second"], work["matmul_flops_per_second"][dtype]
    rows = [row for row in results["rows"] if row["seconds"] and row["case"]["dtype"] == dtype]
    rows = [row for row in rows if row["measures"]["flops"]]
    style = styles(dict.fromkeys(row["peer"] for row in rows))

    def intensity(row: Any) -> float:
        return float(row["measures"]["flops"] / row["measures"]["minimum_bytes"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        found = [intensity(row) for row in rows]
        x = np.geomspace(min(found) / 2, max(*found, matmul / copy) * 2, 100)
        axes.plot(x, np.minimum(x * copy, matmul) / 1e9, color=INK, linewidth=1.5, label="measured ceilings")
        for name, look in style.items():
            mine = [row for row in rows if row["peer"] == name]
            rates = [row["measures"]["flops"] / statistics.median(row["seconds"]) / 1e9 for row in mine]
            label = results["peers"][name]["label"]
            at = [intensity(row) for row in mine]
            axes.plot(at, rates, label=label, linestyle="", markersize=4, alpha=0.7, **look)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
        _legend(figure, axes)
        ceilings = f"copies at {copy / 1e9:.4g} GB/s, multiplies at {matmul / 1e9:.4g} GFLOP/s"
        title(figure, f"Primitives under the roofline, {dtype}", f"{machine_name(results)}: {ceilings}")

    save(path, 9, 5.2, draw)


def suite_figures(results: Results) -> dict[str, Any]:
    """By name, the functions that draw what the rows have data for."""
    if "rows" not in results:
        return {}
    found: dict[str, Any] = {v: partial(memory_lines, vary=v) for v in varied(results)}
    if not any(row["seconds"] for row in results["rows"]):
        return found
    if results["kind"] == "primitives":
        timed = (row["case"]["dtype"] for row in results["rows"] if row["seconds"])
        return {f"roofline-{dtype}": partial(roofline, dtype=dtype) for dtype in dict.fromkeys(timed)}
    return {**found, "throughput": speed_dots} if references(results) else found
