"""The DenseNet family beside ResNets: accuracy, parameters, arithmetic and memory, without running any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..memory import Planner
from ..models import MODELS, DenseNet
from ..schedule import RECOMPUTE
from .errors import UsageError
from .flops import without_memory
from .memory import saved_bytes
from .networks import plain, takes_small_images, torchvision_twin
from .results import Results

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SIZE, SMALL_SIZE = 224, 32  # of the images that the networks for ImageNet and for CIFAR take
STEP_BATCH = 32  # images of the training step whose memory is told
# V2 of the ResNets' weights comes from another recipe, which the DenseNets' never had.
WEIGHTS = "IMAGENET1K_V1"
_BATCH = 8
_TRAINING_BYTES = 3 * 4  # of a parameter in float32: its value, gradient and momentum

# What is counted for every DenseNet, in order.
MEMORY_KINDS = ("default", "memory_efficient", *RECOMPUTE)


def _count(build: Callable[[], nn.Module], size: int) -> tuple[float, int]:
    """Bytes per image kept for backward, float32, in a batch of 8; and the forward's operations per image."""
    with without_memory():
        network = build().train()
        images = torch.randn(_BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(_BATCH, dtype=torch.long)
        saved = saved_bytes(network, lambda: F.cross_entropy(network(images), labels))
        # On its own: it hooks every module, and then networks of dense_ext run unfused.
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(images)
    return saved / _BATCH, counter.get_total_flops() // _BATCH


def _dense_builders(name: str) -> dict[str, Callable[[], nn.Module]]:
    """How to make the network of each kind of memory; without memory_efficient where torchvision lacks it."""
    make = MODELS[name]
    builders: dict[str, Callable[[], nn.Module]] = {"default": lambda: plain(make())}
    with torch.device("meta"):
        model: DenseNet = make()
    try:
        torchvision_twin(model, memory_efficient=True)
    except UsageError:
        pass
    else:
        builders["memory_efficient"] = lambda: torchvision_twin(model, True, "cpu")
    for policy in RECOMPUTE:
        builders[policy] = lambda policy=policy: make(recompute=policy)  # type: ignore[misc]
    return builders


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
    saved, flops = {}, {}
    for kind, build in builders.items():
        tick(f"{name}, {kind}")
        saved[kind], flops[kind] = _count(build, side)
    parameters = sum(p.numel() for p in network.parameters())
    return {
        "name": name,
        "size": side,
        "imagenet_top1_percent": _top1(name, side),
        "parameters": parameters,
        "forward_flops_per_image": flops["default"],
        "saved_bytes_per_image": saved,
        "step_bytes": _step_bytes(name, side, saved["default"], parameters),
    }


def ticks() -> int:
    """How often :func:`measure_family` ticks at most."""
    return len(MODELS) * len(MEMORY_KINDS) + len(RESNETS)


def measure_family(size: int | None, results: Results, tick: Callable[[str], None]) -> None:
    """Fill ``results["models"]`` with a row per network.

    Args:
        size: height and width of the images in pixels; None for each network's own, 224 or 32.
        results: rows are added as they are counted.
        tick: told what is counted next.
    """
    results["models"], results["step_batch"] = [], STEP_BATCH
    results["accuracy_source"] = f"torchvision's weights {WEIGHTS}"
    for name in (*MODELS, *RESNETS):
        results["models"].append(_row(name, size, tick))
