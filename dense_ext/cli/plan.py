"""``dense-ext plan``: what a training step will need, and what to recompute so that it fits."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer

from ..memory import Estimate, Planner, TrackedStep, device_memory, parse_bytes
from ..memory.step import OPTIMIZERS, PARTS
from ..models import MODELS
from ..schedule import RECOMPUTE
from .console import print_json, print_table, remark
from .options import Backend, Json, check_choice, check_positive, option
from .output import end, measure

_DTYPES = ("float32", "bfloat16", "float16")
_DOES_NOT_FIT = 1


def plan(
    model: Annotated[str, typer.Argument(help="A name from dense-ext models.")],
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    size: Annotated[int | None, option("Height and width in pixels.", "224; CIFAR networks: 32")] = None,
    memory: Annotated[
        str | None, option("To fit into, as 80GiB or 16GB.", "what the device has for this process")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, or by autocast bfloat16 or float16.")] = "float32",
    optimizer: Annotated[str, typer.Option(help="none, sgd, momentum or adamw.")] = "momentum",
    device: Annotated[
        str | None, option("cpu or cuda, also one that is not here.", "a GPU if there is one")
    ] = None,
    backend: Backend = "auto",
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Also torchvision's and timm's networks, plain and checkpointed: minutes of tracking.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Peak memory of a training step by part and policy, and the policy to choose, without running it.

    Exit code 1 if the batch fits under no policy. --peers runs other networks' steps on tensors without
    memory, as on a CPU, some five times each: that a batch fits and one image more does not is tracked.
    """
    from ..benchmark.errors import UsageError
    from ..benchmark.networks import image_size

    check_positive(batch=batch, size=size)
    check_choice("MODEL", model, tuple(MODELS))
    size = size or image_size(model)
    check_choice("--dtype", dtype, _DTYPES)
    check_choice("--optimizer", optimizer, tuple(OPTIMIZERS))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_choice("--device", device, ("cpu", "cuda"))
    try:
        budget = device_memory(torch.device(device)) if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error
    try:
        planner = Planner(
            model, (3, size, size), dtype=getattr(torch, dtype), optimizer=optimizer, device=device,
            backend=backend,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error

    choice = planner.choose(batch, budget)
    found: dict[str, Any] = {
        "model": model, "batch": batch, "size": size, "dtype": dtype, "optimizer": optimizer,
        "device": device, "backend": planner.backend, "memory_bytes": budget,
        "policies": {policy: _policy(planner, policy, batch, budget) for policy in RECOMPUTE},
        "choice": None if choice is None else _as_json(choice),
        "peers": {}, "interrupted": False,
    }  # fmt: skip
    if peers:
        _track(found)
    if json:
        print_json(found)
    else:
        _print(found)
    end(found["interrupted"])
    if choice is None:
        remark(f"{batch} images do not fit into {_shown(budget)} under any policy")
        raise typer.Exit(_DOES_NOT_FIT)


def _as_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "peak_bytes": estimate.peak,
        "point": estimate.point,
        "parts": estimate.parts,
        "recompute": estimate.recompute,
    }


def _policy(planner: Planner, policy: str, batch: int, budget: int) -> dict[str, Any]:
    return {
        **_as_json(planner.estimate(batch, policy)),
        "largest_batch": planner.largest_batch(budget, policy),
    }


def _track(found: dict[str, Any]) -> None:
    """Fill ``found["peers"]``; Ctrl-C keeps those that are done."""
    from ..benchmark.memory import track_peers, tracking_ticks

    model, shape, dtype = MODELS[found["model"]](), (3, found["size"], found["size"]), found["dtype"]
    step = partial(TrackedStep, image_shape=shape, dtype=getattr(torch, dtype), optimizer=found["optimizer"])
    track = partial(track_peers, model, step, found["batch"], found["memory_bytes"], found["peers"])
    found["interrupted"] = measure(track, tracking_ticks(model))


def _shown(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _print(found: dict[str, Any]) -> None:
    policies, budget = found["policies"], found["memory_bytes"]
    images = f"{found['batch']} images of {found['size']}x{found['size']}"
    setting = f"{found['model']}, {images}, {found['dtype']}, {found['optimizer']}, {found['device']}"
    rows = [
        (part, *(f"{p['parts'].get(part, 0) / 2**20:.1f}" for p in policies.values()))
        for part in PARTS
        if any(part in p["parts"] for p in policies.values())
    ]
    rows.append(("peak", *(f"{p['peak_bytes'] / 2**20:.1f}" for p in policies.values())))
    rows.append(("where", *(p["point"] for p in policies.values())))
    print_table(f"peak of a training step in MiB by recompute policy: {setting}", ("part", *policies), rows)
    rows = [
        (name, _shown(p["peak_bytes"]), _fits(p["peak_bytes"], budget), str(p["largest_batch"]))
        for name, p in policies.items()
    ]
    peers = found["peers"]
    rows += [
        (name, _shown(p["peak_bytes"]), _fits(p["peak_bytes"], budget), _known(p["largest_batch"]))
        for name, p in peers.items()
        if p["peak_bytes"] is not None
    ]
    title = f"within {_shown(budget)}, dense_ext on backend {found['backend']}"
    print_table(title, ("recompute", "peak", "fits", "largest batch"), rows)
    for name, p in peers.items():
        if p["failure"] is not None:
            print(f"{name}: {p['failure']}")
    if choice := found["choice"]:
        chosen = choice["recompute"]
        same = len(set(chosen.values())) == 1
        policy = next(iter(chosen.values())) if same else ", ".join(f"{b} {p}" for b, p in chosen.items())
        print(f"choose: {policy} ({_shown(choice['peak_bytes'])})")


def _fits(peak: int, budget: int) -> str:
    return "yes" if peak <= budget else "no"


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)
