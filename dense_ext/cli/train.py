"""``dense-ext train``: a DenseNet on a folder of images or the handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..memory.network import network_of
from ..schedule import RECOMPUTE
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
    check_writable,
    option,
)
from .output import publish

if TYPE_CHECKING:
    from ..benchmark.results import Results
    from ..training import DataSets, Training

RESULT = "train.json"
_PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def train(
    data: Annotated[
        Path | None,
        option("Folder of images by class, or with folders train and val or test of them.", "digits"),
    ] = None,
    model: Annotated[
        str | None, option("A name from dense-ext models.", "densenet121; digits: densenet_bc_40_12")
    ] = None,
    size: Annotated[
        int | None, option("Height and width in pixels.", "224; CIFAR networks: 32; digits: 16")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Times every image is trained on.")] = 8,
    batch: Annotated[int, typer.Option(help="Images a step, over all devices.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the augmentation.", min=0)] = 0,
    precision: Annotated[str, typer.Option(help=f"{', '.join(_PRECISIONS)}.")] = "32-true",
    recompute: Annotated[str, typer.Option(help="none, bottleneck or block.")] = "bottleneck",
    backend: Backend = "auto",
    device: Device = None,
    devices: Annotated[
        int, typer.Option(help="GPUs, or processes on a CPU, per node.", min=1, envvar="LOCAL_WORLD_SIZE")
    ] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.", min=1, envvar="GROUP_WORLD_SIZE")] = 1,
    strategy: Annotated[str, typer.Option(help="How the devices share the work, as in Lightning.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that load images; 0: none beside.", min=0)] = 0,
    peer: Annotated[
        bool, typer.Option("--peer", help="Train torchvision's eager twin beside it, from the same weights.")
    ] = False,
    out: Out = Path("dense-ext-train"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training in --out, with the same options.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train a DenseNet with dense_ext: SGD with Nesterov momentum on a cosine schedule.

    Lightning runs it. It writes a checkpoint after each epoch; --resume goes on from it, to the same bits.
    Several devices train one network together. torchrun sets --devices and --nodes by itself.
    """
    from ..training import Training

    model = model or ("densenet_bc_40_12" if data is None else "densenet121")
    check_positive(size=size, epochs=epochs, batch=batch)
    check(lr > 0, f"--lr must be positive, got {lr}")
    check(not (resume and overwrite), "--resume and --overwrite exclude each other")
    check_choice("--precision", precision, tuple(_PRECISIONS))
    check_choice("--recompute", recompute, RECOMPUTE)
    where = check_device(device)
    check_backend(backend, where, _PRECISIONS[precision])
    images, size = _load(data, model, size)
    settings = {
        "model": model, "data": images.source, "size": size, "epochs": epochs, "batch": batch,
        "learning_rate": lr, "seed": seed, "precision": precision, "recompute": recompute, "peer": peer,
    }  # fmt: skip
    _check_folder(out, resume, overwrite)
    training = Training(
        settings, images, backend, workers, out, strategy=strategy, num_nodes=nodes,
        accelerator=where.type, devices=devices if where.index is None else [where.index],
    )  # fmt: skip
    if resume:
        training.check_resumable()
    for path in _files(out) if overwrite else ():
        path.unlink(missing_ok=True)
    _train(training, {**settings, "device": str(where), "devices": devices, "backend": backend}, out, json)


def _load(data: Path | None, model: str, size: int | None) -> tuple[DataSets, int]:
    """The images at the size asked for, or the one the model is made for."""
    from ..benchmark.networks import check_model_name
    from ..training import digits_data, folder_data

    check_model_name(model)
    small = not network_of(model).pools
    if size is None:
        size = 16 if data is None and small else 32 if data is None or small else 224
    check(size >= (8 if small else 32), f"--size {size} is too small for {model}")
    return (digits_data(size) if data is None else folder_data(data, size)), size


def _files(out: Path) -> list[Path]:
    """What a training leaves in its folder and another one would replace."""
    from ..training import CHECKPOINT, PEER_CHECKPOINT

    return [out / name for name in (RESULT, CHECKPOINT, PEER_CHECKPOINT)]


def _check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to lose a training, and to go on with one that is not there."""
    result, checkpoint, peer = _files(out)
    check_writable(checkpoint)
    check(checkpoint.exists() or not resume, f"{checkpoint} does not exist: nothing to resume")
    if not (resume or overwrite):
        present = next((p for p in (result, checkpoint, peer) if p.exists()), None)
        check(present is None, f"{present} exists; pass --resume, --overwrite or another --out")


def _train(training: Training, options: dict[str, Any], out: Path, json: bool) -> None:
    from ..benchmark.figures import draw_all
    from ..benchmark.results import new_results
    from ..files import write_atomically

    images = {f"{part}_images": len(getattr(training.data, part)) for part in ("training", "test")}
    results = new_results("train", options | images)
    results.interrupted = not training.run()
    if not training.main_process:
        return
    training.fill(results)
    if not results.interrupted:
        write_atomically(out / "weights.pt", lambda path: torch.save(training.weights(), path))
    publish(results, out / RESULT, draw_all, None if json else _print_accuracies)


def _print_accuracies(results: Results) -> None:
    from ..benchmark.results import by_peer

    for name, epochs in by_peer(results.rows).items():
        seconds = sum(epoch.median for epoch in epochs)
        print(
            f"{name}: test accuracy {epochs[-1].measures['test_accuracy']:.2%} "
            f"after {len(epochs)} epochs of {results.options['model']} in {seconds:.0f} s"
        )
