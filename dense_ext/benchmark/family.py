"""The DenseNet family beside ResNets: accuracy, parameters, arithmetic and memory, without running any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..memory import Planner
from ..models import MODELS
from .memory import saved_bytes
from .networks import flops_per_image, image_size, plain, torchvision_twin
from .peers import EAGER, OURS
from .results import Measurement, PeerLabel, Results
from .tables import Kind, Table

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SIZE = 224  # of the images that networks for ImageNet take
STEP_BATCH = 32  # images of the training step whose memory is told
# V2 of the ResNets' weights comes from another recipe, which the DenseNets' never had.
WEIGHTS = "IMAGENET1K_V1"
_BATCH = 8
_TRAINING_BYTES = 3 * 4  # of a parameter in float32: its value, gradient and momentum

# What is counted of every DenseNet, in order; of a ResNet the first. The images are in channels_last memory.
_EAGER, _EFFICIENT = EAGER["eager-cl"], EAGER["memory-efficient-cl"]
COUNTED = {peer.name: peer for peer in (_EAGER, _EFFICIENT, *OURS.values())}


def _saved_per_image(build: Callable[[], nn.Module], size: int) -> float:
    """Bytes kept for backward, float32, in a batch of 8."""
    with FakeTensorMode():
        network = build().train()
        images = torch.randn(_BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(_BATCH, dtype=torch.long)
        return saved_bytes(network, lambda: F.cross_entropy(network(images), labels)) / _BATCH


def _builders(name: str) -> dict[str, Callable[[], nn.Module]]:
    """How to make a network as each of :data:`COUNTED`; a ResNet as the first."""
    if name not in MODELS:
        return {_EAGER.name: getattr(torchvision.models, name)}
    make = MODELS[name]
    return {
        _EAGER.name: lambda: plain(make()),
        _EFFICIENT.name: lambda: torchvision_twin(make(), True, "cpu"),
        **{peer.name: partial(make, recompute=policy) for policy, peer in OURS.items()},
    }


def _of_network(name: str, build: Callable[[], nn.Module], size: int) -> dict[str, float]:
    """What is the same whatever runs a network; top-1 accuracy where torchvision has weights for the size."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build().parameters())
    flops = flops_per_image(build, (3, size, size), backward=False)
    found: dict[str, float] = {"parameters": parameters, "forward_flops_per_image": flops}
    if size == SIZE and name in torchvision.models.list_models(torchvision.models):
        weights: Any = torchvision.models.get_model_weights(name)
        found["imagenet_top1_percent"] = weights[WEIGHTS].meta["_metrics"]["ImageNet-1K"]["acc@1"]
    return found


def _rows(name: str, size: int | None, tick: Callable[[str], None]) -> Iterator[Measurement]:
    """A row of each peer that there is of a network, as it is counted."""
    builders = _builders(name)
    side = size or (image_size(name) if name in MODELS else SIZE)
    same = _of_network(name, builders[_EAGER.name], side)
    for peer, build in builders.items():
        tick(f"{name}, {peer}")
        row = Measurement({"model": name, "size": side, "dtype": "float32"}, peer, measures={**same})
        with row.failing():  # torchvision has no networks without bottleneck layers
            row.measures["saved_bytes_per_image"] = saved = _saved_per_image(build, side)
            if peer == _EAGER.name:  # its backward may hold more
                held = round(STEP_BATCH * saved) + _TRAINING_BYTES * int(same["parameters"])
                row.measures["step_bytes"] = held
            elif policy := COUNTED[peer].network.recompute:
                planner = Planner(name, (3, side, side), device="cpu")
                row.measures["step_bytes"] = planner.estimate(STEP_BATCH, policy).peak
        yield row


def ticks() -> int:
    """How often :func:`measure_family` ticks at most."""
    return len(MODELS) * len(COUNTED) + len(RESNETS)


def options(size: int | None) -> dict[str, Any]:
    """What the results say of how they were counted."""
    return {"size": size, "step_batch": STEP_BATCH, "accuracy_source": f"torchvision's weights {WEIGHTS}"}


def measure_family(size: int | None, results: Results, tick: Callable[[str], None]) -> None:
    """Fill the results with a row per network and peer.

    Args:
        size: height and width of the images in pixels; None for each network's own, 224 or 32.
        results: rows are added as they are counted.
        tick: told what is counted next.
    """
    for name, peer in COUNTED.items():
        results.peers[name] = PeerLabel(peer.label.removesuffix(", channels_last"), peer.ours)
    for network in (*MODELS, *RESNETS):
        for row in _rows(network, size, tick):
            results.rows.append(row)


class Family(Kind):
    """Networks with their parameters, arithmetic and memory."""

    name = "models"
    title = "The family"

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        peers = {n: p.label.removeprefix("dense_ext, recompute ") for n, p in results.peers.items()}
        title = (
            "kept for backward in MB (1e6 bytes) per image: eager, memory_efficient, dense_ext by recompute"
        )
        models = Table.pivot(title, _cells(results.rows, "saved_bytes_per_image", peers), "network")
        source, batch = (results.options[name] for name in ("accuracy_source", "step_batch"))
        title = (
            f"ImageNet top-1 accuracy in % ({source}) beside what a training step of {batch} images holds in "
            "GB (1e9 bytes): eager, dense_ext by recompute"
        )
        rated = results.measured("imagenet_top1_percent")
        rated.sort(key=lambda row: -row.measures["imagenet_top1_percent"])
        peers.pop(_EFFICIENT.name, None)
        accuracy = Table.pivot(title, _cells(rated, "step_bytes", peers), "network")
        return {"models": models, "accuracy": accuracy}


def _cells(rows: list[Measurement], measure: str, peers: dict[str, str]) -> dict[tuple[str, str], str]:
    """What each network has, and a measure of it by peer: bytes for backward in MB, those of a step in GB."""
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        name, of = str(row.case["model"]), row.measures
        if row.peer == _EAGER.name:
            if measure == "step_bytes":
                cells[name, "top-1 %"] = f"{of['imagenet_top1_percent']:.2f}"
            else:
                cells[name, "pixels"] = str(row.case["size"])
            cells[name, "M parameters"] = f"{of['parameters'] / 1e6:.2f}"
            cells[name, "GFLOP forward"] = f"{of['forward_flops_per_image'] / 1e9:.3g}"
            cells |= {(name, peer): "-" for peer in peers.values()}
        if measure in of:
            amount = f"{of[measure] / 1e9:.2f}" if measure == "step_bytes" else f"{of[measure] / 1e6:.1f}"
            cells[name, peers[row.peer]] = amount
    return cells
