"""benchmarks/gpu.py: what it runs exists and runs; on a CPU, since a GPU is not always there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dense_ext.benchmark import peers
from dense_ext.benchmark.results import read_results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> object:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    import gpu

    return gpu


def test_peers_and_parts_exist(script) -> None:  # type: ignore[no-untyped-def]
    assert {peer.name for peer in peers.choose(script.PEERS, script.POLICIES)} > set(script.PEERS)
    for _, seconds, commands in script.PARTS:
        assert seconds > 0
        arguments = [argument for command in commands for argument in command]
        paths = [a for a in arguments if a.endswith(".py") or a.startswith("tests/")]
        assert paths
        assert all((ROOT / path).exists() for path in paths), paths
    assert sum(seconds for _, seconds, _ in script.PARTS) <= 720


def test_a_suite_fills_a_result(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "primitives.json"
    script.run_suite("primitives", ("densenet_bc_40_12",), 1, path, device="cpu")
    results = read_results(path)
    assert not results["interrupted"]
    assert any(row["seconds"] for row in results["rows"])


def test_a_part_that_takes_too_long_is_ended(script, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    slow = ["-c", "import time; print('begun', flush=True); time.sleep(60)"]
    line = script.run_part("slow", 1, [slow], tmp_path)
    assert "ended after 1 s" in line
    assert "begun" in (tmp_path / "slow.log").read_text()
