"""Draw the figures of every committed result: ``python benchmarks/render.py``.

``results/NAME.json``, as ``dense-ext bench``, ``models`` and ``train`` write them, gives
``figures/NAME-memory.png`` and so on.
"""

from __future__ import annotations

from pathlib import Path

from dense_ext.benchmark.plots import draw_all
from dense_ext.benchmark.results import read_json

HERE = Path(__file__).parent


def main() -> None:
    for path in sorted((HERE / "results").glob("*.json")):
        for figure in draw_all(read_json(path), HERE / "figures", f"{path.stem}-"):
            print(figure.relative_to(HERE))


if __name__ == "__main__":
    main()
