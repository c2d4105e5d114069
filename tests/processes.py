"""Shared by the tests that train in several processes on the CPU."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@contextmanager
def process_group(rank: int, world: int, folder: str) -> Iterator[None]:
    """Join the process group; at the end, write a file to show that the process got there."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timeout
    )
    try:
        yield
        # A process that leaves while another still joins a group closes the other's connection.
        dist.barrier()
        Path(folder, f"done-{rank}").touch()
    finally:
        dist.destroy_process_group()


def run_in_processes(workers: Sequence[Callable[[int], None]], world: int, folder: Path) -> None:
    """Run functions of the rank one after another in ``world`` processes.

    They are forks of one that has imported what takes seconds to import.
    """
    multiprocessing.set_forkserver_preload(["torchvision", "dense_ext"])
    mp.start_processes(_work, (workers, world, str(folder)), world, start_method="forkserver")
    assert sorted(path.name for path in folder.glob("done-*")) == [f"done-{rank}" for rank in range(world)]


def _work(rank: int, workers: Sequence[Callable[[int], None]], world: int, folder: str) -> None:
    with process_group(rank, world, folder):
        for worker in workers:
            worker(rank)
