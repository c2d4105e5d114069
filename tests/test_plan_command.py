"""``dense-ext plan``: its output and exit codes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dense_ext.cli import main
from dense_ext.memory import estimate
from dense_ext.schedule import RECOMPUTE

SMALL = ["plan", "densenet_bc_40_12", "--size", "32", "--batch", "8", "--device", "cpu"]


def planned(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, Any]:
    assert main([*SMALL, *options, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_json_is_what_the_planner_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--memory", "1GiB", "--dtype", "bfloat16", "--optimizer", "adamw")
    assert found["memory_bytes"] == 2**30
    assert found["choice"]["recompute"]["denseblock1"] == "none"
    for policy in RECOMPUTE:
        expected = estimate(
            "densenet_bc_40_12", (8, 3, 32, 32), recompute=policy, optimizer="adamw",
            dtype=torch.bfloat16,
        )  # fmt: skip
        row = found["policies"][policy]
        assert row["peak_bytes"] == expected.peak == sum(row["parts"].values())
        assert row["point"] == expected.point
        assert row["largest_batch"] >= 8


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    for text in ("concat buffers", "kept bottlenecks", "largest batch", "choose: none", "backward, "):
        assert text in out


def test_a_batch_that_does_not_fit_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--memory", "1MB", code=1)["choice"] is None
    assert main([*SMALL, "--memory", "1MB"]) == 1
    printed = capsys.readouterr()
    assert "choose" not in printed.out
    assert "8 images do not fit into" in printed.err


def test_an_absent_gpu_and_the_memory_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--device", "cuda", "--memory", "80GiB")["device"] == "cuda"
    assert planned(capsys)["memory_bytes"] > 2**20


def test_the_size_a_network_is_made_for(capsys: pytest.CaptureFixture[str]) -> None:
    for model, size in (("densenet_bc_40_12", 32), ("densenet121", 224)):
        assert main(["plan", model, "--device", "cpu", "--memory", "1TiB", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["size"] == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "lots"], "--memory: a memory size must be a positive number and a unit"),
        (["--memory", "8XB"], "the unit must be one of B, kB, MB"),
        (["--memory", "0"], "at least one byte"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--size", "2"], "too small for the network"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--optimizer", "lion"], "--optimizer must be one of"),
        (["--device", "abacus"], "--device must be one of cpu, cuda"),
        (["--backend", "abacus"], "backend must be one of"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err


def test_unknown_model_and_backend_of_another_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "resnet50"]) == 2
    assert "MODEL must be one of densenet121" in capsys.readouterr().err
    assert main([*SMALL, "--backend", "cpu", "--device", "cuda", "--memory", "1GiB"]) == 2
    assert "runs on the CPU, not on cuda" in capsys.readouterr().err
