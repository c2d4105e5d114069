"""``dense-ext models``: the family's accuracy, parameters, arithmetic and memory, beside ResNets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from .options import Json, Out, Overwrite, check, check_new, option
from .output import measure, print_tables, publish

RESULT = "models.json"
_SMALLEST = 32  # pixels; below, an ImageNet network's last pool has nothing left


def models(
    size: Annotated[int | None, option("Height and width in pixels.", "224; CIFAR networks: 32")] = None,
    out: Out = Path("dense-ext-models"),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Accuracy, parameters, arithmetic and memory of every DenseNet here, beside torchvision's ResNets.

    It takes some minutes. Counted on tensors without memory, so any machine will do: in float32, what a
    training step keeps for backward, and what a step of 32 images holds. dense_ext's step is planned at its
    peak; eager's is what it keeps, with parameters, gradients and momentum. The top-1 accuracies are those
    that torchvision publishes of its weights IMAGENET1K_V1, for every network: V2, of another recipe, is
    there for ResNets only.
    """
    from ..benchmark import family
    from ..benchmark.figures import draw_all
    from ..benchmark.results import new_results

    check(size is None or size >= _SMALLEST, f"--size must be at least {_SMALLEST}, got {size}")
    check_new(out / RESULT, overwrite)
    results = new_results("models", family.options(size))
    run = partial(family.measure_family, size, results)
    results.interrupted = measure(run, family.ticks(), results, out / RESULT)
    publish(results, out / RESULT, draw_all, None if json else print_tables)
