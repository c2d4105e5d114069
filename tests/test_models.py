"""The models: torchvision's keys and weights, the papers' parameter counts, construction errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision.models
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet

import dense_ext
from dense_ext.models import MODELS

from .helpers import assert_equal, assert_trains_alike, randomize


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_state_dict_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = MODELS[name](), getattr(torchvision.models, name)()
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # arXiv 1608.06993, table 2: CIFAR-10
        ("densenet_40_12", 1.0),
        ("densenet_bc_100_12", 0.8),
        ("densenet_bc_250_24", 15.3),
        ("densenet_bc_190_40", 25.6),
    ],
)
def test_parameter_counts_are_the_papers(name: str, millions: float) -> None:
    with torch.device("meta"):
        assert round(parameters(MODELS[name]()) / 1e6, 1) == millions


def torchvision_twin() -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs = randomize(TorchvisionDenseNet(5, (2, 3), 8, 3, 0.0, num_classes=4)).double()
    ours = dense_ext.DenseNet(5, (2, 3), 8, 3, num_classes=4).double()
    return ours, theirs


def test_loads_torchvisions_weights_and_equals_it(backend: str) -> None:
    ours, theirs = torchvision_twin()
    ours.load_state_dict(theirs.state_dict())
    assert_trains_alike(ours, theirs, torch.randn(2, 3, 40, 40, dtype=torch.float64))


def test_loads_old_key_names() -> None:
    ours, theirs = torchvision_twin()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", k): v
        for k, v in theirs.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    assert any(".norm.1." in key for key in old)
    result = ours.load_state_dict(old, strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    for key, value in ours.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert_equal(value, theirs.state_dict()[key], key)


SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 2), "small_inputs": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "growth per block": {"growth_rate": (3, 5), "block_config": (2, 2)},
    "small inputs": {**SMALL, "in_channels": 1},
    "no bottleneck": {**SMALL, "bn_size": None, "compression": 1.0},
    "one block with dropout": {
        "growth_rate": 4, "block_config": (2,), "drop_rate": 0.2, "num_init_features": 6,
    },
}  # fmt: skip


@pytest.mark.each_pair
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train(backend: str, recompute: str, variant: str) -> None:
    options = VARIANTS[variant]
    model = dense_ext.DenseNet(num_classes=3, recompute=recompute, **options)
    images = torch.randn(4, options.get("in_channels", 3), 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    target = torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(row.runs == "fused" for row in dense_ext.report(model).rows)


@pytest.mark.parametrize("name", ["densenet_bc_100_12", "densenet_40_12"])
def test_cifar_models_run(name: str) -> None:
    model = MODELS[name]().eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth_rate": (32, 32)}, "growth_rate has 2 entries, expected 4"),
        ({"block_config": ()}, "must be positive"),
        ({"block_config": (6, 0)}, "must be positive"),
        ({"compression": 0.0}, r"compression must be in \(0, 1\], got 0.0"),
        ({"recompute": "all"}, "recompute must be one of"),
        ({"backend": "metal"}, "backend must be one of"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_ext.DenseNet(**options)


def test_restore_leaves_own_models_fused() -> None:
    model = dense_ext.DenseNet(4, (2, 2), 8)
    dense_ext.restore(model)
    assert all(row.runs == "fused" for row in dense_ext.report(model).rows)
