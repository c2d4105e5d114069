"""DistributedDataParallel and fully_shard with a swapped model, two processes on the CPU."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.densenet import _DenseBlock, _Transition

import dense_ext
from dense_ext import eligibility
from dense_ext.eligibility import Fused
from dense_ext.schedule import RECOMPUTE

from .helpers import assert_equal, assert_same_state, randomize, small_densenet
from .processes import needs_gloo, run_in_processes

WORLD = 2


def _twins(build: Callable[[], nn.Module] = small_densenet) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(1)
    return copy.deepcopy(eager), eager


def _monai_densenet() -> nn.Module:
    """A DenseNet whose blocks are Sequentials; fully_shard refuses torchvision's, which are ModuleDicts."""
    from monai.networks.nets import DenseNet  # imported late: it takes seconds, in each process

    options = {"init_features": 10, "growth_rate": 5, "block_config": (2, 3, 2), "bn_size": 3}
    return randomize(DenseNet(2, 3, 4, **options)).double()


def _images(rank: int) -> Tensor:
    """A rank's half of a batch."""
    return torch.randn(2 * WORLD, 3, 40, 40, dtype=torch.float64)[2 * rank : 2 * rank + 2]


def _train_in_parallel(rank: int) -> None:
    """Train swapped and eager for three steps, each rank on its half of the batch."""
    for recompute in ("bottleneck", "block"):
        ours, eager = _twins()
        models = [dense_ext.swap(ours, recompute=recompute), eager]
        parallel = [DistributedDataParallel(model, broadcast_buffers=False) for model in models]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
        for _ in range(3):
            x = _images(rank)
            for model, optimizer in zip(parallel, optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            assert_same_state(models[0], models[1])


def _train_sharded(rank: int) -> None:
    """Swap before and after sharding, compare each with eager in DistributedDataParallel, then restore."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for first, recompute in itertools.product(("shard", "swap"), RECOMPUTE):
        ours, eager = _twins(_monai_densenet)
        if first == "swap":
            dense_ext.swap(ours, recompute=recompute)
        for name, child in ours.features.named_children():
            if "denseblock" in name:
                fully_shard(child, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        if first == "shard":
            dense_ext.swap(ours, recompute=recompute, strict=True)
        parallel = DistributedDataParallel(eager, broadcast_buffers=False)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, eager)]
        for _ in range(3):
            x = _images(rank)
            outputs = []
            for model, optimizer in zip((ours, parallel), optimizers, strict=True):
                optimizer.zero_grad()
                outputs.append(model(x))
                outputs[-1].square().sum().backward()
                optimizer.step()
            assert_equal(outputs[0], outputs[1], f"output, {first} first, {recompute}")
        for (name, a), e in zip(ours.named_parameters(), eager.parameters(), strict=True):
            assert_equal(a.full_tensor().detach(), e.detach(), name)
        assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
        assert all(m in eligibility._snapshots for m in ours.modules() if isinstance(m, Fused)), "ran fused"
        dense_ext.restore(ours)
        assert not any(isinstance(module, Fused) for module in ours.modules())
        assert isinstance(ours.features.denseblock2, FSDPModule)
        ours.eval(), eager.eval()
        assert_equal(ours(x), eager(x), "output of the restored network")


def _train_in_fsdp1(rank: int) -> None:
    """Swap before and after FullyShardedDataParallel wraps the blocks; compare with eager inside it."""
    policy = ModuleWrapPolicy({_DenseBlock, _Transition})
    wrap = functools.partial(
        FullyShardedDataParallel, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    for first in ("swap", "wrap"):
        ours, eager = _twins()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of FSDP, that torchvision's block is a ModuleDict
            if first == "swap":
                dense_ext.swap(ours)
            models = [wrap(ours), wrap(eager)]
            if first == "wrap":
                dense_ext.swap(ours)
        assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
        for _ in range(3):
            x, outputs = _images(rank), []
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                outputs.append(model(x))
                outputs[-1].square().sum().backward()
                optimizer.step()
            assert_equal(outputs[0], outputs[1], f"output, {first} first")
        assert all(m in eligibility._snapshots for m in ours.modules() if isinstance(m, Fused)), "ran fused"


@needs_gloo
def test_two_processes_train_as_eager(tmp_path: Path) -> None:
    run_in_processes([_train_in_parallel, _train_in_fsdp1], WORLD, tmp_path)


@needs_gloo
def test_fsdp2_shards_before_or_after_the_swap(tmp_path: Path) -> None:
    run_in_processes([_train_sharded], WORLD, tmp_path)


def test_data_parallel_on_one_device_is_the_module_itself() -> None:
    model = dense_ext.swap(small_densenet()).eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(torch.nn.DataParallel(model)(x), model(x))
