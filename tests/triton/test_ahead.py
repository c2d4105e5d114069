"""Every kernel compiles in every shipped configuration for its GPU, fits and spills nothing.

By default each kernel is compiled for each GPU in one of its precisions, and all with ``--exhaustive``. The
committed table has a line for every configuration, so a changed one has to be compiled to renew it.

This needs no GPU. ``benchmarks/triton_resources.py`` writes the same figures as a table; the tests compare
it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dense_ext.backends.triton import ahead
from dense_ext.backends.triton.configs import SHIPPED, read_rows
from dense_ext.backends.triton.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

ROWS = list(read_rows(SHIPPED))
ROW_OF = {(row.kernel, row.architecture, row.precision): row for row in ROWS}
RENEW = "run: python benchmarks/triton_resources.py"
# The kernels that multiply matrices.
PRODUCTS = ("conv1x1", "conv3x3")


@pytest.fixture
def page(benchmark_script: Callable[[str], Any]) -> Any:
    """The script that writes the table."""
    return benchmark_script("triton_resources")


@pytest.mark.each_pair
@pytest.mark.parametrize(
    ("kernel", "architecture", "precision"), [tuple(map(sys.intern, names)) for names in ROW_OF]
)
def test_resources(
    kernel: str, architecture: str, precision: str, page: Any, pytestconfig: pytest.Config
) -> None:
    row = ROW_OF[kernel, architecture, precision]
    committed = page.RESULT.read_text()
    dtypes = ahead.dtypes_of(row.precision)
    first_of_width = {dtype.itemsize: dtype for dtype in reversed(dtypes)}.values()
    for dtype in dtypes if pytestconfig.getoption("--exhaustive") else first_of_width:
        compiled, found = ahead.compile_row(row, dtype)
        if dtype == dtypes[0] and page.TITLE in committed:  # the table is from this version of Triton
            assert page.line(row, found) in committed.splitlines(), RENEW
        assert found.spilled == 0, f"{dtype}: {found.spilled} bytes spilled"
        assert found.shared <= ahead.SHARED[row.architecture][1], f"{dtype}: {found.shared} bytes"
        if any(product in row.kernel for product in PRODUCTS) and row.precision != "ieee":
            assert found.tensor_core_instructions > 0, f"{dtype}: no tensor cores"
        if row.architecture == "sm_90" and row.precision == "16bit" and "conv" in row.kernel:
            assert "wgmma" in compiled.asm["ptx"], f"{dtype}: not Hopper's matrix instruction"
        if not row.architecture.startswith("gfx") and dtype.itemsize == 2:
            # If rows are aligned, no access may move a single 16-bit element.
            assert "2" not in found.accesses, found.accesses
            assert found.accesses.get("16", 0) > 0


def test_the_committed_table_has_the_shipped_configurations(page: Any) -> None:
    lines = [line for line in page.RESULT.read_text().splitlines() if line.startswith(("| sm_", "| gfx"))]
    rows = page.rows()
    assert len(lines) == len(rows), RENEW
    assert all(line.startswith(page.configuration(row)) for line, row in zip(lines, rows, strict=True)), RENEW


@pytest.mark.each_value
@pytest.mark.parametrize("alignment", [2, 4, 8])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_unaligned_tensors_compile_for_the_same_blocks(architecture: str, alignment: int) -> None:
    for row in ROWS:
        if row.architecture == architecture and row.precision == "16bit":
            _, found = ahead.compile_row(row, torch.bfloat16, alignment)
            assert found.shared <= ahead.SHARED[architecture][1]


def test_every_kernel_has_a_row_for_every_chip_and_precision() -> None:
    kernels = {row.kernel for row in ROWS}
    for architecture in ahead.GPUS:
        for kernel in kernels - {"bn_relu_conv1x1_backward_fused"}:
            precisions = {
                row.precision for row in ROWS if (row.kernel, row.architecture) == (kernel, architecture)
            }
            everything = {"16bit", "ieee"} if architecture.startswith("gfx") else {"16bit", "tf32", "ieee"}
            assert precisions in ({"any"}, everything), f"{kernel} on {architecture}: {precisions}"
