"""What every shipped Triton configuration takes, compiled ahead of time; needs no GPU.

``python benchmarks/triton_resources.py`` writes ``results/triton_resources.md``: registers, spilled
bytes, shared memory and how many blocks fit a multiprocessor, for bfloat16 where 16 bits are stored.
"""

from __future__ import annotations

from pathlib import Path

import triton

from dense_ext.backends.triton.ahead import Resources, compile_row, dtypes_of
from dense_ext.backends.triton.configs import SHIPPED, Row, read_rows

RESULT = Path(__file__).with_name("results") / "triton_resources.md"
HEADER = ("chip", "kernel", "precision", "blocks", "warps", "stages",
          "registers", "spilled", "shared", "blocks at once", "matrix instructions")  # fmt: skip


TITLE = f"# What the Triton kernels take\n\nCompiled ahead of time with Triton {triton.__version__}.\n"


def rows() -> list[Row]:
    """The table's, in its order."""
    return sorted(read_rows(SHIPPED), key=lambda row: (row.architecture, row.kernel, row.precision))


def configuration(row: Row) -> str:
    """How the row's line begins: what is compiled, and how."""
    blocks = " ".join(f"{n.removeprefix('BLOCK_')}={v}" for n, v in row.config.blocks.items())
    cells = (row.architecture, row.kernel, row.precision, blocks, row.config.num_warps, row.config.num_stages)
    return "".join(f"| {cell} " for cell in cells)


def line(row: Row, found: Resources) -> str:
    """The row's line: its configuration, and what the kernel takes."""
    cells = (found.registers, found.spilled, found.shared,
             "" if found.occupancy is None else found.occupancy,
             found.tensor_core_instructions)  # fmt: skip
    return configuration(row) + "| " + " | ".join(map(str, cells)) + " |"


def table() -> str:
    """The page."""
    head = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * 4 + " ---: |" * (len(HEADER) - 4)]
    lines = [line(row, compile_row(row, dtypes_of(row.precision)[0])[1]) for row in rows()]
    return "\n".join([TITLE, *head, *lines]) + "\n"


if __name__ == "__main__":
    RESULT.write_text(table())
    print(f"wrote {RESULT}")
