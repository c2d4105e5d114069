"""``dense-ext models``: the family's parameters, arithmetic and memory, beside ResNets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .console import print_table
from .options import Json, Out, Overwrite, check, option
from .output import measure, publish

if TYPE_CHECKING:
    from ..benchmark.results import Results

RESULT = "models.json"
_SMALLEST = 32  # pixels; below, an ImageNet network's last pool has nothing left


def models(
    size: Annotated[int | None, option("Height and width in pixels.", "224; CIFAR networks: 32")] = None,
    out: Out = Path("dense-ext-models"),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Parameters, arithmetic and memory of every DenseNet here, beside torchvision's ResNets.

    Counted on tensors without memory, so any machine will do: float32, a batch of 8, what a training
    step keeps for backward.
    """
    from ..benchmark import family
    from ..benchmark.plots import draw_all
    from ..benchmark.results import check_new, new_results

    check(size is None or size >= _SMALLEST, f"--size must be at least {_SMALLEST}, got {size}")
    check_new(out / RESULT, overwrite)
    results = new_results("models", {"size": size})
    measure(partial(family.measure_family, size, results), family.ticks(), results)
    publish(results, out / RESULT, draw_all, None if json else _print_table)


def _print_table(results: Results) -> None:
    from ..benchmark.family import MEMORY_KINDS

    rows = []
    for row in results["models"]:
        saved = row["saved_bytes_per_image"]
        cells = [f"{saved[kind] / 1e6:.1f}" if kind in saved else "-" for kind in MEMORY_KINDS]
        rows.append((
            row["name"], str(row["size"]), f"{row['parameters'] / 1e6:.2f}",
            f"{row['forward_flops_per_image'] / 1e9:.3g}", *cells,
        ))  # fmt: skip
    print_table(
        "kept for backward in MB (1e6 bytes) per image: eager, memory_efficient, dense_ext by recompute",
        ("network", "pixels", "M parameters", "GFLOP forward", *MEMORY_KINDS),
        rows,
    )
