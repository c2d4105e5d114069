"""All figures of a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .plots import accuracy_lines, depth_lines, family_bars, memory_bars, throughput_bars, training_curves
from .relative import speeds
from .results import Results
from .suite_plots import suite_figures


def draw_all(results: Results, folder: Path, stem: str = "", suffix: str = ".png") -> list[Path]:
    """Every figure the results have data for, into ``folder``; returns the files.

    Args:
        results: the content of a result file.
        folder: where to.
        stem: put before the figures' names.
        suffix: ".png" or ".svg".
    """
    figures: list[tuple[str, Callable[[Results, Path], None], bool]] = [
        ("memory", memory_bars, bool(results.get("memory"))),
        ("throughput", throughput_bars, results["kind"] == "bench" and bool(speeds(results))),
        ("depth", depth_lines, bool(results.get("depth", {}).get("peers"))),
        ("models", family_bars, bool(results.get("models"))),
        ("accuracy", accuracy_lines, any(r["imagenet_top1_percent"] for r in results.get("models", ()))),
        ("curves", training_curves, any(r["history"] for r in results.get("runs", {}).values())),
        *((name, draw, True) for name, draw in suite_figures(results).items()),
    ]
    drawn = []
    for name, draw, possible in figures:
        if possible:
            path = folder / f"{stem}{name}{suffix}"
            draw(results, path)
            drawn.append(path)
    return drawn
