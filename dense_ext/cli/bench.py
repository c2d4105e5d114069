"""``dense-ext bench``: memory and speed of a training step, dense_ext beside torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..schedule import RECOMPUTE
from .console import print_table, remark
from .options import (
    Backend,
    Device,
    Json,
    Out,
    Overwrite,
    check_backend,
    check_choice,
    check_device,
    check_positive,
    listed,
    option,
)
from .output import measure, publish

if TYPE_CHECKING:
    from ..benchmark.results import Results

RESULT = "bench.json"
_UNSTEADY = 1.5  # slowest sample over fastest, from where on they are doubtful
_POLICIES = [",".join(RECOMPUTE)]
_PEERS = ["eager,eager-cl,memory-efficient,memory-efficient-cl"]


def bench(
    model: Annotated[str, typer.Option(help="A name from dense-ext models.")] = "densenet121",
    batch: Annotated[int | None, option("Images a step, timing.", "16; GPU: 64")] = None,
    size: Annotated[int | None, option("Height and width in pixels, timing.", "128; GPU: 224")] = None,
    memory_batch: Annotated[int | None, option("Images a step, for memory.", "8; GPU: --batch")] = None,
    memory_size: Annotated[int | None, option("Pixels, for memory.", "224; GPU: --size")] = None,
    dtype: Annotated[
        str | None, option("float32, or by autocast bfloat16 or float16.", "float32; GPU: bfloat16")
    ] = None,
    recompute: Annotated[
        list[str], typer.Option(help="dense_ext's policies, repeated or separated by commas.")
    ] = _POLICIES,
    peers: Annotated[
        list[str], typer.Option(help="What to compare with, repeated or separated by commas.")
    ] = _PEERS,
    backend: Backend = "auto",
    device: Device = None,
    rounds: Annotated[int, typer.Option(help="Timed samples of each peer.")] = 7,
    depth: Annotated[bool, typer.Option(help="Also measure one block's memory against its depth.")] = True,
    data: Annotated[Path | None, option("Folder of images by class.", "two photographs")] = None,
    out: Out = Path("dense-ext-bench"),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Memory and speed of a training step: dense_ext beside torchvision's DenseNet, in one run.

    Every peer starts from the same weights and sees the same images. Rounds are interleaved; tables
    give the median. No speed is reported unless dense_ext's losses are the eager network's.
    """
    from ..benchmark import peers as known
    from ..benchmark.bench import Bench, Options
    from ..benchmark.depth import DEPTHS
    from ..benchmark.networks import check_model_name
    from ..benchmark.plots import draw_all
    from ..benchmark.results import check_new, new_results
    from ..benchmark.step import DTYPES

    check_model_name(model)
    check_positive(batch=batch, size=size, memory_batch=memory_batch, memory_size=memory_size, rounds=rounds)
    where = check_device(device)
    gpu = where.type == "cuda"
    dtype = dtype or ("bfloat16" if gpu else "float32")
    check_choice("--dtype", dtype, tuple(DTYPES))
    check_backend(backend, where, DTYPES[dtype])
    chosen = known.choose(listed(peers), listed(recompute))
    check_new(out / RESULT, overwrite)
    batch, size = batch or (64 if gpu else 16), size or (224 if gpu else 128)
    options = Options(
        model, batch, size, memory_batch or (batch if gpu else 8), memory_size or (size if gpu else 224),
        dtype, str(where), backend, rounds, data, DEPTHS if depth else (),
    )  # fmt: skip
    results = new_results("bench", options.as_json())
    run = Bench(options, chosen, results)
    measure(run.run, run.ticks(), results)
    publish(results, out / RESULT, draw_all, None if json else _print_tables)


def _print_tables(results: Results) -> None:
    """What was measured; an interrupted run leaves some of it out."""
    if results.get("memory"):
        _print_memory(results)
    if results.get("speed"):
        _print_speed(results)
    if results.get("depth"):
        _print_depth(results)


def _print_memory(results: Results) -> None:
    options, memory = results["options"], results["memory"]
    largest = max(m["saved_bytes_per_image"] for m in memory.values())
    images = f"{options['memory_batch']} images of {options['memory_size']}x{options['memory_size']}"
    setting = f"{options['model']}, {images}, {options['dtype']}"
    print_table(
        f"memory of a training step in MB (1e6 bytes) per image: {setting}",
        ("peer", "kept for backward", "largest / this", "allocator's peak"),
        [
            (
                results["peers"][name]["label"],
                f"{m['saved_bytes_per_image'] / 1e6:.1f}",
                f"{largest / m['saved_bytes_per_image']:.1f}",
                f"{m['peak_bytes_per_image'] / 1e6:.1f}",
            )
            for name, m in memory.items()
        ],
    )


def _print_speed(results: Results) -> None:
    from ..benchmark.bench import speeds

    options, work, speed = results["options"], results["work"], speeds(results)
    images = f"{options['batch']} images of {options['size']}x{options['size']}"
    print_table(
        f"speed of a training step: {options['model']}, {images}, {options['dtype']}",
        ("peer", "seconds", "min to max", "images/s", "best eager = 1", "of matmul rate"),
        [
            (
                results["peers"][name]["label"],
                f"{s['median']:.4g}",
                f"{s['min']:.4g} to {s['max']:.4g}",
                f"{s['images_per_second']:.4g}",
                f"{s['ratio']:.2f}",
                f"{s['matmul_share']:.0%}",
            )
            for name, s in speed.items()
        ],
    )
    print(
        f"A step does {work['step_flops_per_image'] / 1e9:.3g} GFLOP an image; the machine multiplies "
        f"matrices at {work['matmul_flops_per_second'] / 1e9:.4g} GFLOP/s and copies "
        f"{work['copy_bytes_per_second'] / 1e9:.3g} GB/s (read and written).\n"
    )
    if any(s["max"] > _UNSTEADY * s["min"] for s in speed.values()):
        remark(f"samples spread by more than {_UNSTEADY}x: something else may have run on the machine")


def _print_depth(results: Results) -> None:
    print_table(
        "memory of one dense block against its depth, kept for backward per image",
        ("peer", "layers", "MB at the deepest", "line: kB a layer", "line: R^2"),
        [
            (
                results["peers"][name]["label"],
                f"{d['layers'][0]} to {d['layers'][-1]}",
                f"{d['saved_bytes'][-1] / 1e6:.2f}",
                f"{d['line']['slope'] / 1e3:.3g}",
                f"{d['line']['r2']:.6f}",
            )
            for name, d in results["depth"]["peers"].items()
        ],
    )
