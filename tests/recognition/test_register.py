"""``dense_ext.register``: classes that tracing refuses are served by their layers, after the same proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dense_ext
from dense_ext import recognise

from ..helpers import Calls, assert_equal, assert_trains_alike, randomize, twin

C, K = 6, 4
Layers = Callable[[Any], Sequence[Sequence[nn.Module]]]


class Block(nn.Module):
    """A block whose forward branches on its input, so that it cannot be traced."""

    def __init__(self, drop_rate: float = 0.0) -> None:
        super().__init__()
        widths = [C + i * K for i in range(3)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, K, 3, padding=1) for width in widths)
        self.dropout = nn.Dropout(drop_rate)
        self.activation = nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 100:
            raise ValueError("a large batch")
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, self.dropout(conv(self.activation(norm(x))))], 1)
        return x


class Network(nn.Module):
    def __init__(self, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.block = Block(drop_rate)
        self.last = nn.Conv2d(C + 3 * K, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.block(x)))


def parts(block: Any) -> list[list[nn.Module]]:
    return [[n, block.activation, c, block.dropout] for n, c in zip(block.norms, block.convs, strict=True)]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognise, "_registered", {})


def images() -> Tensor:
    return torch.randn(2, C, 6, 5, dtype=torch.float64)


def test_a_registered_class_is_fused(recompute: str) -> None:
    torch.manual_seed(0)
    model = randomize(Network()).double()
    with pytest.raises(ValueError, match="cannot be traced"):
        dense_ext.swap(model)
    dense_ext.register(Block, parts)
    ours, eager = twin(model, lambda m: dense_ext.swap(m, strict=True, recompute=recompute))
    with Calls() as calls:
        assert_trains_alike(ours, eager, images())
    assert "dense_block" in calls.names
    dense_ext.restore(ours)
    assert type(ours.block) is Block
    assert_equal(ours(images()[:1] * 0), eager(images()[:1] * 0), "restored")


def test_dropout_is_that_of_the_layers() -> None:
    dense_ext.register(Block, parts)
    model = dense_ext.swap(Network(0.5).double(), strict=True)
    added = model.block(images())[:, C:]
    assert 0.3 < (added == 0).double().mean() < 0.7
    assert (model.eval().block(images())[:, C:] != 0).all()


WRONG: dict[str, tuple[Layers, str]] = {
    "another order": (lambda b: parts(b)[::-1], "channels"),
    "another activation": (
        lambda b: [[n, c, b.dropout] for n, c in zip(b.norms, b.convs, strict=True)],
        "its output differs",
    ),
    "no dropout": (lambda b: [layer[:3] for layer in parts(b)], "its dropout differs"),
    "a layer too few": (lambda b: parts(b)[:2], "its dropout differs"),
    "no layers": (lambda b: [], "there are none"),
    "two norms": (lambda b: [[n, n, c] for n, c in zip(b.norms, b.convs, strict=True)], "2 norms"),
    "a module from elsewhere": (lambda b: [[nn.BatchNorm2d(C)]], "not inside the module"),
    "another kind of module": (lambda b: [[b]], "Block is not a norm"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_layers_are_refused(name: str) -> None:
    layers, reason = WRONG[name]
    dense_ext.register(Block, layers)
    with pytest.raises(ValueError, match=reason):
        dense_ext.swap(Network(0.5))


def test_only_classes_of_modules_can_be_registered() -> None:
    with pytest.raises(TypeError, match="kind must be a class"):
        dense_ext.register(Network(), parts)  # type: ignore[arg-type]
