"""``dense_ext.functional``: blocks and transitions of modules that the caller owns."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dense_ext

from .helpers import Calls, assert_equal, assert_trains_alike, randomize

C, K, B = 6, 4, 8


def layers(bottleneck: bool, dims: int = 2) -> list[list[nn.Module]]:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    widths = [C + i * K for i in range(3)]
    if bottleneck:
        return [
            [norm(w), conv(w, B, 1, bias=False), norm(B), conv(B, K, 3, padding=1, bias=False)]
            for w in widths
        ]
    return [[norm(w), conv(w, K, 3, padding=1, bias=False)] for w in widths]


class Net(nn.Module):
    """A block and a transition, by functions of dense_ext or by PyTorch's own."""

    def __init__(self, bottleneck: bool, dims: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(layer) for layer in layers(bottleneck, dims))
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.norm, self.conv = norm(C + 3 * K), conv(C + 3 * K, 5, 1, bias=False)
        self.recompute: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute is not None:
            block = [list(layer) for layer in self.layers]
            x = dense_ext.functional.dense_block(x, block, recompute=self.recompute)
            return dense_ext.functional.transition(x, self.norm, self.conv)
        for layer in self.layers:
            new = x
            for norm, conv in zip(layer[::2], layer[1::2], strict=True):
                new = conv(F.relu(norm(new)))
            x = torch.cat([x, new], 1)
        pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool3d
        return pool(self.conv(F.relu(self.norm(x))), 2)


def pair(bottleneck: bool = True, dims: int = 2, recompute: str = "bottleneck") -> tuple[Net, Net]:
    eager = randomize(Net(bottleneck, dims)).double()
    ours = copy.deepcopy(eager)
    ours.recompute = recompute  # type: ignore[assignment]
    return ours, eager  # type: ignore[return-value]


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_trains_as_eager(bottleneck: bool, dims: int, recompute: str) -> None:
    ours, eager = pair(bottleneck, dims, recompute)
    with Calls() as calls:
        assert_trains_alike(ours, eager, torch.randn(2, C, *[5, 6, 4][:dims], dtype=torch.float64))
    assert {"dense_block", "transition"} <= set(calls.names)


def test_compiles_and_exports() -> None:
    ours, eager = pair()
    x = torch.randn(2, C, 6, 6, dtype=torch.float64)
    compiled = torch.compile(ours.eval(), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), eager.eval()(x), "compiled")
    program = torch.export.export(ours, (x,))
    assert "dense_ext" not in str(program.graph)
    assert_equal(program.module()(x), eager(x).detach(), "exported")


def set_groups(model: nn.Module) -> None:
    model.layers[1][3] = nn.Conv2d(B, K, 3, padding=1, groups=2, bias=False).double()
    nn.init.ones_(model.layers[1][3].weight)


def add_a_hook(model: nn.Module) -> None:
    model.layers[0][3].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(set_groups, "layer 1: module 3 has groups 2"), (add_a_hook, "layer 0: module 3 carries a hook")],
)
def test_what_the_operator_does_not_support_runs_one_by_one(change: object, reason: str) -> None:
    ours, eager = pair()
    for model in (ours, eager):
        change(model)  # type: ignore[operator]
    x = torch.randn(2, C, 6, 6, dtype=torch.float64)
    with Calls() as calls, pytest.warns(UserWarning, match=f"one by one: {reason}"):
        assert_equal(ours(x), eager(x), "output")
    assert calls.names == ["transition"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("pool", ["average", "max"])
def test_every_dimension_activation_and_pool(dims: int, pool: str) -> None:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    block = [[norm(C + i * K), conv(C + i * K, K, 3, padding=1)] for i in range(2)]
    last = [norm(C + 2 * K), conv(C + 2 * K, 5, 1)]
    for module in (*block[0], *block[1], *last):
        randomize(module).double()
    x = torch.randn(2, C, *(4, 6, 5)[:dims], dtype=torch.float64)
    act = nn.LeakyReLU(0.3)
    with Calls() as calls:
        y = dense_ext.functional.dense_block(x, block, activation=act)
        y = dense_ext.functional.transition(y, *last, activation=act, pool=pool)
    assert calls.names == ["dense_block", "transition"]
    for layer in block:
        x = torch.cat([x, layer[1](act(layer[0](x)))], 1)
    pooling = getattr(nn, f"{'Avg' if pool == 'average' else 'Max'}Pool{dims}d")(2)
    assert_equal(y, pooling(last[1](act(last[0](x)))), "transition")


def test_an_activation_that_is_not_known_runs_eagerly() -> None:
    x, block = torch.randn(2, C, 5, 5), layers(False)
    with Calls() as calls, pytest.warns(UserWarning, match="the activation is Tanh"):
        y = dense_ext.functional.dense_block(x, block, activation=nn.Tanh())
    assert calls.names == []
    for norm, convolution in block:
        x = torch.cat([x, convolution(torch.tanh(norm(x)))], 1)
    assert_equal(y, x, "block", 1e-5)


def test_dropout_drops_and_scales() -> None:
    x = torch.randn(2, C, 8, 8)
    block = layers(True)
    torch.manual_seed(0)
    dropped = dense_ext.functional.dense_block(x, block, drop_rate=0.5)[:, C : C + K]
    kept = dense_ext.functional.dense_block(x, block)[:, C : C + K]
    mask = dropped != 0
    assert 0.3 < mask.float().mean() < 0.7
    torch.testing.assert_close(dropped[mask], 2 * kept[mask])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "each layer must have 2 modules, or each 4"),
        ({"layers": [layers(True)[0], layers(False)[1]]}, r"got \[2, 4\]"),
        ({"drop_rate": 2.0}, "drop_rate must be a probability"),
        ({"recompute": "all"}, "recompute must be one of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    arguments = {"layers": layers(True), **options}
    with pytest.raises(ValueError, match=message):
        dense_ext.functional.dense_block(torch.randn(2, C, 4, 4), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [3, 5])
def test_autocast_rounds_no_more_than_eager(window: int) -> None:
    """A block of float32 under autocast to bfloat16; the error is that of the output and of x's gradient."""
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        ours, eager = pair()
        for model in (ours, eager):
            for layer in model.layers:
                weight = torch.randn(K, B, window, window, generator=torch.Generator().manual_seed(seed)) / 16
                layer[3] = nn.Conv2d(B, K, window, padding=window // 2, bias=False).double()  # type: ignore[index]
                layer[3].weight.data.copy_(weight)  # type: ignore[index]
        x = torch.randn(4, C, 12, 12, dtype=torch.float64)
        exact = _output_and_gradient(copy.deepcopy(eager), x)
        errors = []
        for model in (ours, eager):
            with torch.autocast("cpu", torch.bfloat16):
                found = _output_and_gradient(model.float(), x.float())
            errors.append(sum((a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)))
        ratios.append(float(errors[0] / errors[1]))
    assert statistics.geometric_mean(ratios) <= 1.15, ratios


def _output_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return y.detach(), torch.autograd.grad(y.double().square().sum(), leaf)[0]
