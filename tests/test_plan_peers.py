"""``dense-ext plan --peers``: the tracked memory of other networks, and their largest batch."""

from __future__ import annotations

import itertools
import json
import re

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from dense_ext.benchmark import memory, peers
from dense_ext.benchmark.errors import UnavailableError
from dense_ext.cli import main
from dense_ext.memory import TrackedStep
from dense_ext.models import MODELS

pytestmark = pytest.mark.usefixtures("tiny_model", "one_thread")

NAMES = {"eager", "memory-efficient", "timm", "checkpoint", "timm-memory-efficient"}
TINY = ["plan", "tiny", "--size", "8", "--batch", "4", "--device", "cpu", "--peers"]


def test_peers(capsys: pytest.CaptureFixture[str], shown: list[int | str]) -> None:
    """The largest batch equals the one found by trying every batch."""
    budget = 900_000
    assert main([*TINY, "--memory", str(budget), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["interrupted"]
    assert set(found["peers"]) >= NAMES
    total, *texts = shown
    assert total >= len(texts) > 3 * len(NAMES)
    for name, make in memory.tracked_networks(MODELS["tiny"]()).items():
        row, step = found["peers"][name], TrackedStep(make(), (3, 8, 8))
        assert row["failure"] is None
        assert row["peak_bytes"] == step.peak(4)
        largest = 4
        while step.peak(largest + 1) <= budget:
            largest += 1
        assert row["largest_batch"] == largest > 4
        assert f"{name}, 4 images" in texts
    largest = {name: row["largest_batch"] for name, row in (found["peers"] | found["policies"]).items()}
    assert largest["eager"] < largest["memory-efficient"] < largest["bottleneck"]


def test_a_peer_that_fails_is_a_row_that_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_timm(model: object, memory_efficient: bool = False) -> None:
        raise UnavailableError("timm is not installed")

    monkeypatch.setattr(peers, "timm_twin", no_timm)
    # The test above tracks true steps, which takes seconds for each peer.
    monkeypatch.setattr(TrackedStep, "peak", lambda self, batch: 20_000 * batch)
    assert main([*TINY, "--memory", "1100kB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["peers"]
    none = {"peak_bytes": None, "largest_batch": None, "failure": "timm is not installed"}
    assert found["timm"] == found["timm-memory-efficient"] == none
    assert found["eager"]["largest_batch"] > 0
    assert main([*TINY, "--memory", "1100kB"]) == 0
    out = capsys.readouterr().out
    assert "timm: timm is not installed" in out
    assert re.search(rf"eager .* yes .* {found['eager']['largest_batch']} ", out)


def test_ctrl_c_keeps_the_plan_and_the_peers_that_are_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak, looks = TrackedStep.peak, itertools.count()

    def interrupted(self: TrackedStep, batch: int) -> int:
        if next(looks) == 1:
            raise KeyboardInterrupt
        return peak(self, batch)

    monkeypatch.setattr(TrackedStep, "peak", interrupted)
    assert main([*TINY, "--memory", "1100kB", "--json"]) == 130
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["interrupted"]
    assert found["choice"] is not None
    (row,) = found["peers"].values()
    assert row["peak_bytes"] > 0
    assert row["largest_batch"] is None
    assert "interrupted" in printed.err
