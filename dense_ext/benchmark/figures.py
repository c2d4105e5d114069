"""Figures of results: colours by peer, PNG for files, SVG for pages that are light or dark.

:func:`draw_all` draws what a result has data for; each other function one figure of it into a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import write_atomically
from .kinds import KINDS
from .results import Measurement, Results, by_peer, case_text

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, SKY, ORANGE, YELLOW, GREEN, RED, PURPLE = (
    "#0072B2", "#56B4E9", "#E69F00", "#F0E442", "#009E73", "#D55E00", "#CC79A7",
)  # fmt: skip
# Colour and marker of the default run's peers; other peers take what these leave.
_LOOKS = {
    "eager": (SKY, "o"), "eager-cl": (BLUE, "^"), "memory-efficient": (YELLOW, "s"),
    "memory-efficient-cl": (ORANGE, "D"), "dense_ext-none": (PURPLE, "v"),
    "dense_ext-bottleneck": (GREEN, "P"), "dense_ext-block": (RED, "X"),
}  # fmt: skip

# What a page replaces by its own colours.
INK, RULE, PAPER = "#333333", "#dddddd", "#ffffff"
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.color": RULE,
    "grid.linewidth": 0.6, "legend.frameon": False,
}  # fmt: skip
# In a page text stays text, in the page's fonts, and the background is the page's.
_SVG_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",
}


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each peer; those without their own take what others leave, in order."""
    # 6 markers and 7 colours: 42 pairs before one comes again.
    spare = zip(itertools.cycle(colour for colour, _ in _LOOKS.values()), itertools.cycle("<>hp*d"))
    looks = {name: _LOOKS.get(name) or next(spare) for name in dict.fromkeys(names)}
    return {name: {"color": colour, "marker": marker} for name, (colour, marker) in looks.items()}


@contextmanager
def _drawing(path: Path, height: float, *title: str, width: float = 9) -> Iterator[Figure]:
    """A figure to be filled, of this size in inches; its file's suffix says PNG or SVG."""
    kind = path.suffix.removeprefix(".")
    with mpl.rc_context(_STYLE | (_SVG_STYLE | {"svg.hashsalt": path.stem} if kind == "svg" else {})):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.suptitle("\n".join(title), x=0.01, ha="left")
        # A date would make equal results give different files.
        metadata: Any = {"Date": None} if kind == "svg" else None
        write_atomically(path, lambda p: figure.savefig(p, dpi=150, format=kind, metadata=metadata))


def _legend(figure: Figure, axes: Axes, **how: Any) -> None:
    """The peers below the panels."""
    how = {"loc": "outside lower left", "ncols": 2, "fontsize": 9, **how}
    figure.legend(*axes.get_legend_handles_labels(), **how)


def _horizontal(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of horizontal bars, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()


def _bars(axes: Axes, results: Results, rows: list[Measurement], values: Any, **look: Any) -> BarContainer:
    """A bar of each row in its peer's colour."""
    colours = [style["color"] for style in styles(row.peer for row in rows).values()]
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.7, **look)
    _horizontal(axes, [results.label(row) for row in rows])
    return bars


def _lines(axes: Axes, results: Results, points: Iterable[tuple[Measurement, Any, Any]], **look: Any) -> None:
    """A line, or with another ``linestyle`` dots, of each peer in its colour, through x and y of its rows."""
    of_peer: dict[str, list[tuple[Any, Any]]] = {}
    for row, *point in points:
        of_peer.setdefault(row.peer, []).append(tuple(point))
    for name, style in styles(of_peer).items():
        label = results.peers[name].label
        axes.plot(*zip(*of_peer[name], strict=True), label=label, **style, **look)


def memory_bars(results: Results, path: Path) -> None:
    """Saved and peak MB per image of each peer, on the first case that memory was counted on."""
    rows = results.measured("peak_bytes")
    case = rows[0].case
    rows = [row for row in rows if row.case == case]
    title = "Memory of a training step", results.setting(case)
    with _drawing(path, 1.6 + 0.36 * len(rows), *title) as figure:
        panels = {"saved_bytes": "kept for backward", "peak_bytes": "allocator's peak in a step"}
        for axes, (measure, what) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            values = [row.measures[measure] / 1e6 / int(case["batch"]) for row in rows]
            axes.bar_label(_bars(axes, results, rows, values), [f"{v:.1f}" for v in values], padding=3)
            axes.set(xlabel="MB per image", title=what, xlim=(0, max(values) * 1.2))
            axes.label_outer()


