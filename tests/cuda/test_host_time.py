"""Kernels that are launched without running, and the program that times the host with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..emulator import Emulator
from ..primitives import test_channel_stats as channel_stats
from ..primitives.harness import Maker
from ..sanitizers import CPU


def test_a_launch_without_running_writes_nothing(gpu: Emulator) -> None:
    gpu.reset(execute=False)
    case = channel_stats.stats_case(Maker(torch.float32, CPU), (2, 5, 5, 8))
    before = {name: case.arguments[name].clone() for name in case.lengths}
    getattr(gpu.backend, case.primitive)(**case.arguments)
    assert gpu.counters.launches > gpu.counters.blocks == 0
    for name, tensor in before.items():
        torch.testing.assert_close(case.arguments[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_program(
    gpu: Emulator, benchmark_script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark_script("host_time").main(["--model", "densenet_bc_40_12", "--rounds", "1"])
    assert gpu.counters.blocks == 0
    _, *rows, _, _ = capsys.readouterr().out.splitlines()
    launches = [int(re.split(" +", row)[1]) for row in rows]
    assert launches[0] < launches[1] < launches[2], "each policy recomputes more than the one before"
