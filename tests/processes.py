"""Shared by the tests that train in several processes on the CPU."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

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
        Path(folder, f"done-{rank}").touch()
    finally:
        dist.destroy_process_group()