def throughput_bars(results: Results, path: Path) -> None:
    """Images per second relative to the fastest eager peer, with the spread of the samples."""
    rows = results.timed()
    case, (reference, among) = rows[0].case, next(iter(results.references().items()))
    least = results.fastest(case, among) or rows[0].median
    seconds = np.array([(row.median, max(row.seconds), min(row.seconds)) for row in rows])
    medians, slowest, quickest = least / seconds.T
    right = max(quickest)
    title = "Training step: forward, backward, SGD", results.setting(case)
    with _drawing(path, 1.6 + 0.36 * len(rows), *title) as figure:
        axes = figure.subplots()
        spread, caps = [medians - slowest, quickest - medians], {"ecolor": INK, "capsize": 3, "linewidth": 1}
        _bars(axes, results, rows, medians, xerr=spread, error_kw=caps)
        for i, (ratio, end, row) in enumerate(zip(medians, quickest, rows, strict=True)):
            text = f"{ratio:.2f}x   {int(case['batch']) / row.median:.3g} images/s"
            behind: Any = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
            axes.text(end + 0.02 * right, i, text, va="center", bbox=behind)
        axes.axvline(1, color=INK, linewidth=1, linestyle=":")
        axes.set(xlim=(0, right * 1.4))
        axes.set_xlabel(f"speed, {reference} network = 1: median, and slowest to fastest sample")


def memory_lines(results: Results, path: Path, vary: str) -> None:
    """Bytes against ``vary``, a line per peer; the first dtype. Of a block's layers there are no peaks."""
    rows = [row for row in results.measured("saved_bytes") if row.case.get("vary") == vary]
    case, what = rows[0].case, vary.replace("_", " ")
    rows = [row for row in rows if row.case["dtype"] == case["dtype"]]
    of, panels = "a training step", {"kept for backward": ("saved_bytes", rows)}
    if vary == "layers":
        others = [row for row in rows if row.peer not in ("eager", "eager-cl")]
        of, panels["kept for backward, all but eager"] = "one dense block", ("saved_bytes", others)
    else:
        panels["peak of a step"] = "peak_bytes", rows
    title = f"Memory of {of} against {what}", case_text(case, "vary", vary)
    with _drawing(path, 4 + 0.12 * len(by_peer(rows)), *title) as figure:
        every = figure.subplots(1, 2)
        for axes, (panel, (measure, shown)) in zip(every, panels.items(), strict=True):
            _lines(axes, results, [(r, r.case[vary], r.measures[measure] / 1e6) for r in shown], markersize=4)
            axes.set(title=panel, xlabel=what, ylabel="MB", ylim=(0, None))
        _legend(figure, every[0])


def speed_dots(results: Results, path: Path) -> None:
    """Speed relative to the fastest other network, eager where one is, a row per case and a dot per peer."""
    cases, peers = results.timed_cases(), by_peer(results.timed())
    reference, among = next(iter(results.references().items()))
    # Within a case's band each peer has its own height, so that equal speeds do not cover each other.
    heights = dict(zip(peers, np.linspace(-0.35, 0.35, len(peers)), strict=True))
    points = [
        (row, least / row.median, cases.index(row.case) + heights[row.peer])
        for row in results.timed()
        if (least := results.fastest(row.case, among))
    ]
    height = 1.8 + (0.3 + 0.06 * len(peers)) * len(cases) + 0.12 * len(peers)
    with _drawing(path, height, KINDS[results.kind].title, results.on) as figure:
        axes = figure.subplots()
        _lines(axes, results, points, linestyle="")
        axes.grid(axis="y", visible=False)
        axes.axvline(1, color=INK, linewidth=1, linestyle=":")
        labels = [f"{c['model']}\n{c['batch']} x {results.sides(c)}, {c['dtype']}" for c in cases]
        axes.set_yticks(range(len(cases)), labels)
        axes.set(xlim=(0, None), ylim=(len(cases) - 0.5, -0.5), xlabel=f"speed, {reference} network = 1")
        _legend(figure, axes)


