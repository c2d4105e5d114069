"""Result files: JSON with everything needed to read and to draw them again.

Bytes are bytes, times seconds, rates per second. results.schema.json, beside this file, describes
every key; ``interrupted`` marks a file that holds only what was measured until then.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..machine import commit, machine, versions
from .errors import UnavailableError, UsageError, reason
from .memory import collect

Tick = Callable[[str], None]  # told what comes next
Labels = Mapping[str, str | int]  # of a case

# What every file has. A file with the first is ours; the others were not there in older versions' files.
HEAD = {"kind", "date", "machine", "versions", "commit", "options", "interrupted"}
_MEASURED = {"peers", "rows"}


@dataclass
class Measurement:
    """A row of a result: what was measured of one peer on one case."""

    case: Labels  # network, batch, size and dtype, or primitive and shape, or epoch
    peer: str
    failure: str | None = None  # why there is no measurement
    measures: dict[str, Any] = field(default_factory=dict)  # e.g. bytes or operations; None is not finite
    seconds: list[float] = field(default_factory=list)  # samples, in the order they were taken
    calls_per_sample: int = 1  # of which a sample is the mean
    served_by: list[str] = field(default_factory=list)  # the backends of dense_ext that ran
    values: list[float] = field(default_factory=list)  # losses or norms, compared between peers

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def fail(self, why: str) -> None:
        """Record why there are no times."""
        self.failure = why
        self.seconds.clear()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An exception inside becomes the row's failure; the memory that it held is given back."""
        try:
            yield
        except UnavailableError as error:  # found before memory was taken; looking for some takes long
            self.fail(reason(error))
        except Exception as error:
            self.fail(reason(error))
            collect()

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value or name in _REQUIRED}


_REQUIRED = {"failure", "measures", "seconds"}


@dataclass(frozen=True)
class PeerLabel:
    """What a result says of a peer."""

    label: str  # for tables and figures
    ours: bool  # whether it is dense_ext
    mode: str = "eager"  # how it is run: a key of peers.MODES


