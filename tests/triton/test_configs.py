"""The table of configurations: look-up, the user's own rows, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense_ext.backends.triton import configs
from dense_ext.backends.triton.configs import Config, Row, find_config, read_rows, shape_class, write_rows
from dense_ext.cli import main

KEY = ("bn_relu_conv1x1_forward", "sm_90", "16bit")
pytestmark = pytest.mark.usefixtures("table")
OTHER = Config({"BLOCK_M": 32, "BLOCK_B": 32, "BLOCK_C": 32}, num_warps=4)


def test_a_users_row_precedes_the_shipped_one(table: Path) -> None:
    shape = shape_class(50000, 200, 128)
    assert shape == "65536x256x128"
    shipped = find_config(*KEY, shape)
    write_rows(table, [Row(*KEY, shape, OTHER, "measured: here, today")])
    configs.forget_tables()
    assert find_config(*KEY, shape) == OTHER != shipped
    assert find_config(*KEY, shape_class(1, 1, 1)) == shipped


def test_writing_keeps_other_rows(table: Path) -> None:
    first, second = (Row(*KEY, shape, OTHER, "measured") for shape in ("1x2", "3x4"))
    write_rows(table, [first])
    write_rows(table, [second, first])
    assert list(read_rows(table)) == [first, second]


def test_blocks_are_cut_to_the_problem() -> None:
    config = Config({"BLOCK_M": 128, "BLOCK_C": 64}).fit(BLOCK_C=12)
    assert config.blocks == {"BLOCK_M": 128, "BLOCK_C": 16}
    assert config.fit(BLOCK_C=1000).blocks["BLOCK_C"] == 16


def test_a_file_that_is_not_a_table_is_refused(table: Path) -> None:
    table.parent.mkdir()
    table.write_text('[{"kernel": "x"}]')
    with pytest.raises(ValueError, match=r"triton\.json is not a table of Triton configurations"):
        find_config(*KEY, "1x1")
    table.unlink()
    with pytest.raises(LookupError, match="no configuration for x on sm_90 in 16bit"):
        find_config("x", "sm_90", "16bit")


def test_tune_without_a_gpu_says_why(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    assert main(["tune"]) == 2
    assert "the Triton backend can't run here" in capsys.readouterr().err
    assert not table.exists()