def roofline(results: Results, path: Path, dtype: str) -> None:
    """Operations per second against operations per byte, under what the machine copies and multiplies."""
    copy, matmul = results.work["copy_bytes_per_second"], results.work["matmul_flops_per_second"][dtype]
    rows = [row for row in results.timed() if row.case["dtype"] == dtype and row.measures["flops"]]
    points = [(row, row.measures["flops"] / row.measures["minimum_bytes"],
               row.measures["flops"] / row.median / 1e9) for row in rows]  # fmt: skip
    ceilings = f"copies at {copy / 1e9:.4g} GB/s, multiplies at {matmul / 1e9:.4g} GFLOP/s"
    title = f"Primitives under the roofline, {dtype}", f"{results.on}: {ceilings}"
    with _drawing(path, 5.2, *title) as figure:
        axes = figure.subplots()
        found = [intensity for _, intensity, _ in points]
        x = np.geomspace(min(found) / 2, max(*found, matmul / copy) * 2, 100)
        axes.plot(x, np.minimum(x * copy, matmul) / 1e9, color=INK, linewidth=1.5, label="measured ceilings")
        _lines(axes, results, points, linestyle="", markersize=4, alpha=0.7)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
        _legend(figure, axes)


def family_bars(results: Results, path: Path) -> None:
    """Saved MB per image of every network, by policy; a panel per image size, the largest on top."""
    rows = results.measured("saved_bytes_per_image")
    networks = [list(of) for _, of in itertools.groupby(rows, lambda row: row.case["model"])]
    sizes = sorted({int(rows[0].case["size"]) for rows in networks}, reverse=True)
    by_size = {size: [rows for rows in networks if rows[0].case["size"] == size] for size in sizes}
    heights = [len(of) for of in by_size.values()]
    height = 1.2 + 0.6 * len(sizes) + 0.68 * sum(heights)
    with _drawing(path, height, "Memory that a training step keeps for backward, float32") as figure:
        panels = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (size, of) in zip(panels, by_size.items(), strict=True):
            _family_panel(axes, results, of)
            axes.set_title(f"images of {size}x{size}")
        _legend(figure, panels[0], loc="outside lower center", ncols=3, fontsize=10)


def _family_panel(axes: Axes, results: Results, networks: list[list[Measurement]]) -> None:
    """A group of bars per network, one bar per peer that it was counted for."""
    height, looks = 0.84 / len(results.peers), styles(results.peers)
    for name, peer in results.peers.items():
        values = {
            at + (i - (len(rows) - 1) / 2) * height: row.measures["saved_bytes_per_image"] / 1e6
            for at, rows in enumerate(networks) for i, row in enumerate(rows) if row.peer == name
        }  # fmt: skip
        bars = axes.barh([*values], [*values.values()], height, color=looks[name]["color"], label=peer.label)
        axes.bar_label(bars, [f"{v:.3g}" for v in values.values()], padding=2, fontsize=7)
    axes.margins(x=0.1)
    axes.set(xlabel="MB per image", ylim=(-0.5, len(networks) - 0.5))
    _horizontal(axes, [
        f"{row.case['model']}\n{row.measures['parameters'] / 1e6:.1f} M parameters\n"
        f"{row.measures['forward_flops_per_image'] / 1e9:.3g} GFLOP forward"
        for row, *_ in networks
    ])  # fmt: skip


# A line of networks: which, what runs them, colour, marker, and where labels stand, so that none overlap.
_FAMILIES: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "ResNets, eager": ("resnet", "eager-cl", BLUE, "s", {"xytext": (5, -4), "ha": "left", "va": "top"}),
    "DenseNets, eager": ("densenet", "eager-cl", RED, "o", {"xytext": (5, -5), "ha": "center", "va": "top"}),
    "DenseNets, dense_ext with recompute bottleneck": (
        "densenet", "dense_ext-bottleneck", GREEN, "D", {"xytext": (8, -3), "ha": "left", "va": "center"},
    ),
}  # fmt: skip


