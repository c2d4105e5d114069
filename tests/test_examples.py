"""Every example runs as its reader runs it, at a small size, and reaches what it is to show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("monai")
pytest.importorskip("segmentation_models_pytorch")

from .helpers import torchrun

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


class Example:
    """Runs a script in this process, as ``python examples/NAME.py`` does in its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: str) -> str:
        path = EXAMPLES / f"{name}.py"
        self.monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == 0
        return self.capsys.readouterr().out


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    return Example(monkeypatch, capsys)


def last(pattern: str, printed: str) -> float:
    """The last number printed behind a text."""
    return float(re.findall(pattern + r" ([\d.]+)", printed)[-1])


def test_finetune(example: Example) -> None:
    printed = example("finetune", "--epochs", "1")
    assert last("test accuracy", printed) > 60


def test_medical_volumes(example: Example) -> None:
    printed = example("medical_volumes", "--steps", "8", "--batch", "4")
    assert len(re.findall(r"dense block +fused", printed)) == 4
    assert last("test accuracy", printed) > 80


def test_fit_in_memory(example: Example) -> None:
    printed = example("fit_in_memory")
    assert last("recompute none:", printed) > 300 > last("recompute bottleneck:", printed)
    assert "chosen, block by block: bottleneck, none, none, none" in printed
    assert last("planned peak:", printed) < 300
    assert last("loss", printed) == pytest.approx(6.9, abs=0.7)  # log 1000: the network is untrained


def test_own_backbone(example: Example) -> None:
    printed = example("own_backbone", "--epochs", "2")
    assert last("test accuracy", printed) > 70


def test_segmentation(example: Example) -> None:
    printed = example("segmentation", "--steps", "24", "--size", "64", "--batch", "4")
    assert len(re.findall(r"dense block +fused", printed)) == 4
    assert len(re.findall(r"transition +fused", printed)) == 3
    assert len(re.findall(r"stem +fused", printed)) == 1
    assert last("intersection over union", printed) > 0.5


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_train_distributed() -> None:
    printed = torchrun(EXAMPLES / "train_distributed.py", "--epochs", "1")
    sums = re.findall(r"the parameters add up to (\S+)", printed)
    assert len(sums) == 2
    assert len(set(sums)) == 1
    assert last("test accuracy", printed) > 50


def test_each_is_listed_and_short() -> None:
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    scripts = list(EXAMPLES.glob("*.py"))
    assert listed == {path.name for path in scripts}
    for path in scripts:
        assert f"test_{path.stem}" in globals()
        assert 20 <= len(path.read_text().splitlines()) <= 60
