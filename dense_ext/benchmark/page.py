"""Results as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..version import __version__
from .errors import UsageError
from .figures import INK, PAPER, RULE, draw_all
from .kinds import KINDS, tables_of
from .results import Results, Tick

# A figure's colours of text and lines become the page's, which follow the reader's preference.
_COLOURS = {INK: "currentColor", RULE: "var(--rule)", PAPER: "var(--paper)"}


def inline_svg(text: str, label: str) -> Markup:
    """An SVG file's content to stand in a page: without header, size and the ids nothing refers to."""
    text = text[text.index("<svg") :]
    for colour, in_page in _COLOURS.items():
        text = text.replace(colour, in_page)
    referred = set(re.findall(r"#([\w-]+)[\")]", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in referred else "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, rest = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{{}}">').format(label) + Markup(rest)


def _figures(results: Results, prefix: str) -> list[Markup]:
    """The result's figures; the prefix keeps the ids of several results apart."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_all(results, Path(folder), prefix, ".svg")
        return [
            inline_svg(path.read_text(encoding="utf-8"), path.stem.removeprefix(prefix).replace("-", ", "))
            for path in drawn
        ]


def page(results: Mapping[Path, Results], tick: Tick = lambda text: None) -> str:
    """The page of these results, in their order.

    Args:
        results: by the file they were read from; its name without suffix is shown.
        tick: told the file before each.

    Raises:
        UsageError: a result is of a kind that no command here writes.
    """
    for path, result in results.items():
        if result.kind not in list(KINDS):  # a list: what a file says may be no text
            raise UsageError(f"{path} is of kind {result.kind!r}, not one of {', '.join(KINDS)}")
    sections = []
    for i, (path, result) in enumerate(results.items()):
        tick(f"drawing {path.name}")
        sections.append({
            "title": KINDS[result.kind].title, "name": path.stem, "result": result,
            "figures": _figures(result, f"r{i}-"), "tables": tables_of(result),
        })  # fmt: skip
    environment = Environment(
        loader=PackageLoader("dense_ext.benchmark", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("report.html.jinja")
    return template.render(sections=sections, version=__version__)
