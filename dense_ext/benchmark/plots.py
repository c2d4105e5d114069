"""Figures from results: each function draws one PNG from one result file's content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..schedule import RECOMPUTE
from .bench import speeds
from .family import MEMORY_KINDS
from .results import Results, write_atomically

# Okabe and Ito's palette, told apart with any colour vision.
_BLUE, _SKY, _ORANGE, _YELLOW, _GREEN, _RED, _PURPLE = (
    "#0072B2", "#56B4E9", "#E69F00", "#F0E442", "#009E73", "#D55E00", "#CC79A7",
)  # fmt: skip
COLOURS = {
    "eager": _SKY,
    "eager-cl": _BLUE,
    "memory-efficient": _YELLOW,
    "memory-efficient-cl": _ORANGE,
    "dense_ext-none": _PURPLE,
    "dense_ext-bottleneck": _GREEN,
    "dense_ext-block": _RED,
    "default": _BLUE,
    "memory_efficient": _ORANGE,
    "none": _PURPLE,
    "bottleneck": _GREEN,
    "block": _RED,
}
MARKERS = dict(zip(COLOURS, "o^sDvPXo^vPX", strict=True))
_BEHIND_TEXT: Any = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def _save(path: Path, width: float, height: float, draw: Callable[[Figure], None]) -> None:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        write_atomically(path, lambda p: figure.savefig(p, dpi=150, format="png"))


def _title(figure: Figure, *lines: str) -> None:
    figure.suptitle("\n".join(lines), x=0.01, ha="left")


def _setting(results: Results, batch: int, size: int) -> str:
    """Model, images and machine in a line."""
    options, machine = results["options"], results["machine"]
    if options["device"].startswith("cuda"):
        where = machine["gpu"]["name"]
    else:
        where = f"{machine['cpu']}, threads: {machine['threads']}"
    return f"{options['model']}, {batch} images of {size}x{size}, {options['dtype']}, {where}"


def _horizontal(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of horizontal bars, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()


def memory_bars(results: Results, path: Path) -> None:
    """Saved and peak MB per image of each peer."""
    measured, options = results["memory"], results["options"]
    colours = [COLOURS[name] for name in measured]
    panels = {
        "saved_bytes_per_image": "kept for backward",
        "peak_bytes_per_image": "allocator's peak in a step",
    }

    def draw(figure: Figure) -> None:
        for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            values = [m[key] / 1e6 for m in measured.values()]
            bars = axes.barh(range(len(values)), values, color=colours, height=0.7)
            axes.bar_label(bars, [f"{v:.1f}" for v in values], padding=3)
            axes.set_xlim(0, max(values) * 1.2)
            axes.set(xlabel="MB per image", title=title)
            labels = [results["peers"][name]["label"] for name in measured]
            _horizontal(axes, labels if key == "saved_bytes_per_image" else [""] * len(labels))
        setting = _setting(results, options["memory_batch"], options["memory_size"])
        _title(figure, "Memory of a training step", setting)

    _save(path, 9, 1.6 + 0.36 * len(measured), draw)


def throughput_bars(results: Results, path: Path) -> None:
    """Images per second relative to the fastest eager peer, with the spread of the samples."""
    speed, options = speeds(results), results["options"]
    values = list(speed.values())
    right = max(s["ratio_max"] for s in values)
    spread = [[s["ratio"] - s["ratio_min"] for s in values], [s["ratio_max"] - s["ratio"] for s in values]]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(
            range(len(values)),
            [s["ratio"] for s in values],
            xerr=spread,
            color=[COLOURS[name] for name in speed],
            height=0.7,
            error_kw={"ecolor": "#333333", "capsize": 3, "linewidth": 1},
        )
        for i, s in enumerate(values):
            text = f"{s['ratio']:.2f}x   {s['images_per_second']:.3g} images/s"
            axes.text(s["ratio_max"] + 0.02 * right, i, text, va="center", bbox=_BEHIND_TEXT)
        axes.axvline(1, color="#333333", linewidth=1, linestyle=":")
        axes.set_xlim(0, right * 1.4)
        axes.set_xlabel("speed relative to the fastest eager peer: median, and slowest to fastest sample")
        _horizontal(axes, [results["peers"][name]["label"] for name in speed])
        setting = _setting(results, options["batch"], options["size"])
        _title(figure, "Training step: forward, backward, SGD", setting)

    _save(path, 9, 1.6 + 0.36 * len(values), draw)


def depth_lines(results: Results, path: Path) -> None:
    """Saved MB per image of one dense block against its number of layers."""
    study, peers = results["depth"]["peers"], results["peers"]
    block, dtype = results["depth"]["block"], results["options"]["dtype"]

    def draw(figure: Figure) -> None:
        every, linear = figure.subplots(1, 2)
        for name, measured in study.items():
            megabytes = [b / 1e6 for b in measured["saved_bytes"]]
            line: Any = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4}
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
        _title(figure, "Memory of one dense block against its depth", f"{channels}, {size}, {dtype}")

    _save(path, 9, 4.4, draw)


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
        _title(figure, "Memory that a training step keeps for backward, float32")

    _save(path, 9, 1.2 + 0.6 * len(groups) + 0.68 * len(results["models"]), draw)


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
    _horizontal(axes, [_network_label(row) for row in rows])


def _offset(kind: str, row: Results) -> float:
    """How many bars below the middle of its group a kind's bar is."""
    kinds = list(row["saved_bytes_per_image"])
    return kinds.index(kind) - (len(kinds) - 1) / 2


def _network_label(row: Results) -> str:
    millions, flops = row["parameters"] / 1e6, row["forward_flops_per_image"] / 1e9
    return f"{row['name']}\n{millions:.1f} M parameters\n{flops:.3g} GFLOP forward"


def training_curves(results: Results, path: Path) -> None:
    """Loss and test accuracy by epoch, a line per network."""

    def draw(figure: Figure) -> None:
        losses, accuracies = figure.subplots(1, 2)
        for i, (name, run) in enumerate(results["runs"].items()):
            history = run["history"]
            epochs = [epoch["epoch"] for epoch in history]
            style: Any = {"color": (_GREEN, _BLUE)[i], "marker": "ox"[i], "markersize": 5 + 2 * i}
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
        _title(figure, f"Training {results['options']['model']} on {results['data']}")

    _save(path, 9, 4, draw)


def draw_all(results: Results, folder: Path, stem: str = "") -> list[Path]:
    """Every figure the results have data for, into ``folder``; returns the files.

    Args:
        results: the content of a result file.
        folder: where to.
        stem: put before the figures' names.
    """
    figures: list[tuple[str, Callable[[Results, Path], None], bool]] = [
        ("memory", memory_bars, bool(results.get("memory"))),
        ("throughput", throughput_bars, results["kind"] == "bench" and bool(speeds(results))),
        ("depth", depth_lines, bool(results.get("depth", {}).get("peers"))),
        ("models", family_bars, bool(results.get("models"))),
        ("curves", training_curves, any(r["history"] for r in results.get("runs", {}).values())),
    ]
    drawn = []
    for name, draw, possible in figures:
        if possible:
            path = folder / f"{stem}{name}.png"
            draw(results, path)
            drawn.append(path)
    return drawn