@dataclass
class Results:
    """The content of a result file."""

    kind: str  # the suite that measured it, or "models" or "train"
    date: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    options: dict[str, Any]
    interrupted: bool = True  # whether there is less than was to be measured
    peers: dict[str, PeerLabel] = field(default_factory=dict)  # by name
    rows: list[Measurement] = field(default_factory=list)
    work: dict[str, Any] = field(default_factory=dict)  # the machine's rates of copying and of products

    @classmethod
    def from_json(cls, loaded: dict[str, Any]) -> Results:
        peers = {name: PeerLabel(**peer) for name, peer in loaded["peers"].items()}
        rows = [Measurement(**row) for row in loaded["rows"]]
        known = {f.name: loaded[f.name] for f in fields(cls) if f.name in loaded}
        return cls(**known | {"peers": peers, "rows": rows})

    def as_json(self) -> dict[str, Any]:
        found = asdict(self) | {"rows": [row.as_json() for row in self.rows]}
        return {name: value for name, value in found.items() if value or name != "work"}

    def label(self, row: Measurement) -> str:
        return self.peers[row.peer].label

    def ours(self, row: Measurement) -> bool:
        return self.peers[row.peer].ours

    @property
    def dimensions(self) -> int:
        """Of what the networks take: images have two, volumes three."""
        return 3 if self.kind == "volumes" else 2

    @property
    def per(self) -> str:
        """What the networks take, as in "GFLOP an image"."""
        return "a volume" if self.dimensions == 3 else "an image"

    @property
    def on(self) -> str:
        """The GPU, or the CPU and how many threads ran on it."""
        machine, gpu = self.machine, self.options["device"].startswith("cuda")
        return machine["gpu"]["name"] if gpu else f"{machine['cpu']}, threads: {machine['threads']}"

    def sides(self, case: Labels) -> str:
        """An image's or a volume's size in pixels."""
        return "x".join([str(case["size"])] * self.dimensions)

    def network(self, case: Labels) -> str:
        """A network, how many images it takes and their size."""
        return f"{case['model']}, {case['batch']} x {self.sides(case)}"

    def setting(self, case: Labels) -> str:
        """Network, images and machine in a line."""
        what = f"{case['batch']} {self.per.split()[1]}s of {self.sides(case)}"
        return f"{case['model']}, {what}, {case['dtype']}, {self.on}"

    def timed(self) -> list[Measurement]:
        """The rows with samples."""
        return [row for row in self.rows if row.seconds]

    def timed_cases(self) -> list[Labels]:
        """What they are of, each once."""
        return list({str(row.case): row.case for row in self.timed()}.values())

    def measured(self, measure: str) -> list[Measurement]:
        """The rows with a measure of this name."""
        return [row for row in self.rows if measure in row.measures]

    def references(self) -> dict[str, list[str]]:
        """What speeds are set against: by its name, the peers of which the fastest counts.

        "fastest eager" are those that run PyTorch's operators one by one; "fastest other" is there too
        where some were compiled or recorded as a graph. Peers without samples are left out, and so is
        dense_ext.
        """
        names = {row.peer for row in self.timed()}
        others = [name for name, peer in self.peers.items() if name in names and not peer.ours]
        eager = [name for name in others if self.peers[name].mode == "eager"]
        found = {"fastest eager": eager} if eager else {}
        return {**found, "fastest other": others} if len(others) > len(eager) else found

    def fastest(self, case: Labels, peers: list[str]) -> float | None:
        """The shortest median in seconds of a case among ``peers``, None if none has samples."""
        return min((r.median for r in self.timed() if r.case == case and r.peer in peers), default=None)

    def ratios(self, row: Measurement) -> dict[str, float | None]:
        """How many times as fast as each of the :meth:`references` a row is."""
        best = {name: self.fastest(row.case, peers) for name, peers in self.references().items()}
        return {name: least / row.median if least else None for name, least in best.items()}

    def matmul_share(self, row: Measurement) -> float:
        """The rate of a row's operations over that of the machine's matrix products."""
        rate: float = self.work["matmul_flops_per_second"][row.case["dtype"]]
        return float(row.measures["flops"]) / row.median / rate


def by_peer(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """The rows of each peer."""
    found: dict[str, list[Measurement]] = {}
    for row in rows:
        found.setdefault(row.peer, []).append(row)
    return found


def case_text(case: Labels, *without: str) -> str:
    """A case in a line, some of its keys left out."""
    return ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in case.items() if name not in without)


def new_results(kind: str, options: dict[str, Any]) -> Results:
    """A result without measurements; ``interrupted`` until said otherwise."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Results(kind, now, machine(), versions(), commit(), options)


def write_json(path: Path, results: Results | dict[str, Any]) -> None:
    write_atomically(path, lambda p: p.write_text(as_json(results) + "\n"))


def as_json(results: Results | dict[str, Any]) -> str:
    """The text of a result, which any reader of JSON takes: what is not finite is null."""
    found = results.as_json() if isinstance(results, Results) else results
    return json.dumps(_finite(found), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def saving(tick: Tick, results: Results | dict[str, Any], path: Path, every: float) -> Tick:
    """The tick, which also writes the results so far if ``every`` seconds have passed since the last time."""
    saved = time.monotonic()

    def tick_and_save(text: str) -> None:
        nonlocal saved
        tick(text)
        if time.monotonic() - saved >= every:
            write_json(path, results)
            saved = time.monotonic()

    return tick_and_save


def read_results(path: Path) -> Results:
    """The content of a result file.

    Raises:
        UsageError: it is missing, or none of ours.
    """
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no result file: {error}") from error
    if not isinstance(loaded, dict) or not loaded.keys() >= HEAD:
        raise UsageError(f"{path} is no result file of dense-ext")
    if missing := _MEASURED - loaded.keys():
        lacks = f"without {', '.join(sorted(missing))}; an older version's is to be measured anew"
        raise UsageError(f"{path} is a result of {loaded['kind']!r} {lacks}")
    return Results.from_json(loaded)
