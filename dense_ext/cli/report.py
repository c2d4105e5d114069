"""``dense-ext report``: result files as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import progress, remark
from .options import check


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of bench, models and train.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
) -> None:
    """One self-contained HTML page of tables and plots; needs no network to be read."""
    from ..benchmark.page import page
    from ..benchmark.results import read_results, write_atomically

    check(not out.is_dir(), f"--out {out} is a folder; name the page's file, as {out / 'report.html'}")
    check(overwrite or not out.exists(), f"{out} exists; pass --overwrite or another --out")
    read = {path: read_results(path) for path in results}
    with progress(len(read)) as tick:
        text = page(read, tick)
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    remark(f"wrote {out}")
