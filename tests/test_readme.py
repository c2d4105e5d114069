"""The README's numbers are those of the committed results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_say_what_the_results_say(render: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- end -->") == 6
    assert render.rendered(text) == text, "run: python benchmarks/render.py"


def test_a_changed_number_shows(render: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    changed = text.replace("| 130.4 |", "| 13.04 |", 1)
    assert changed != text
    assert render.rendered(changed) == text


def test_every_figure_belongs_to_a_result() -> None:
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    figures = {path.stem.split("-")[0] for path in (ROOT / "benchmarks" / "figures").glob("*.png")}
    assert figures == results
