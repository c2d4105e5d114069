"""``dense-ext bench``: memory and speed, dense_ext beside torchvision and other remedies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..benchmark.peers import EAGER, choose
from ..benchmark.suites import SUITES, Options
from ..schedule import RECOMPUTE
from .compare import compare_files
from .console import remark
from .options import (
    Backend,
    Device,
    Json,
    Out,
    Overwrite,
    check,
    check_backend,
    check_choice,
    check_device,
    check_new,
    check_positive,
    listed,
    option,
)
from .output import measure, print_tables, publish

if TYPE_CHECKING:
    from ..benchmark.results import Results

_POLICIES, _PEERS = [",".join(RECOMPUTE)], [",".join(EAGER)]
_UNSTEADY = 1.5  # slowest sample over fastest, from where on they are doubtful


def bench(
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(SUITES)}.")] = "quick",
    model: Annotated[
        str | None,
        option("Names from dense-ext models; quick takes one.", "densenet121; speed suites: the family"),
    ] = None,
    batch: Annotated[
        int | None, option("Images a step.", "16, memory: 8; GPU: 64; suites: their own")
    ] = None,
    size: Annotated[
        int | None, option("Height and width in pixels.", "128, memory: 224; GPU: 224; CIFAR: 32")
    ] = None,
    dtype: Annotated[
        str | None,
        option(
            "float32, or by autocast bfloat16 or float16; suites take several.",
            "float32; GPU: bfloat16, but kernelbench float32",
        ),
    ] = None,
    recompute: Annotated[
        list[str], typer.Option(help="dense_ext's policies, repeated or separated by commas.")
    ] = _POLICIES,
    peers: Annotated[
        list[str],
        typer.Option(help="What to compare with, repeated or separated by commas; all for every peer."),
    ] = _PEERS,
    backend: Backend = "auto",
    device: Device = None,
    rounds: Annotated[int, typer.Option(help="Timed samples of each peer.")] = 7,
    depth: Annotated[bool, typer.Option(help="Also measure one block's memory against its depth.")] = True,
    budget: Annotated[
        float | None, option("GB that a step is to fit.", "memory: 1; paper: 0.1; GPU: 8")
    ] = None,
    out: Out = Path("dense-ext-bench"),
    overwrite: Overwrite = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing; say what got worse from one result file to another."),
    ] = None,
    threshold: Annotated[float | None, option("For --compare: share a time may grow by.", "0.05")] = None,
    json: Json = False,
) -> None:
    if compare is not None:
        check(threshold is None or threshold > 0, f"--threshold must be positive, got {threshold}")
        compare_files(*compare, threshold or 0.05, json)
        return
    check(threshold is None, "--threshold needs --compare")

    import torchvision  # noqa: F401 - where it is missing, that is said before anything is measured

    from ..benchmark.figures import draw_all
    from ..benchmark.networks import check_model_name
    from ..benchmark.results import new_results
    from ..benchmark.step import DTYPES

    check_choice("--suite", suite, tuple(SUITES))
    models = listed([model or ""])
    for name in models:
        check_model_name(name)
    check_positive(batch=batch, size=size, rounds=rounds)
    check(budget is None or budget > 0, f"--budget must be positive, got {budget}")
    where = check_device(device)
    dtypes = listed([dtype or (SUITES[suite].gpu_dtype if where.type == "cuda" else "float32")])
    for name in dtypes:
        check_choice("--dtype", name, tuple(DTYPES))
        check_backend(backend, where, DTYPES[name])
    options = Options(
        models=tuple(models), batch=batch, size=size, dtypes=tuple(dtypes), device=str(where),
        backend=backend, rounds=rounds, depth=depth, budget=None if budget is None else int(budget * 1e9),
    )  # fmt: skip
    chosen, path = choose(listed(peers), listed(recompute)), out / f"{suite}.json"
    check_new(path, overwrite)
    results = new_results(suite, options.as_json())
    run = SUITES[suite](options, chosen, results)
    results.interrupted = measure(run.run, run.ticks(), results, path)
    publish(results, path, partial(draw_all, stem=f"{suite}-"), None if json else print_tables)
    _judge(results)


bench.__doc__ = " ".join((
    "Memory and speed, dense_ext beside torchvision's DenseNet and other remedies, in one run.\n\n",
    *(f"{name}: {suite.summary}." for name, suite in SUITES.items()),
    "Every peer starts from the same weights and sees the same images; no speed is reported unless",
    "dense_ext's results are the eager network's. --compare ends with code 1 if something got worse beyond",
    "noise, or rows of dense_ext are missing.",
))  # fmt: skip


def _judge(results: Results) -> None:
    """Say what of the results is not to be believed.

    Raises:
        MeasurementError: dense_ext's values are wrong, or were compared with nothing.
    """
    from ..benchmark.errors import MeasurementError
    from ..benchmark.suites.speed import WRONG

    timed = [row.seconds for row in results.timed()]
    if unsteady := sum(max(samples) > _UNSTEADY * min(samples) for samples in timed):
        doubt = "something else may have run on the machine"
        remark(f"samples of {unsteady} of {len(timed)} rows spread by more than {_UNSTEADY}x: {doubt}")
    for failure, why in WRONG.items():
        if any((row.failure or "").startswith(failure) for row in results.rows):
            raise MeasurementError(f"{why}: see the rows without speed")
