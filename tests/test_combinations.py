"""The marks ``each_value`` and ``each_pair`` leave out combinations of parameters, but no value or pair."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from .conftest import covering

SIZES = {"a": 4, "b": 3, "c": 2}
ROWS = [dict(zip(SIZES, row, strict=True)) for row in itertools.product(*map(range, SIZES.values()))]


@pytest.mark.parametrize(("size", "most"), [(1, 4), (2, 12), (3, 24)])
def test_covering(size: int, most: int) -> None:
    chosen = [ROWS[i] for i in covering(ROWS, size)]
    assert len(chosen) == most
    for names in itertools.combinations(SIZES, size):
        found = {tuple(row[name] for name in names) for row in chosen}
        assert found == set(itertools.product(*(range(SIZES[name]) for name in names)))


def test_values_are_taken_in_turn() -> None:
    chosen = [ROWS[i] for i in covering(ROWS, 1)]
    assert [sum(row["c"] == value for row in chosen) for value in range(2)] == [2, 2]


@pytest.mark.each_pair
@pytest.mark.parametrize("unhashable", [[1], [2], [3]])
@pytest.mark.parametrize("other", [(), (0,), (1,)])
def test_in_pairs(request: pytest.FixtureRequest, recompute: str, unhashable: Any, other: Any) -> None:
    run = [item for item in request.session.items if item.name.startswith("test_in_pairs[")]
    assert len(run) <= (27 if request.config.getoption("--exhaustive") else 9)
