"""The DenseNet family beside ResNets: accuracy, parameters, arithmetic and memory, without running any."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ..memory import Planner
from ..models import MODELS, DenseNet
from ..schedule import RECOMPUTE
from .errors import UsageError
from .flops import flops_per_image, without_memory
from .memory import saved_bytes
from .networks import plain, takes_small_images, torchvision_twin
from .results import Results
from .tables import Columns, Draw, Kind, Table

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SIZE, SMALL_SIZE = 224, 32  # of the images that the networks for ImageNet and for CIFAR take
STEP_BATCH = 32  # images of the training step whose memory is told
# V2 of the ResNets' weights comes from another recipe, which the DenseNets' never had.
WEIGHTS = "IMAGENET1K_V1"
_BATCH = 8
_TRAINING_BYTES = 3 * 4  # of a parameter in float32: its value, gradient and momentum

# What is counted for every DenseNet, in order.
MEMORY_KINDS = ("default", "memory_efficient", *RECOMPUTE)


def _saved_per_image(build: Callable[[], nn.Module], size: int) -> float:
    """Bytes kept for backward, float32, in a batch of 8."""
    with without_memory():
        network = build().train()
        images = torch.randn(_BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(_BATCH, dtype=torch.long)
        return saved_bytes(network, lambda: F.cross_entropy(network(images), labels)) / _BATCH


def _dense_builders(name: str) -> dict[str, Callable[[], nn.Module]]:
    """How to make the network of each kind of memory."""
    make = MODELS[name]
    return {
        "default": lambda: plain(make()),
        "memory_efficient": lambda: torchvision_twin(make(), True, "cpu"),
        **{policy: partial(make, recompute=policy) for policy in RECOMPUTE},
    }


def _top1(name: str, size: int) -> float | None:
    """Top-1 accuracy on ImageNet in percent of torchvision's weights; None without, or at another size."""
    if size != SIZE or name not in torchvision.models.list_models(torchvision.models):
        return None
    weights: Any = torchvision.models.get_model_weights(name)
    accuracy: float = weights[WEIGHTS].meta["_metrics"]["ImageNet-1K"]["acc@1"]
    return accuracy


def _step_bytes(name: str, size: int, saved: float, parameters: int) -> dict[str, int]:
    """What a step of 32 images with SGD and momentum holds: eager at least, dense_ext at its planned peak."""
    held = {"default": round(STEP_BATCH * saved) + _TRAINING_BYTES * parameters}
    if name in MODELS:
        planner = Planner(name, (3, size, size), device="cpu")
        held |= {policy: planner.estimate(STEP_BATCH, policy).peak for policy in RECOMPUTE}
    return held


def _row(name: str, size: int | None, tick: Callable[[str], None]) -> dict[str, Any]:
    builders = _dense_builders(name) if name in MODELS else {"default": getattr(torchvision.models, name)}
    with torch.device("meta"):
        network = builders["default"]()
    small = isinstance(network, DenseNet) and takes_small_images(network)
    side = size or (SMALL_SIZE if small else SIZE)
    saved = {}
    for kind, build in builders.items():
        tick(f"{name}, {kind}")
        with suppress(UsageError):  # torchvision has no networks without bottleneck layers
            saved[kind] = _saved_per_image(build, side)
    parameters = sum(p.numel() for p in network.parameters())
    return {
        "name": name,
        "size": side,
        "imagenet_top1_percent": _top1(name, side),
        "parameters": parameters,
        "forward_flops_per_image": flops_per_image(builders["default"], (3, side, side), backward=False),
        "saved_bytes_per_image": saved,
        "step_bytes": _step_bytes(name, side, saved["default"], parameters),
    }


def ticks() -> int:
    """How often :func:`measure_family` ticks at most."""
    return len(MODELS) * len(MEMORY_KINDS) + len(RESNETS)


def measure_family(size: int | None, results: Results, tick: Callable[[str], None]) -> None:
    """Fill the results' content with a row per network.

    Args:
        size: height and width of the images in pixels; None for each network's own, 224 or 32.
        results: rows are added as they are counted.
        tick: told what is counted next.
    """
    rows: list[dict[str, Any]] = []
    source = f"torchvision's weights {WEIGHTS}"
    results.content = {"models": rows, "step_batch": STEP_BATCH, "accuracy_source": source}
    for name in (*MODELS, *RESNETS):
        rows.append(_row(name, size, tick))


class Family(Kind):
    """Networks with their parameters, arithmetic and memory."""

    name = "models"
    title = "The family"

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        names: Columns = {"network": lambda network: network["name"]}
        arithmetic: Columns = {
            "M parameters": lambda network: f"{network['parameters'] / 1e6:.2f}",
            "GFLOP forward": lambda network: f"{network['forward_flops_per_image'] / 1e9:.3g}",
        }
        title = (
            "kept for backward in MB (1e6 bytes) per image: eager, memory_efficient, dense_ext by recompute"
        )
        models = Table.of(title, results.content["models"], {
            **names, "pixels": lambda network: str(network["size"]), **arithmetic,
            **{kind: _amount("saved_bytes_per_image", kind, 1e6, ".1f") for kind in MEMORY_KINDS},
        })  # fmt: skip
        content, top1 = results.content, "ImageNet top-1 accuracy in %"
        title = (
            f"{top1} ({content['accuracy_source']}) beside what a training step of {content['step_batch']} "
            "images holds in GB (1e9 bytes): eager, dense_ext by recompute"
        )
        accuracy = Table.of(title, _rated(results), {
            **names, "top-1 %": lambda network: f"{network['imagenet_top1_percent']:.2f}", **arithmetic,
            "eager": _amount("step_bytes", "default", 1e9, ".2f"),
            **{policy: _amount("step_bytes", policy, 1e9, ".2f") for policy in RECOMPUTE},
        })  # fmt: skip
        return {"models": models, "accuracy": accuracy}

    @classmethod
    def figures(cls, results: Results) -> dict[str, Draw]:
        from .figures import accuracy_lines, family_bars

        found: dict[str, Draw] = {"models": family_bars} if results.content["models"] else {}
        return found | ({"accuracy": accuracy_lines} if _rated(results) else {})


def _rated(results: Results) -> list[dict[str, Any]]:
    """The networks whose accuracy is known, the most accurate first."""
    known = [network for network in results.content["models"] if network["imagenet_top1_percent"] is not None]
    return sorted(known, key=lambda network: -network["imagenet_top1_percent"])


def _amount(what: str, kind: str, unit: float, spec: str) -> Callable[[dict[str, Any]], str]:
    """A column of the bytes of one kind, "-" where they were not counted."""
    return lambda network: format(network[what][kind] / unit, spec) if kind in network[what] else "-"
