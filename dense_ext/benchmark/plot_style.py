"""How figures look: colours by peer, PNG for files, SVG for pages that are light or dark."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Results, write_atomically

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, SKY, ORANGE, YELLOW, GREEN, RED, PURPLE = (
    "#0072B2", "#56B4E9", "#E69F00", "#F0E442", "#009E73", "#D55E00", "#CC79A7",
)  # fmt: skip
COLOURS = {
    "eager": SKY,
    "eager-cl": BLUE,
    "memory-efficient": YELLOW,
    "memory-efficient-cl": ORANGE,
    "dense_ext-none": PURPLE,
    "dense_ext-bottleneck": GREEN,
    "dense_ext-block": RED,
    "default": BLUE,
    "memory_efficient": ORANGE,
    "none": PURPLE,
    "bottleneck": GREEN,
    "block": RED,
}
MARKERS = dict(zip(COLOURS, "o^sDvPXo^vPX", strict=True))


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each peer; those without their own take what others leave, in order."""
    names = list(names)
    # 6 markers and 7 colours: 42 pairs before one comes again.
    spare = zip(itertools.cycle("<>hp*d"), itertools.cycle(dict.fromkeys(COLOURS.values())))
    found = {}
    for name in names:
        marker, colour = (MARKERS[name], COLOURS[name]) if name in COLOURS else next(spare)
        found[name] = {"color": colour, "marker": marker}
    return found


# What a page replaces by its own colours.
INK, RULE, PAPER = "#333333", "#dddddd", "#ffffff"
BEHIND_TEXT: Any = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
# In a page text stays text, in the page's fonts, and the background is the page's.
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_SVG_STYLE: Any = {
    **dict.fromkeys(_INKED, INK),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}


def save(path: Path, width: float, height: float, draw: Callable[[Figure], None]) -> None:
    """Let ``draw`` fill a figure of this size in inches; the file's suffix says PNG or SVG."""
    kind = path.suffix.removeprefix(".")
    with mpl.rc_context(_STYLE | (_SVG_STYLE | {"svg.hashsalt": path.stem} if kind == "svg" else {})):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        # A date would make equal results give different files.
        metadata: Any = {"Date": None} if kind == "svg" else None
        write_atomically(path, lambda p: figure.savefig(p, dpi=150, format=kind, metadata=metadata))


def title(figure: Figure, *lines: str) -> None:
    figure.suptitle("\n".join(lines), x=0.01, ha="left")


def machine_name(results: Results) -> str:
    """The GPU, or the CPU and how many threads ran on it."""
    machine, gpu = results["machine"], results["options"]["device"].startswith("cuda")
    return machine["gpu"]["name"] if gpu else f"{machine['cpu']}, threads: {machine['threads']}"


def setting(results: Results, batch: int, size: int) -> str:
    """Model, images and machine in a line."""
    options, images = results["options"], f"{batch} images of {size}x{size}"
    return f"{options['model']}, {images}, {options['dtype']}, {machine_name(results)}"


def horizontal(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of horizontal bars, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
