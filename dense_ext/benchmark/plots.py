"""Figures of the quick run, the family and trainings: each function draws one from one result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..schedule import RECOMPUTE
from .family import MEMORY_KINDS
from .plot_style import (
    BEHIND_TEXT,
    BLUE,
    COLOURS,
    GREEN,
    INK,
    RED,
    horizontal,
    save,
    setting,
    styles,
    title,
)  # fmt: skip
from .relative import references, speeds
from .results import Results


def _label(x: float, y: float, ha: str, va: str) -> dict[str, Any]:
    """Where a point's label stands, in points of a font."""
    return {"xytext": (x, y), "textcoords": "offset points", "ha": ha, "va": va}


# A line of networks: which, what runs them, how it is drawn, and where the labels do not overlap.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "ResNets, eager": ("resnet", "default", {"color": BLUE, "marker": "s"}, _label(5, -4, "left", "top")),
    "DenseNets, eager": (
        "densenet", "default", {"color": RED, "marker": "o"}, _label(5, -5, "center", "top"),
    ),
    "DenseNets, dense_ext with recompute bottleneck": (
        "densenet", "bottleneck", {"color": GREEN, "marker": "D"}, _label(8, -3, "left", "center"),
    ),
}  # fmt: skip


def memory_bars(results: Results, path: Path) -> None:
    """Saved and peak MB per image of each peer."""
    measured, options = results["memory"], results["options"]
    colours = [style["color"] for style in styles(measured).values()]
    panels = {
        "saved_bytes_per_image": "kept for backward",
        "peak_bytes_per_image": "allocator's peak in a step",
    }

    def draw(figure: Figure) -> None:
        for axes, (key, what) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            values = [m[key] / 1e6 for m in measured.values()]
            bars = axes.barh(range(len(values)), values, color=colours, height=0.7)
            axes.bar_label(bars, [f"{v:.1f}" for v in values], padding=3)
            axes.set_xlim(0, max(values) * 1.2)
            axes.set(xlabel="MB per image", title=what)
            labels = [results["peers"][name]["label"] for name in measured]
            horizontal(axes, labels if key == "saved_bytes_per_image" else [""] * len(labels))
        images = setting(results, options["memory_batch"], options["memory_size"])
        title(figure, "Memory of a training step", images)

    save(path, 9, 1.6 + 0.36 * len(measured), draw)


