"""DistributedDataParallel over a swapped model, two processes on the CPU."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import dense_ext

from .helpers import assert_same_state, small_densenet

WORLD = 2


def _worker(rank: int, folder: str, recompute: str) -> None:
    """Three steps of swapped and eager side by side, each rank on its own half of the batch."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timeout
    )
    try:
        torch.manual_seed(0)
        eager = small_densenet()
        ours = small_densenet()
        ours.load_state_dict(eager.state_dict())
        models = [dense_ext.swap(ours, recompute=recompute), eager]
        parallel = [DistributedDataParallel(model, broadcast_buffers=False) for model in models]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
        torch.manual_seed(1)
        for _ in range(3):
            x = torch.randn(2 * WORLD, 3, 40, 40, dtype=torch.float64)[2 * rank : 2 * rank + 2]
            for model, optimizer in zip(parallel, optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            assert_same_state(models[0], models[1])
        Path(folder, f"done-{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("recompute", ["bottleneck", "block"])
def test_two_processes_train_as_eager(tmp_path: Path, recompute: str) -> None:
    mp.spawn(_worker, args=(str(tmp_path), recompute), nprocs=WORLD)
    assert sorted(p.name for p in tmp_path.glob("done-*")) == ["done-0", "done-1"]


def test_data_parallel_on_one_device_is_the_module_itself() -> None:
    model = dense_ext.swap(small_densenet()).eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(torch.nn.DataParallel(model)(x), model(x))
