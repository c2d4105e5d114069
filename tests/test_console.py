"""Where commands print: progress and remarks to stderr; results, or only JSON, to stdout."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dense_ext.cli import console, main
from dense_ext.cli.console import print_table, progress, remark
from dense_ext.models import MODELS

ROOT = Path(__file__).resolve().parent.parent
COLOUR, CURSOR = r"\x1b\[[0-9;]*m", r"\x1b\[[0-9?]*[A-Zhl]|\r"
ERASED = "\x1b[1A\x1b[2K"  # moves up a line and clears it


class Terminal(io.StringIO):
    """Records what is written, as a terminal."""

    def isatty(self) -> bool:
        return True

    def bars(self) -> list[str]:
        """The texts that the bar showed, in order and without the time, such as ``1/3 second``."""
        text = re.sub(CURSOR, "\n", re.sub(COLOUR, "", self.getvalue()))
        shown = (f"{done} {what}".strip() for done, what in re.findall(r"(\d+/\d+) [\d:]+ (.*)", text))
        return list(dict.fromkeys(shown))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal that consoles use as stderr; pytest would reset sys.stderr itself before the test."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()

    def new(stderr: bool = False, **options: Any) -> Console:
        return Console(stderr=stderr, file=terminal if stderr else None, **options)

    monkeypatch.setattr(console, "Console", new)
    return terminal


def test_a_bar_advances_when_the_next_part_begins_and_goes_in_the_end(terminal: Terminal) -> None:
    with progress(3) as tick:
        assert terminal.bars() == ["0/3"]
        tick("first")
        assert terminal.bars() == ["0/3", "0/3 first"]
        tick("second [a-z]")
        tick("third")
    assert terminal.bars() == ["0/3", "0/3 first", "1/3 second [a-z]", "2/3 third"]
    assert terminal.getvalue().endswith(ERASED)


def test_a_bar_goes_when_something_fails(terminal: Terminal) -> None:
    def fail() -> None:
        with progress(2) as tick:
            tick("first")
            raise RuntimeError("too hot")

    with pytest.raises(RuntimeError, match="too hot"):
        fail()
    assert terminal.getvalue().endswith(ERASED)


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(2) as tick:
        tick("first")
        tick("second")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in paths and shapes are not markup, and lines to a pipe are not wrapped."""
    text = "run[a]/:cat:[/b] " + "x" * 150
    remark(text)
    print_table("a [title]", ("what", "is"), [("[a]", text)], left=2)
    printed = capsys.readouterr()
    assert printed.err == text + "\n"
    assert text in printed.out
    assert "[a] " in printed.out
    assert "a [title]" in printed.out


FAST = ["tiny", "--size", "8", "--batch", "2"]
COMMANDS = {
    "info": [],
    "models": ["--size", "32"],
    "bench": ["--model", *FAST, "--rounds", "1", "--no-depth"],
    "plan": [*FAST, "--device", "cpu", "--memory", "1100kB", "--peers"],
    "train": ["--model", *FAST, "--batch", "512", "--epochs", "1"],
    "report": [str(ROOT / "benchmarks" / "results" / "digits.json")],
}  # fmt: skip


@pytest.mark.usefixtures("tiny_model", "one_thread", "known_rates")
@pytest.mark.parametrize("command", COMMANDS)
def test_with_json_nothing_else_goes_to_stdout(
    command: str,
    terminal: Terminal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Commands that take long still show a bar; train has Lightning's, which this terminal does not see."""
    for package in ("torchvision", "timm", "sklearn", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    from dense_ext.benchmark import family
    from dense_ext.memory import TrackedStep

    # To track true steps takes seconds for each peer; test_plan_peers.py does.
    monkeypatch.setattr(TrackedStep, "peak", lambda self, batch: 20_000 * batch)
    monkeypatch.setattr(family, "MODELS", {"tiny": MODELS["tiny"]})
    monkeypatch.setattr(family, "RESNETS", ())
    monkeypatch.chdir(tmp_path)
    assert main([command, *COMMANDS[command], "--json"]) == 0
    printed = capsys.readouterr().out
    assert isinstance(json.loads(printed), dict)
    assert "\x1b" not in printed
    assert bool(terminal.bars()) == (command not in ("info", "train"))


def test_every_command_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    """``tune`` needs a GPU; test_tune.py tests its JSON."""
    for command in (*COMMANDS, "tune"):
        assert main([command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out
