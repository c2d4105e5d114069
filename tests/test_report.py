"""The report is self-contained; a browser shows it light and dark, wide and narrow."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from PIL import Image, ImageStat

from dense_ext.benchmark.results import HEAD, Measurement, read_results
from dense_ext.cli import main

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PHONE, DESK = 390, 1200
OLD = json.dumps(dict.fromkeys(HEAD) | {"kind": "models", "models": [], "step_batch": 32}).encode()
BARE = json.dumps(dict.fromkeys(HEAD) | {"kind": "step"}).encode()


def suite_result(kind: str, rows: list[Measurement]) -> dict[str, Any]:
    head = json.loads((RESULTS / "cpu.json").read_text())
    kept = {key: head[key] for key in ("date", "machine", "versions", "commit")}
    return {
        **kept, "kind": kind, "interrupted": True, "rows": [row.as_json() for row in rows], "data": "none",
        "options": {"device": "cpu", "dtypes": ["float32"], "rounds": 3},
        "peers": {"eager": {"label": "eager <b>", "ours": False, "mode": "eager"},
                  "cpu": {"label": "dense_ext, cpu", "ours": True, "mode": "eager"}},
        "work": {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": {"float32": 1e11}},
    }  # fmt: skip


def primitive_rows() -> Iterator[Measurement]:
    for i, peer in enumerate(("eager", "cpu")):
        for j in range(30):
            case = {"primitive": "p", "where": f"block {j}", "shape": "1x1", "dtype": "float32"}
            row = Measurement(case, peer)
            row.measures = {"minimum_bytes": 100, "flops": 100 * (j + 1), "relative_error": 1e-8}
            row.seconds = [1e-3 / (i + 1), 2e-3 / (i + 1), 3e-3 / (i + 1)]
            yield row


def memory_rows() -> Iterator[Measurement]:
    for peer in ("eager", "cpu"):
        for depth in (10, 20, 30):
            case = {
                "vary": "depth",
                "depth": depth,
                "growth_rate": 12,
                "batch": 1,
                "size": 8,
                "dtype": "float32",
            }
            row = Measurement(case, peer)
            row.measures = dict.fromkeys(("saved_bytes", "peak_bytes", "lasting_bytes"), depth * 10**6)
            yield row


def step_rows() -> Iterator[Measurement]:
    for peer, seconds in (("eager", 2.0), ("cpu", 1.0)):
        row = Measurement({"model": "m", "batch": 1, "size": 8, "dtype": "float32"}, peer)
        row.measures, row.seconds = {"flops": 10**9}, [seconds] * 3
        yield row


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for kind, rows in (("primitives", primitive_rows()), ("paper", memory_rows()), ("step", step_rows())):
        (folder / f"{kind}.json").write_text(json.dumps(suite_result(kind, list(rows))))
    out = folder / "page.html"
    committed, suites = (sorted(map(str, where.rglob("*.json"))) for where in (RESULTS, folder))
    assert main(["report", *committed, *suites, "--out", str(out)]) == 0
    return out


class Parsed(HTMLParser):
    """The tags and attributes of a page; checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_nothing_beside_itself(report: Path) -> None:
    parsed = Parsed(report.read_text())
    assert parsed.open == []
    for tag, attributes in parsed.found:
        assert tag not in ("script", "link", "img", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(http" not in report.read_text()


def test_references_within_the_page_are_unique_and_kept(report: Path) -> None:
    text = report.read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    assert len(set(ids)) == len(ids)


def test_page_shows_every_result(report: Path) -> None:
    text = report.read_text()
    committed = [read_results(path) for path in RESULTS.rglob("*.json")]
    figures = (RESULTS.parent / "figures").glob("*.png")
    assert text.count("<section") == len(committed) + 3
    # The figures of the three results made here: a roofline, memory against depth, speed.
    assert text.count("<svg") == len(list(figures)) + 3
    assert "AMD EPYC" in text
    assert "torch 2.11.0" in text
    interrupted = sum(result.interrupted for result in committed)
    assert text.count("Interrupted: this is what was measured until then.") == interrupted + 3
    assert "eager &lt;b&gt;" in text
    assert "<b>" not in text
    assert "<summary>primitives, from empty caches (60 rows)</summary>" in text
    assert "<td>1000 to 3000</td>" in text
    for fixed in ("#333333", "#dddddd", "#ffffff;", "matplotlib.org"):
        assert fixed not in text.partition("</style>")[2]


def test_an_existing_page_is_kept(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", str(RESULTS / "digits.json"), "--out", str(report)]
    assert main(arguments) == 2
    assert "exists; pass --overwrite or another --out" in capsys.readouterr().err


def test_a_page_that_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", str(RESULTS / "digits.json"), "--out", str(tmp_path), "--overwrite"]
    assert main(arguments) == 2
    assert f"--out {tmp_path} is a folder; name the page's file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["poem", ["step"]])
def test_a_result_of_unknown_kind(
    kind: str | list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(suite_result("step", []) | {"kind": kind}))
    assert main(["report", str(path), "--out", str(tmp_path / "page.html")]) == 2
    assert f"other.json is of kind {kind!r}, not one of quick, " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.json", None, "nowhere.json can't be read: No such file or directory"),
        ("folder", None, "folder can't be read: Is a directory"),
        ("cut.json", b'{"kind": "step", "rows": [', "cut.json is no result file: "),
        ("binary.json", bytes(range(256)), "binary.json is no result file: "),
        ("list.json", b"[]", "list.json is no result file of dense-ext"),
        ("plan.json", b'{"kind": "step", "rows": []}', "plan.json is no result file of dense-ext"),
        ("bare.json", BARE, "bare.json is a result of 'step' without peers, rows"),
        ("old.json", OLD, "a result of 'models' without peers, rows; an older version's is to be"),
    ],
)
def test_what_is_no_result(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No page is written for the others either."""
    (tmp_path / "folder").mkdir()
    path, page = tmp_path / name, tmp_path / "page.html"
    if content is not None:
        path.write_bytes(content)
    assert main(["report", str(RESULTS / "digits.json"), str(path), "--out", str(page)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert not page.exists()


def test_a_result_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.json"
    shutil.copy(RESULTS / "digits.json", path)
    for out in (path, tmp_path / ".." / tmp_path.name / path.name):
        assert main(["report", str(path), "--out", str(out), "--overwrite"]) == 2
        assert "is one of the results" in capsys.readouterr().err
    assert path.read_bytes() == (RESULTS / "digits.json").read_bytes()
    assert main(["report", str(path), "--out", str(path / "page.html")]) == 2
    assert "digits.json is not a folder" in capsys.readouterr().err


def test_json_says_what_the_page_was_made_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted, page = tmp_path / "step.json", tmp_path / "new" / "page.html"
    interrupted.write_text(json.dumps(suite_result("step", list(step_rows()))))
    paths = [RESULTS / "digits.json", interrupted]
    assert main(["report", *map(str, paths), "--out", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(page)
    assert page.read_text().count("<section") == len(found["sections"]) == 2
    kinds = [(s["path"], s["kind"], s["interrupted"]) for s in found["sections"]]
    assert kinds == [(str(paths[0]), "train", False), (str(paths[1]), "step", True)]
    assert found["sections"][0]["date"] == json.loads(paths[0].read_text())["date"]


# --- in a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the one at $CHROMIUM, an installed one, or Playwright's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-headless-shell", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as started:
        try:
            chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


def background(png: bytes) -> float:
    """The mean brightness, from 0 to 255, of the page's upper left corner."""
    corner = Image.open(io.BytesIO(png)).convert("L").crop((0, 0, 12, 12))
    return ImageStat.Stat(corner).mean[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_page_in_a_browser(browser: Any, report: Path, scheme: str, width: int) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, is_mobile=width == PHONE
    )
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself scrolls sideways"
    dark = scheme == "dark"
    assert (background(page.screenshot()) < 80) == dark
    figures = page.locator("figure svg")
    for i in range(figures.count()):
        box = figures.nth(i).bounding_box()
        assert box is not None
        assert box["width"] >= 600
        assert box["height"] >= 150
        # Text is light on dark and dark on light.
        ink = figures.nth(i).locator("text").first.evaluate("e => getComputedStyle(e).fill")
        brightness = sum(int(v) for v in re.findall(r"\d+", ink)[:3]) / 3
        assert (brightness > 128) == dark
    size_of = "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
    sizes = page.locator("td, th, dd").evaluate_all(size_of)
    assert min(sizes) >= 13
    assert complaints == []
    context.close()
