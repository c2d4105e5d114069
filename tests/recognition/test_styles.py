"""Networks in the styles in which people write them are recognised, fused, and equal to eager PyTorch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import dense_ext
from dense_ext.recognise import Recognised

from ..helpers import Calls, assert_equal, assert_trains_alike, randomize, twin
from .styles import STYLES, C, Classifier, K, StarredBlock


def images(model: nn.Module) -> torch.Tensor:
    volumes = any(isinstance(module, nn.Conv3d) for module in model.modules())
    return torch.randn(2, 3, *((4, 8, 6) if volumes else (8, 8)), dtype=torch.float64)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    return model


Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module", params=STYLES)
def networks(request: pytest.FixtureRequest) -> Pair:
    """A swapped network and its original; to recognise takes long, so tests copy them."""
    torch.manual_seed(0)
    return twin(randomize(STYLES[request.param]()).double(), lambda m: dense_ext.swap(m, strict=True))


@pytest.fixture(scope="module")
def rows(networks: Pair) -> Any:
    """The rows of the swapped network's report, which traces its unswapped modules again."""
    return tuple(dense_ext.report(networks[0]).rows)


def has_dropout(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) or hasattr(m, "drop_rate") for m in model.modules())


@pytest.mark.each_value
def test_trains_as_eager(networks: Pair, recompute: str) -> None:
    ours, eager = copy.deepcopy(networks)
    if has_dropout(eager):
        ours = copy.deepcopy(without_dropout(eager))
        dense_ext.swap(ours, recompute=recompute)
    elif recompute != "bottleneck":  # with which it is swapped already
        dense_ext.swap(ours, recompute=recompute)
    x = images(eager)
    with Calls() as calls:
        assert_trains_alike(ours, eager, x)
    assert "dense_block" in calls.names
    ours.eval()
    eager.eval()
    with torch.no_grad():
        assert_equal(ours(x), eager(x), "output in eval mode")


def test_state_and_restore(networks: Pair) -> None:
    model, eager = copy.deepcopy(networks)
    assert list(model.state_dict()) == list(eager.state_dict())
    assert any(isinstance(m, Recognised) for m in model.modules())
    dense_ext.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in eager.modules()]
    assert [set(m.__dict__) for m in model.modules()] == [set(m.__dict__) for m in eager.modules()]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_are_fused(how: Any, networks: Pair, rows: Any) -> None:
    ours = copy.deepcopy(networks[0]).eval()
    other = how(ours)
    x = images(ours)
    with Calls() as calls:
        found = other(x)
    assert "dense_block" in calls.names
    assert torch.equal(found, ours(x))
    expected = [(row.name, row.runs) for row in rows]
    assert [(row.name, row.runs) for row in dense_ext.report(other).rows] == expected


def test_every_dense_part_is_fused(rows: Any) -> None:
    assert {row.kind for row in rows} & {"dense block", "stage"}
    assert all(row.runs == "fused" for row in rows)


def test_checkpoints_update_running_statistics_once() -> None:
    """A checkpoint's backward runs the norms again in eager; ours equals eager without checkpoints."""
    torch.manual_seed(0)
    eager = randomize(Classifier(StarredBlock(False), C + 3 * K)).double()
    ours = Classifier(StarredBlock(True), C + 3 * K).double()
    ours.load_state_dict(eager.state_dict())
    dense_ext.swap(ours, strict=True)
    assert_trains_alike(ours, eager, images(eager))
