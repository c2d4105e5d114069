"""``dense-ext report``: result files as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, progress, remark
from .options import Json, check, check_new, check_writable


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of bench, models and train.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    json: Json = False,
) -> None:
    """One self-contained HTML page of tables and plots; needs no network to be read.

    --json prints which page it is and what each of its sections was made from.
    """
    from ..benchmark.page import page
    from ..benchmark.results import read_results
    from ..files import write_atomically

    check(not out.is_dir(), f"--out {out} is a folder; name the page's file, as {out / 'report.html'}")
    check_new(out, overwrite)
    check(out.resolve() not in {path.resolve() for path in results}, f"--out {out} is one of the results")
    check_writable(out)
    read = {path: read_results(path) for path in results}
    with progress(len(read)) as tick:
        text = page(read, tick)
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    if json:
        keys = ("kind", "date", "commit", "interrupted")
        sections = [
            {"path": str(path), **{key: getattr(result, key) for key in keys}}
            for path, result in read.items()
        ]
        print_json({"page": str(out), "sections": sections})
    remark(f"wrote {out}")
