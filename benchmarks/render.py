"""Draw every committed result's figures and write the tables of ``PAGES``: ``python benchmarks/render.py``.

``results/NAME.json``, as ``dense-ext bench``, ``models`` and ``train`` write them, gives
``figures/NAME-memory.png`` and so on; figures of ``results/GPU/NAME.json`` are named ``GPU-NAME``. In each
page the text between ``<!-- NAME: TABLE -->`` and ``<!-- end -->`` is replaced by that result's table of that
name; no number in a table is written by hand.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dense_ext.benchmark.figures import draw_all
from dense_ext.benchmark.kinds import KINDS
from dense_ext.benchmark.results import Results, read_results
from dense_ext.benchmark.tables import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# The pages with tables.
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md")


def markdown(table: Table, results: Results) -> str:
    """The table with what was measured below it; dense_ext's rows are bold."""
    ours = {peer.label for peer in results.peers.values() if peer.ours}
    rows = [[f"**{cell}**" if cell in ours else cell for cell in row] for row in table.rows]
    lines = [table.header, ["---" if i < table.left else "---:" for i in range(len(table.header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{table.caption}."


def committed() -> dict[str, Path]:
    """The result files by their names; in a GPU's folder one has the folder's before its own."""
    paths = sorted(RESULTS.rglob("*.json"))
    return {"-".join(path.relative_to(RESULTS).with_suffix("").parts): path for path in paths}


def rendered(text: str) -> str:
    """``text`` with every marked part written anew from its result."""
    results = committed()

    def replace(match: re.Match[str]) -> str:
        name, table = match.group("name", "table")
        result = read_results(results[name])
        found = KINDS[result.kind].tables(result)[table]
        return f"<!-- {name}: {table} -->\n\n{markdown(found, result)}\n\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>[\w-]+): (?P<table>\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, path in committed().items():
        for figure in draw_all(read_results(path), HERE / "figures", f"{name}-"):
            print(figure.relative_to(HERE))
    for page in PAGES:
        page.write_text(rendered(page.read_text()))


if __name__ == "__main__":
    main()
