"""A plain block in one call writes the same bits as its primitives, one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dense_ext import schedule
from dense_ext.backends.base import Backend

from .common import block_of
from .harness import Maker, skip_unless_volumes


class Case(NamedTuple):
    """A block and how it runs."""

    layers: list[tuple[int, int]]  # B and K of each layer
    frozen: Callable[[int], bool] = lambda norm: False  # which norms, by their number
    eps: Callable[[int], float] = lambda norm: 1e-3
    needed: Callable[[int], bool] = lambda conv: True  # which convolutions need a gradient
    size: tuple[int, ...] = (2, 4, 3, 5)  # N, H, W, c0; or for volumes N, D, H, W, c0


CASES = {
    "batch statistics": Case([(8, 4), (8, 4)]),
    "frozen": Case([(8, 4)] * 3, frozen=lambda norm: True),
    "some frozen": Case([(8, 4)] * 4, frozen=lambda norm: norm in (1, 2, 5)),
    "X's norms frozen": Case([(8, 4)] * 2, frozen=lambda norm: norm % 2 == 0),
    "ragged": Case([(12, 3), (5, 9), (20, 1)]),
    "several groups": Case([(4, 1)] * 18),
    "several eps": Case([(4, 2)] * 3, eps=lambda norm: 1e-3 * (1 + norm)),
    "frozen convolutions": Case([(8, 4)] * 3, needed=lambda conv: conv in (1, 4)),
    "one pixel": Case([(8, 4)] * 2, size=(1, 1, 1, 3)),
    "volumes": Case([(8, 4), (12, 3)], frozen=lambda norm: norm == 1, size=(2, 3, 4, 3, 5)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def tensors(value: Any) -> list[Tensor | None]:
    """The tensors in a nest of tuples, lists and gradients, in their order."""
    if value is None or isinstance(value, Tensor):
        return [value]
    if isinstance(value, schedule.LayerGradients):
        value = value.norms, value.convs, value.conv_biases
    return [tensor for part in value for tensor in tensors(part)]


@pytest.mark.each_value
@pytest.mark.parametrize("keeps_z", [True, False], ids=["z kept", "z computed again"])
@pytest.mark.parametrize("in_place", [True, False], ids=["plain strides", "wider buffers"])
def test_the_bits_are_those_of_the_primitives(
    backend: Backend,
    maker: Callable[..., Maker],
    case: Case,
    dtype: torch.dtype,
    keeps_z: bool,
    in_place: bool,
) -> None:
    if backend.plain_blocks is None:
        pytest.skip(f"{backend.name} runs blocks layer by layer")
    n, *sides, c0 = case.size
    if len(sides) == 3:
        skip_unless_volumes(backend)
    device = maker(dtype).device
    block = block_of(c0, case.layers, dtype, device, case.frozen, case.eps, len(sides))
    generator = torch.Generator().manual_seed(1)

    def images(channels: int) -> Tensor:
        values = torch.randn(n, channels + (0 if in_place else 5), *sides, generator=generator)
        values = values.to(device, dtype).contiguous(memory_format=schedule.channels_last(values))
        return values[:, :channels]

    x, grad = images(c0), images(block.out_channels)
    needed = [case.needed(conv) for conv in range(2 * len(block.layers))]
    layer_by_layer = copy.copy(backend)
    layer_by_layer.plain_blocks = layer_by_layer.frozen_blocks = None
    results = []
    for ops in (backend, layer_by_layer):
        out, stats, z = schedule.forward(ops, block, x, keeps_z)  # type: ignore[arg-type]
        # G is overwritten; a copy with its strides.
        g = torch.empty_strided(grad.shape, grad.stride(), dtype=dtype, device=device).copy_(grad)
        gradients = schedule.backward(ops, block, g, out, z, stats, needed)  # type: ignore[arg-type]
        results.append(tensors([out, stats, z, g, *gradients]))
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.stride() == expected.stride()
            assert torch.equal(found, expected)
            assert not found.numel() or found.isfinite().all()


@pytest.mark.parametrize(
    "wrong", ["x", "grad", "stats", "z", "norms", "running statistics", "needed", "weight"]
)
def test_bad_arguments_are_refused(backend: Backend, maker: Callable[..., Maker], wrong: str) -> None:
    if backend.plain_blocks is None:
        pytest.skip(f"{backend.name} runs blocks layer by layer")
    device, dtype = maker(torch.float32).device, torch.float32
    case = CASES["some frozen"]
    block = block_of(case.size[3], case.layers, dtype, device, case.frozen, case.eps)
    *shape, c0 = case.size
    x, grad = torch.zeros(2, *shape, block.out_channels, device=device)
    stats = torch.zeros(2, sum(block.stats_sizes), device=device)
    z, grad_x = torch.zeros(0, device=device), torch.zeros(*shape, c0, device=device)
    parameters, needed = list(schedule.plain_block(block)), [True] * 8
    if wrong == "x":
        x = torch.zeros(*shape, block.out_channels + 1, device=device)
    elif wrong == "grad":
        grad = torch.zeros(*shape, block.out_channels - 1, device=device)
    elif wrong == "stats":
        stats = stats[:, 1:]
    elif wrong == "z":
        z = torch.zeros(3, device=device)
    elif wrong == "norms":
        parameters[1] = parameters[1][1:]
    elif wrong == "running statistics":
        parameters[5] = parameters[5][1:]
    elif wrong == "needed":
        needed = [True]
    elif wrong == "weight":
        parameters[-1][0] = parameters[-1][0].double()
    with pytest.raises(RuntimeError, match=r"must|expected|takes"):
        backend.plain_blocks.backward(grad, x, z, stats, grad_x, needed, *parameters)
    assert not grad_x.any()
    if wrong in ("grad", "needed"):
        return
    with pytest.raises(RuntimeError, match=r"must|expected|takes"):
        backend.plain_blocks.forward(x, z, stats, *parameters)
