"""SyncBatchNorm in training: processes that share a batch compute what one process does on all of it."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet

import dense_ext
from dense_ext.schedule import RECOMPUTE

from .helpers import assert_equal, randomize
from .processes import needs_gloo, run_in_processes
from .recognition.forms import FORMS, Network
from .recognition.test_chains import Encoder, segmenter

# Each process's share of the batch.
OF_TWO, OF_THREE, ONE_WITHOUT_IMAGES = (3, 4), (1, 4, 2), (3, 0, 4)


def features() -> nn.Module:
    """Stem, blocks and transitions of a DenseNet.

    PyTorch's own SyncBatchNorm does not train on a CPU, so no norm is left outside of them.
    """
    torch.manual_seed(0)
    model = randomize(DenseNet(5, (2, 3), 8, 3, num_classes=4)).double().features
    del model.norm5
    return model


def network_of_every_form() -> nn.Module:
    """Recognised blocks, with biases and a maximum pool."""
    torch.manual_seed(0)
    return randomize(Network(FORMS["maximum pool, biases, volumes"])).double()


def encoder() -> nn.Module:
    """A network whose encoder calls the stem and a transition module by module."""
    torch.manual_seed(0)
    inner = Encoder()
    inner.norm2 = nn.Identity()
    return randomize(segmenter(inner)).double()


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "features": (features, (3, 24, 20)), "forms": (network_of_every_form, (5, 4, 6, 5)),
    "encoder": (encoder, (3, 16, 18)),
}  # fmt: skip


def results(model: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, input gradient, and the parameters' gradients and buffers after a step."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    (y * weights).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert leaf.grad is not None
    return y.detach(), leaf.grad, gradients


@cache
def _swapped(name: str) -> nn.Module:
    """A swapped network with synchronised norms; to recognise takes long, so tests copy it."""
    build, _ = NETWORKS[name]
    return dense_ext.swap(nn.SyncBatchNorm.convert_sync_batchnorm(build()), strict=True)


def _train(rank: int, shares: tuple[int, ...]) -> None:
    """Compare a step of each process on its share with a step on the whole batch in this process."""
    for network, (build, shape) in NETWORKS.items():
        eager = build()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sum(shares), *shape, dtype=torch.float64, generator=generator)
        weights = torch.randn(eager(x).shape, dtype=torch.float64, generator=generator)
        eager = build()
        own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        for recompute in RECOMPUTE:
            whole, ours = (copy.deepcopy(model) for model in (eager, _swapped(network)))
            dense_ext.swap(ours, recompute=recompute, strict=True)
            again = copy.deepcopy(ours)
            y, grad, gradients = results(whole, x, weights)
            found, found_grad, found_gradients = results(ours, x[own], weights[own])
            assert_equal(found, y[own], "output")
            assert_equal(found_grad, grad[own], "input gradient")
            largest = max(float(g.abs().max()) for g in gradients)
            for (name, _), g, e in zip(eager.named_parameters(), found_gradients, gradients, strict=True):
                dist.all_reduce(g)
                assert_equal(g, e, f"gradient of {name}", rounding=1e-13 * largest)
            for (name, b), e in zip(ours.named_buffers(), whole.buffers(), strict=True):
                assert_equal(b, e, name)
                if b.is_floating_point():
                    every = [torch.empty_like(b) for _ in shares]
                    dist.all_gather(every, b)
                    assert all(torch.equal(other, b) for other in every), f"{name}, bit by bit"
            assert torch.equal(results(again, x[own], weights[own])[1], found_grad), "twice the same bits"


def _count(rank: int) -> None:
    """Each channel is exchanged once."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(features())
    dense_ext.swap(model, strict=True)
    gather, sent = dist.all_gather_into_tensor, []

    def counted(every: Tensor, own: Tensor, group: Any = None) -> None:
        sent.append(own.numel())
        gather(every, own, group=group)

    with mock.patch.object(dist, "all_gather_into_tensor", counted):
        y = model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
        forward = list(sent)
        y.sum().backward()
    backward = sent[len(forward) :]
    # Stem and transition: the number of values, and the statistics where the block did not carry them.
    c, k, b = 8, 5, 15
    block = [1, *layers(c, k, b, 2)], [1, *layers(9, k, b, 3)]
    assert forward == [1, 2 * 8, *block[0], 1, *block[1]]
    assert backward == [*layers(9, k, b, 3)[::-1], 2 * 18, *layers(c, k, b, 2)[::-1], 2 * 8]


def layers(c0: int, k: int, b: int, count: int) -> list[int]:
    """The values that a block sends in forward: mean and variance of its input, each z and each y."""
    return [2 * c0, *[2 * size for _ in range(count) for size in (b, k)]]


def _refuse(rank: int) -> None:
    """What is not shared is refused."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(features())
    dense_ext.swap(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="statistics that several processes share"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (group,) = [dist.new_group([0, 1])]
    model.denseblock1.denselayer1.norm1.process_group = group  # type: ignore[union-attr]
    assert "different processes" in str(model.denseblock1.unfusable())  # type: ignore[union-attr, operator]


@needs_gloo
def test_two_processes(tmp_path: Path) -> None:
    run_in_processes([partial(_train, shares=OF_TWO), _count, _refuse], 2, tmp_path)


@needs_gloo
def test_three_processes(tmp_path: Path) -> None:
    run_in_processes(
        [partial(_train, shares=shares) for shares in (OF_THREE, ONE_WITHOUT_IMAGES)], 3, tmp_path
    )


def test_a_single_process_trains_as_with_batch_norm() -> None:
    eager = features()
    ours = dense_ext.swap(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(eager)), strict=True)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    weights = torch.randn(eager(x).shape, dtype=torch.float64)
    eager = features()
    for found, expected in zip(results(ours, x, weights)[2], results(eager, x, weights)[2], strict=True):
        assert_equal(found, expected, "gradient")
