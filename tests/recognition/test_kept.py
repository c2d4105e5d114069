"""Swaps and reports run users' code to trace it; they leave the objects that it changes as they are."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock

import dense_ext

from .styles import C, CatFunctional, K

HISTORY: list[Any] = []
STEPS = 0


class Meter:
    """Counts and sums, in attributes, in slots of a part, and in its class."""

    made: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self.recent: Any = collections.deque(maxlen=3)
        self.by_name: Any = collections.defaultdict(list)
        self.order: Any = collections.OrderedDict(first=1)
        self.last = Slots()

    def update(self, value: Any) -> None:
        self.count += 1
        self.total = self.total + value.detach()
        self.recent.append(value)
        self.by_name["loss"].append(value)
        self.order["loss"] = value
        self.last.value = value
        self.made.append(value)


class Slots:
    __slots__ = ("value",)


def counted(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    calls, seen = 0, []

    def call(x: Any) -> Any:
        nonlocal calls
        calls += 1
        seen.append(x)
        call.state = calls, len(seen)  # type: ignore[attr-defined]
        return function(x)

    call.state = calls, len(seen)  # type: ignore[attr-defined]
    return call


@counted
def identity(x: Any) -> Any:
    return x


class Updates(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.norm, self.meter = block, nn.BatchNorm2d(C + 2 * K), Meter()
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        global STEPS
        STEPS += 1
        y = identity(self.block(x))
        self.meter.update(y.mean())
        HISTORY.append(y)
        self.scale = self.rng.random() + random.random() + np.random.rand() + torch.rand(()).item()
        return self.norm(y)


class UpdatesInABlock(nn.Module):
    """A block that looks dense, with the same effects."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.meter = own_block(), Meter()

    def forward(self, x: Tensor) -> Tensor:
        global STEPS
        STEPS += 1
        HISTORY.append(x)
        self.meter.update(x.mean())
        return identity(self.layers(x))


def state(model: Any) -> Any:
    meters = [
        (m.count, m.total, *m.recent, *m.by_name, *m.order.items(), hasattr(m.last, "value"), len(m.made))
        for m in (module.meter for module in model.modules() if hasattr(module, "meter"))
    ]
    own = [set(module.__dict__) for module in model.modules()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return meters, own, len(HISTORY), STEPS, identity.state, generators  # type: ignore[attr-defined]


def own_block() -> nn.Module:
    return nn.Sequential(*[CatFunctional(C + i * K) for i in range(2)])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "around a known block": lambda: Updates(_DenseBlock(2, C, 2, K, 0.0)),
    "around a block of its own": lambda: Updates(
        nn.Sequential(*[CatFunctional(C + i * K) for i in range(2)])
    ),
    "inside a block": UpdatesInABlock,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", ["swap", "report"])
def test_users_objects_are_left_alone(what: str, model: str) -> None:
    net: Any = MODELS[model]()
    added = set(dense_ext.swap.__globals__["ADDED"])
    before = state(net)
    getattr(dense_ext, what)(net)
    meters, own, *rest = state(net)
    assert [meters, [names - added for names in own], *rest] == list(before)
    if model != "inside a block":
        drawn = net.rng.getstate()
        net.rng.seed(0)
        assert drawn == net.rng.getstate()


def test_a_swap_that_is_refused_leaves_users_objects_alone() -> None:
    net = Updates(nn.Sequential(nn.Conv2d(C, C + 2 * K, 1), nn.BatchNorm2d(C + 2 * K)))
    before = state(net)
    with pytest.raises(ValueError, match="contains no dense block"):
        dense_ext.swap(net)
    assert state(net) == before


def test_a_network_that_keeps_its_features_elsewhere_gets_copies() -> None:
    net: Any = dense_ext.swap(Updates(_DenseBlock(2, C, 2, K, 0.0)))
    assert net.block.returns_copy
