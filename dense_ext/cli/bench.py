"""``dense-ext bench``: memory and speed, dense_ext beside torchvision and other remedies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    check_positive,
    listed,
    option,
)
from .output import measure, print_tables, publish

if TYPE_CHECKING:
    from ..benchmark.bench import Options
    from ..benchmark.peers import Peer
    from ..benchmark.results import Results
    from ..benchmark.suites import SuiteOptions

RESULT = "bench.json"
_UNSTEADY = 1.5  # slowest sample over fastest, from where on they are doubtful
_DOUBT = "something else may have run on the machine"
_SUITES = ("quick", "memory", "step", "inference", "volumes", "primitives", "paper")
_POLICIES = [",".join(RECOMPUTE)]
_PEERS = ["eager,eager-cl,memory-efficient,memory-efficient-cl"]


def bench(
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(_SUITES)}.")] = "quick",
    model: Annotated[
        str | None,
        option("Names from dense-ext models; quick takes one.", "densenet121; speed suites: the family"),
    ] = None,
    batch: Annotated[int | None, option("Images a step, timing.", "16; GPU: 64; suites: their own")] = None,
    size: Annotated[int | None, option("Height and width in pixels, timing.", "128; GPU: 224")] = None,
    memory_batch: Annotated[int | None, option("Images a step, for memory.", "8; GPU: --batch")] = None,
    memory_size: Annotated[int | None, option("Pixels, for memory.", "224; GPU: --size")] = None,
    dtype: Annotated[
        str | None,
        option("float32, or by autocast bfloat16 or float16; suites take several.", "float32; GPU: bfloat16"),
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
    data: Annotated[Path | None, option("Folder of images by class.", "two photographs")] = None,
    out: Out = Path("dense-ext-bench"),
    overwrite: Overwrite = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing; say what got worse from one result file to another."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="For --compare: share a time may grow by.")] = 0.05,
    json: Json = False,
) -> None:
    """Memory and speed, dense_ext beside torchvision's DenseNet and other remedies, in one run.

    quick: a training step of one network. memory: the largest batch that fits; bytes against depth,
    growth rate and batch. step: training over the family. inference. volumes: training MONAI's network
    in three dimensions. primitives: each kernel beside the machine's ceilings. paper: the comparison of
    arXiv 1707.06990. Every peer starts from the same weights and sees the same images; no speed is
    reported unless dense_ext's results are the eager network's. --compare ends
    with code 1 if something got worse beyond noise, or rows of dense_ext are missing.
    """
    if compare is not None:
        check(threshold > 0, f"--threshold must be positive, got {threshold}")
        compare_files(*compare, threshold, json)
        return

    from ..benchmark import peers as known
    from ..benchmark.bench import Options
    from ..benchmark.depth import DEPTHS
    from ..benchmark.networks import check_model_name
    from ..benchmark.results import check_new
    from ..benchmark.step import DTYPES
    from ..benchmark.suites import SuiteOptions

    check_choice("--suite", suite, _SUITES)
    models = listed([model or ""])
    for name in models:
        check_model_name(name)
    check_positive(batch=batch, size=size, memory_batch=memory_batch, memory_size=memory_size, rounds=rounds)
    check(budget is None or budget > 0, f"--budget must be positive, got {budget}")
    where = check_device(device)
    gpu = where.type == "cuda"
    dtypes = listed([dtype or ("bfloat16" if gpu else "float32")])
    for name in dtypes:
        check_choice("--dtype", name, tuple(DTYPES))
        check_backend(backend, where, DTYPES[name])
    chosen = known.choose(listed(peers), listed(recompute))
    path = out / (RESULT if suite == "quick" else f"{suite}.json")
    check_new(path, overwrite)
    if suite != "quick":
        own = suite in ("paper", "volumes")
        check(not (models and own), f"--suite {suite} has networks of its own and takes no --model")
        size_in_bytes = None if budget is None else int(budget * 1e9)
        suite_options = SuiteOptions(
            tuple(models), batch, size, tuple(dtypes), str(where), backend, rounds, size_in_bytes, data
        )
        _run_suite(suite, suite_options, chosen, path, json)
        return
    check(len(models) <= 1 and len(dtypes) == 1, "--suite quick takes one --model and one --dtype")
    batch, size = batch or (64 if gpu else 16), size or (224 if gpu else 128)
    options = Options(
        models[0] if models else "densenet121", batch, size, memory_batch or (batch if gpu else 8),
        memory_size or (size if gpu else 224), dtypes[0], str(where), backend, rounds, data,
        DEPTHS if depth else (),
    )  # fmt: skip
    _run_quick(options, chosen, path, json)


def _run_quick(options: Options, peers: list[Peer], path: Path, json: bool) -> None:
    from ..benchmark.bench import Bench
    from ..benchmark.figures import draw_all
    from ..benchmark.results import new_results

    results = new_results("bench", options.as_json())
    run = Bench(options, peers, results)
    measure(run.run, run.ticks(), results, path)
    publish(results, path, draw_all, None if json else _print_quick)


def _run_suite(name: str, options: SuiteOptions, peers: list[Peer], path: Path, json: bool) -> None:
    from ..benchmark.errors import MeasurementError
    from ..benchmark.figures import draw_all
    from ..benchmark.results import new_results
    from ..benchmark.suites import SUITES, WRONG

    results = new_results(name, options.as_json())
    run = SUITES[name](options, peers, results)
    measure(run.run, run.ticks(), results, path)
    publish(results, path, partial(draw_all, stem=f"{name}-"), None if json else print_tables)
    timed = [row["seconds"] for row in results["rows"] if row["seconds"]]
    if unsteady := sum(max(samples) > _UNSTEADY * min(samples) for samples in timed):
        remark(f"samples of {unsteady} of {len(timed)} rows spread by more than {_UNSTEADY}x: {_DOUBT}")
    for failure, why in WRONG.items():
        if any((row["failure"] or "").startswith(failure) for row in results["rows"]):
            raise MeasurementError(f"{why}: see the rows without speed")


def _print_quick(results: Results) -> None:
    from ..benchmark.relative import speeds

    print_tables(results)
    if speed := speeds(results):
        work = results["work"]
        print(
            f"A step does {work['step_flops_per_image'] / 1e9:.3g} GFLOP an image; the machine multiplies "
            f"matrices at {work['matmul_flops_per_second'] / 1e9:.4g} GFLOP/s and copies "
            f"{work['copy_bytes_per_second'] / 1e9:.3g} GB/s (read and written).\n"
        )
        if any(s["max"] > _UNSTEADY * s["min"] for s in speed.values()):
            remark(f"samples spread by more than {_UNSTEADY}x: {_DOUBT}")