def accuracy_lines(results: Results, path: Path) -> None:
    """Top-1 accuracy against parameters, operations and the memory of a training step, by family."""
    known, options = results.measured("imagenet_top1_percent"), results.options
    panels = {
        "million parameters": ("parameters", 1e6),
        "GFLOP in the forward of an image": ("forward_flops_per_image", 1e9),
        f"GB held in a training step of {options['step_batch']} images": ("step_bytes", 1e9),
    }
    setting = f"{options['accuracy_source']}; training in float32, SGD with momentum"
    title = "What accuracy costs: DenseNets beside ResNets", setting
    with _drawing(path, 5.4, *title, width=11) as figure:
        every = figure.subplots(1, 3, sharey=True)
        for axes, (what, (cost, unit)) in zip(every, panels.items(), strict=True):
            # What runs a network changes its memory alone.
            for label, (family, peer, color, marker, place) in _FAMILIES.items():
                points = sorted(
                    (row.measures[cost] / unit, row.measures["imagenet_top1_percent"], str(row.case["model"]))
                    for row in known
                    if row.peer == peer and str(row.case["model"]).startswith(family)
                )
                if not points or (peer != "eager-cl" and cost != "step_bytes"):
                    continue
                costs, accuracies, names = zip(*points, strict=True)
                axes.plot(costs, accuracies, color=color, marker=marker, label=label)
                style = {"color": color, "fontsize": 7.5, "textcoords": "offset points", **place}
                for name, *point in zip(names, costs, accuracies, strict=True):
                    axes.annotate(name.removeprefix(family), point, **style)
            axes.margins(0.12, 0.06)
            axes.set(xlabel=what, xlim=(0, None))
        every[0].set_ylabel("ImageNet top-1 accuracy (%)")
        _legend(figure, every[-1], loc="outside lower center", ncols=3, fontsize=10)


def training_curves(results: Results, path: Path) -> None:
    """Loss and test accuracy by epoch, a line per network."""
    options = results.options
    with _drawing(path, 4, f"Training {options['model']} on {options['data']}") as figure:
        losses, accuracies = figure.subplots(1, 2)
        for i, (name, rows) in enumerate(by_peer(results.rows).items()):
            epochs = [row.case["epoch"] for row in rows]
            style: Any = {"color": (GREEN, BLUE)[i], "marker": "ox"[i], "markersize": 5 + 2 * i}
            solid: Any = ("-", (0, (4, 3)))[i]
            for part, dashes in (("training", solid), ("test", ":")):
                values = [row.measures[f"{part}_loss"] for row in rows]
                losses.plot(epochs, values, linestyle=dashes, label=f"{name}, {part}", **style)
            values = [100 * row.measures["test_accuracy"] for row in rows]
            accuracies.plot(epochs, values, linestyle=solid, label=name, **style)
        losses.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
        accuracies.set(xlabel="epoch", ylabel="test accuracy (%)")
        for axes in (losses, accuracies):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend()


def _drawings(results: Results) -> dict[str, Callable[[Results, Path], None]]:
    """What draws each figure that a result has data for, by the figure's name."""
    varied = dict.fromkeys(
        str(row.case["vary"]) for row in results.measured("saved_bytes") if "vary" in row.case
    )
    lines = {"depth" if vary == "layers" else vary: partial(memory_lines, vary=vary) for vary in varied}
    found: dict[str, Callable[[Results, Path], None]] = {}
    match results.kind:
        case "train":
            found |= {"curves": training_curves} if results.rows else {}
        case "models":
            found |= {"models": family_bars} if results.measured("saved_bytes_per_image") else {}
            found |= {"accuracy": accuracy_lines} if results.measured("imagenet_top1_percent") else {}
        case "primitives":
            dtypes = dict.fromkeys(str(row.case["dtype"]) for row in results.timed())
            found |= {f"roofline-{dtype}": partial(roofline, dtype=dtype) for dtype in dtypes}
        case "quick":
            found |= {"memory": memory_bars} if results.measured("peak_bytes") else {}
            found |= {"throughput": throughput_bars} if results.references() else {}
        case _:
            found |= {"throughput": speed_dots} if results.references() else {}
    return found | lines


def draw_all(results: Results, folder: Path, stem: str = "", suffix: str = ".png") -> list[Path]:
    """Every figure that the results have data for, into ``folder``; returns the files.

    Args:
        results: what to draw.
        folder: where to.
        stem: put before the figures' names.
        suffix: ".png" or ".svg".
    """
    drawn = []
    for name, draw in _drawings(results).items():
        drawn.append(folder / f"{stem}{name}{suffix}")
        draw(results, drawn[-1])
    return drawn
