"""The documentation's links resolve, its snippets run, and the README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torchvision
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors.index import slugify

import dense_ext

ROOT = Path(__file__).resolve().parent.parent
_GLOBS = ("*.md", "docs/**/*.md", "[a-z]*/README.md", "tests/emulator/README.md")
PAGES = sorted(page for pattern in _GLOBS for page in ROOT.glob(pattern))
# The comment before a snippet that cannot run in a test.
COMPILED_ONLY = re.compile(r"<!-- compiled only: .+ -->")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _tokens(page: Path) -> list[Token]:
    """A page's tokens, including inline ones."""
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    return [inner for token in tokens for inner in (token, *(token.children or []))]


def _links(page: Path) -> Iterator[str]:
    for token in _tokens(page):
        target = token.attrGet({"link_open": "href", "image": "src"}.get(token.type, ""))
        if target is not None and not re.match(r"https?://", str(target)):
            yield str(target)


def _anchors(page: Path) -> set[str]:
    return {slugify(text.content) for token, text in pairwise(_tokens(page)) if token.type == "heading_open"}


def _broken(page: Path) -> list[str]:
    broken = []
    for link in _links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    return broken


def _snippets(page: Path) -> Iterator[tuple[str, bool]]:
    """Each Python snippet, and whether it can run in a test."""
    runs = True
    for token in _tokens(page):
        if token.type == "fence" and token.info == "python":
            yield "\n" * (token.map[0] + 1 if token.map else 0) + token.content, runs
        if token.type in ("fence", "html_block"):
            runs = token.type == "fence" or not COMPILED_ONLY.match(token.content)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_resolve(page: Path) -> None:
    assert not _broken(page)


def test_a_broken_link_shows(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Here\n\n[a](#here) [b](#there) ![c](page.md) [d](other.md) [e](https://example.org)")
    assert _broken(page) == ["#there", "other.md"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES if any(_snippets(page))], ids=_name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's snippets run one after another, as a reader would run them; no weights are downloaded."""
    monkeypatch.setattr(torchvision.models.densenet, "_load_state_dict", lambda **_: None)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for source, runs in _snippets(page):
        code = compile(source, page, "exec")
        if runs:
            exec(code, names)


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    found = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, flags=re.MULTILINE))
    modules = {"functional", "memory"}
    public = {*dense_ext.__all__, *dense_ext.functional.__all__, *dense_ext.memory.__all__}
    public -= modules | {"__version__"}
    assert public <= found


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dense_ext.__version__
