"""Every row of the guide's table names an existing test, and every test in this folder has a row."""

from __future__ import annotations

import ast
import re

import pytest

from .common import ROOT

_ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "docs" / "guides" / "deploy.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| tool |")
]


def _tests(path: str) -> set[str]:
    """The names of a file's tests, including those in classes."""
    tree = ast.parse((ROOT / path).read_text())
    names = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {name for name in names if name.startswith("test_")}


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: f"{row[0]}, {row[1]}")
def test_row_names_a_test(row: list[str]) -> None:
    link = re.fullmatch(r"`(tests/\S+\.py)::(test_\w+)`", row[-1])
    assert link, row
    path, name = link.groups()
    assert (ROOT / path).exists(), path
    assert name in _tests(path), name


def test_every_test_stands_in_a_row() -> None:
    named = {row[-1].strip("`") for row in _ROWS}
    for path in sorted((ROOT / "tests" / "integrations").glob("test_*.py")):
        if path.name != "test_guide.py":
            relative = path.relative_to(ROOT).as_posix()
            assert {f"{relative}::{name}" for name in _tests(relative)} <= named
