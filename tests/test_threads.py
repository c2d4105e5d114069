"""Blocks that train at the same time in different threads compute the same as each on its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import dense_ext

from .helpers import eager_block, eager_transition

THREADS, STEPS = 8, 2
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def network(seed: int, backend: str) -> tuple[nn.Module, Tensor]:
    """Two blocks and a transition, and their input, with different sizes and policies for each seed."""
    torch.manual_seed(seed)
    parts = [eager_block(3, 6 + seed, 5), eager_transition(21 + seed, 4), eager_block(2, 4, 3 + seed)]
    policy = ("none", "bottleneck", "block")[seed % 3]
    for part in parts:
        dense_ext.swap(part, recompute=policy, backend=backend)
    dtype = DTYPES[seed % len(DTYPES)]
    return nn.Sequential(*parts).to(dtype), torch.randn(2, 6 + seed, 17 - seed, 12 + seed, dtype=dtype)


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of the input and of all parameters over some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        leaf = x.clone().requires_grad_()
        model(leaf).float().square().sum().backward()
        assert leaf.grad is not None
        found += [leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return found


def train_together(backend: str) -> list[list[Tensor]]:
    """Train the networks in one thread each, started at the same moment; returns each one's gradients."""
    networks = [network(seed, backend) for seed in range(THREADS)]
    ready = threading.Barrier(THREADS)

    def run(one: tuple[nn.Module, Tensor]) -> list[Tensor]:
        ready.wait()
        return train(*one)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, networks))


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with one PyTorch thread, and with three."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_side_by_side(backend: str) -> None:
    alone = [train(*network(seed, backend)) for seed in range(THREADS)]
    for seed, found in enumerate(train_together(backend)):
        for one, other in zip(found, alone[seed], strict=True):
            assert torch.equal(one, other), f"network {seed}: the bits differ"
