"""The numbers of README and docs/benchmarks.md are those of the committed results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def render(benchmark_script: Callable[[str], Any]) -> Any:
    return benchmark_script("render")


@pytest.mark.parametrize(("page", "tables"), [("README.md", 1), ("docs/benchmarks.md", 13)])
def test_tables_say_what_the_results_say(render: Any, page: str, tables: int) -> None:
    assert ROOT / page in render.PAGES
    text = (ROOT / page).read_text()
    assert text.count("<!-- end -->") == tables
    assert render.rendered(text) == text, "run: python benchmarks/render.py"


def test_a_changed_number_shows(render: Any) -> None:
    text = (ROOT / "README.md").read_text()
    changed = text.replace("| 130.4 |", "| 13.04 |", 1)
    assert changed != text
    assert render.rendered(changed) == text


def test_every_figure_belongs_to_a_result(render: Any) -> None:
    figures = [path.stem for path in (ROOT / "benchmarks" / "figures").glob("*.png")]
    of = {name: {f for f in figures if f.startswith(f"{name}-")} for name in render.committed()}
    assert set().union(*of.values()) == set(figures)
    assert all(of.values()), of


def test_figures_show_what_the_results_say(render: Any, tmp_path: Path) -> None:
    """Each committed figure equals the one drawn from its result now, except for antialiasing."""
    for name, path in render.committed().items():
        for drawn in render.draw_all(render.read_results(path), tmp_path, f"{name}-"):
            with Image.open(drawn) as new, Image.open(ROOT / "benchmarks" / "figures" / drawn.name) as old:
                assert new.size == old.size, drawn.name
                difference = ImageChops.difference(new.convert("RGB"), old.convert("RGB"))
            assert max(high for _, high in difference.getextrema()) < 64, (
                f"{drawn.name}: run benchmarks/render.py"
            )


def test_a_gpus_results_are_in_its_folder(
    render: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    (tmp_path / "h100-sxm").mkdir()
    for name, result in (("cpu", "digits"), ("h100-sxm/cpu", "cpu")):
        text = (ROOT / "benchmarks" / "results" / f"{result}.json").read_text()
        (tmp_path / f"{name}.json").write_text(text)
    assert list(render.committed()) == ["cpu", "h100-sxm-cpu"]
    text = render.rendered("<!-- cpu: accuracy -->\n<!-- end --> <!-- h100-sxm-cpu: summary --><!-- end -->")
    assert "test accuracy" in text
    assert "| 130.4 |" in text
