"""What both tests of make_graphed do: train a model by it and a copy without it, and compare all."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Graphed = Callable[[Tensor], Tensor]


def train(model: nn.Module, call: Graphed, batches: list[Tensor], accumulate: bool = False) -> list[Tensor]:
    """SGD on each batch; returns outputs, gradients, parameters and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for i, batch in enumerate(batches):
        y = call(batch)
        (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        if not accumulate or i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *(t.detach() for t in model.state_dict().values())]


def assert_trains_alike(
    model: nn.Module,
    graph: Callable[[nn.Module], Graphed],
    batches: list[Tensor],
    accumulate: bool = False,
    tolerance: float = 0,
) -> None:
    """The same numbers come from the model with and without graphs, up to a share of their norm."""
    plain = copy.deepcopy(model)
    expected = train(plain, plain, batches, accumulate)
    found = train(model, graph(model), batches, accumulate)
    assert len(found) == len(expected)
    for got, exact in zip(found, expected, strict=True):
        difference, size = (got.double() - exact.double()).norm().item(), exact.double().norm().item()
        assert difference <= tolerance * size