def throughput_bars(results: Results, path: Path) -> None:
    """Images per second relative to the fastest eager peer, with the spread of the samples."""
    speed, options = speeds(results), results["options"]
    reference = next(iter(references(results)))
    values = list(speed.values())
    medians = [s["ratios"][reference] for s in values]
    slowest, quickest = ([r * s["median"] / s[end] for r, s in zip(medians, values, strict=True)]
                         for end in ("max", "min"))  # fmt: skip
    right = max(quickest)
    spread = [np.subtract(medians, slowest), np.subtract(quickest, medians)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(
            range(len(values)),
            medians,
            xerr=spread,
            color=[style["color"] for style in styles(speed).values()],
            height=0.7,
            error_kw={"ecolor": INK, "capsize": 3, "linewidth": 1},
        )
        for i, (ratio, end, s) in enumerate(zip(medians, quickest, values, strict=True)):
            text = f"{ratio:.2f}x   {s['images_per_second']:.3g} images/s"
            axes.text(end + 0.02 * right, i, text, va="center", bbox=BEHIND_TEXT)
        axes.axvline(1, color=INK, linewidth=1, linestyle=":")
        axes.set_xlim(0, right * 1.4)
        axes.set_xlabel(f"speed, {reference} network = 1: median, and slowest to fastest sample")
        horizontal(axes, [results["peers"][name]["label"] for name in speed])
        images = setting(results, options["batch"], options["size"])
        title(figure, "Training step: forward, backward, SGD", images)

    save(path, 9, 1.6 + 0.36 * len(values), draw)


def depth_lines(results: Results, path: Path) -> None:
    """Saved MB per image of one dense block against its number of layers."""
    study, peers = results["depth"]["peers"], results["peers"]
    block, dtype = results["depth"]["block"], results["options"]["dtype"]
    style = styles(study)

    def draw(figure: Figure) -> None:
        every, linear = figure.subplots(1, 2)
        for name, measured in study.items():
            megabytes = [b / 1e6 for b in measured["saved_bytes"]]
            line: Any = {**style[name], "markersize": 4}
            label = peers[name]["label"].replace(", channels_last", "")
            quadratic = name in ("eager", "eager-cl")
            for axes in (every,) if quadratic else (every, linear):
                axes.plot(measured["layers"], megabytes, label=label, **line)
        every.set_title("every peer")
        linear.set_title("all but eager")
        for axes in (every, linear):
            axes.set(xlabel="layers in the block", ylabel="MB per image kept for backward", xlim=0)
            axes.set_ylim(bottom=0)
            if axes.lines:
                axes.legend(loc="upper left")
        size = f"{block['size']}x{block['size']} pixels"
        channels = f"growth rate {block['growth_rate']}, bottleneck of {block['bottleneck']} channels"
        title(figure, "Memory of one dense block against its depth", f"{channels}, {size}, {dtype}")

    save(path, 9, 4.4, draw)


def family_bars(results: Results, path: Path) -> None:
    """Saved MB per image of every network, by policy; a panel per image size, the largest on top."""
    sizes = sorted({row["size"] for row in results["models"]}, reverse=True)
    groups = [[row for row in results["models"] if row["size"] == size] for size in sizes]

    def draw(figure: Figure) -> None:
        heights = [len(rows) for rows in groups]
        panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, size, rows in zip(panels, sizes, groups, strict=True):
            _family_panel(axes, rows)
            axes.set_title(f"images of {size}x{size}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        title(figure, "Memory that a training step keeps for backward, float32")

    save(path, 9, 1.2 + 0.6 * len(groups) + 0.68 * len(results["models"]), draw)


def _family_panel(axes: Axes, rows: list[Results]) -> None:
    """A group of bars per network, one bar per kind of memory it was counted for."""
    height = 0.84 / len(MEMORY_KINDS)
    for kind in MEMORY_KINDS:
        at = [j for j, row in enumerate(rows) if kind in row["saved_bytes_per_image"]]
        values = [rows[j]["saved_bytes_per_image"][kind] / 1e6 for j in at]
        places = [j + _offset(kind, rows[j]) * height for j in at]
        label = f"dense_ext, recompute {kind}" if kind in RECOMPUTE else kind.replace("default", "eager")
        bars = axes.barh(places, values, height, color=COLOURS[kind], label=label)
        axes.bar_label(bars, [f"{v:.3g}" for v in values], padding=2, fontsize=7)
    axes.set_xlabel("MB per image")
    axes.margins(x=0.1)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    horizontal(axes, [_network_label(row) for row in rows])


def _offset(kind: str, row: Results) -> float:
    """How many bars below the middle of its group a kind's bar is."""
    kinds = list(row["saved_bytes_per_image"])
    return kinds.index(kind) - (len(kinds) - 1) / 2


def _network_label(row: Results) -> str:
    millions, flops = row["parameters"] / 1e6, row["forward_flops_per_image"] / 1e9
    return f"{row['name']}\n{millions:.1f} M parameters\n{flops:.3g} GFLOP forward"


def accuracy_lines(results: Results, path: Path) -> None:
    """Top-1 accuracy against parameters, operations and the memory of a training step, by family."""
    known = [row for row in results["models"] if row["imagenet_top1_percent"] is not None]
    panels: dict[str, Callable[[Results, str], float]] = {
        "million parameters": lambda row, kind: row["parameters"] / 1e6,
        "GFLOP in the forward of an image": lambda row, kind: row["forward_flops_per_image"] / 1e9,
        f"GB held in a training step of {results['step_batch']} images": lambda row, kind: (
            row["step_bytes"][kind] / 1e9
        ),
    }

    def draw(figure: Figure) -> None:
        every = figure.subplots(1, 3, sharey=True)
        for axes, (what, cost) in zip(every, panels.items(), strict=True):
            # What runs a network changes its memory alone.
            for label, (family, kind, style, place) in _FAMILIES.items():
                rows = [row for row in known if row["name"].startswith(family)]
                if not rows or (kind != "default" and axes is not every[-1]):
                    continue
                points = sorted((cost(row, kind), row["imagenet_top1_percent"], row["name"]) for row in rows)
                costs, accuracies, names = zip(*points, strict=True)
                axes.plot(costs, accuracies, label=label, **style)
                for name, *point in zip(names, costs, accuracies, strict=True):
                    axes.annotate(
                        name.removeprefix(family), point, color=style["color"], fontsize=7.5, **place
                    )
            axes.margins(0.12, 0.06)
            axes.set(xlabel=what, xlim=(0, None))
        every[0].set_ylabel("ImageNet top-1 accuracy (%)")
        figure.legend(*every[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        setting = f"{results['accuracy_source']}; training in float32, SGD with momentum"
        title(figure, "What accuracy costs: DenseNets beside ResNets", setting)

    save(path, 11, 5.4, draw)


def training_curves(results: Results, path: Path) -> None:
    """Loss and test accuracy by epoch, a line per network."""

    def draw(figure: Figure) -> None:
        losses, accuracies = figure.subplots(1, 2)
        for i, (name, run) in enumerate(results["runs"].items()):
            history = run["history"]
            epochs = [epoch["epoch"] for epoch in history]
            style: Any = {"color": (GREEN, BLUE)[i], "marker": "ox"[i], "markersize": 5 + 2 * i}
            solid: Any = ("-", (0, (4, 3)))[i]
            for part, dashes in (("training", solid), ("test", ":")):
                values = [epoch[f"{part}_loss"] for epoch in history]
                losses.plot(epochs, values, linestyle=dashes, label=f"{name}, {part}", **style)
            values = [100 * epoch["test_accuracy"] for epoch in history]
            accuracies.plot(epochs, values, linestyle=solid, label=name, **style)
        losses.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
        accuracies.set(xlabel="epoch", ylabel="test accuracy (%)")
        for axes in (losses, accuracies):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend()
        title(figure, f"Training {results['options']['model']} on {results['data']}")

    save(path, 9, 4, draw)
