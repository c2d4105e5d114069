"""The command line, ``dense-ext``: one file per command.

Exit codes: 0 done; 1 the measurement failed its check, or the plan does not fit; 2 bad options, missing
data or packages; 130 interrupted, what was measured is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..version import __version__
from . import bench, info, models, plan, report, train, tune

__all__ = ["main"]

# The extra, as in `pip install "dense_ext[bench]"`, that brings a package, by the name it is imported under.
_EXTRA = {
    **dict.fromkeys(("torchvision", "matplotlib", "sklearn", "scipy", "numpy", "jinja2", "PIL"), "bench"),
    "lightning": "train",
}

app = typer.Typer(
    name="dense-ext",
    help="DenseNets in linear memory: what is installed, how it measures up, and training.",
    epilog="Exit codes: 0 done, 1 a measurement failed its check or a plan does not fit, "
    "2 bad options, data or packages, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info.info)
app.command()(bench.bench)
app.command()(models.models)
app.command()(plan.plan)
app.command()(train.train)
app.command()(report.report)
app.command()(tune.tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dense-ext`` with ``arguments`` (the process's own if None); returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return app(args=arguments or ["--help"], prog_name="dense-ext", standalone_mode=False) or 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        return _fail(f"this command needs {package}: pip install 'dense_ext[{_EXTRA[package]}]'", 2)
    except typer.Abort:
        return _fail("interrupted", 130)
    except Exception as error:
        # typer's errors and ours say how to end; anything else is a defect and keeps its traceback.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        format_message = getattr(error, "format_message", error.__str__)
        return _fail(format_message(), code)


def _fail(message: str, code: int) -> int:
    print(f"dense-ext: {message}", file=sys.stderr)
    return code
