"""Memory: against depth, growth rate and batch, and what fits a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from ...memory import largest
from ..errors import UnavailableError, is_out_of_memory
from ..memory import lasting_bytes, step_peaks
from ..networks import small_densenet
from ..peers import Peer
from ..results import Results, case_text
from ..tables import EMPTY, Table, megabytes
from .base import Case, Options, Suite, model_case, release

_SIZE = 32
_LOOKS = 4  # of a search, about
GROWTH_RATE = 12  # of the paper's networks

# What is looked for: in a sentence, and as the heading of its column.
_SEARCHES = {"largest_batch": ("largest batch", "images"), "deepest": ("deepest network", "layers")}


class MemorySuite(Suite):
    """Bytes of training steps against depth, growth rate and batch, and what fits a budget by running it.

    The largest batch is that of networks of the family; bytes are those of the papers' networks for small
    images. Peers that are recorded as a graph are left out: what is counted is a step that runs.
    """

    name = "memory"
    title = "Memory"
    summary = "the largest batch that fits; bytes against depth, growth rate and batch"
    pixels = (224, 224)
    timed = False
    budgets: ClassVar[tuple[int, int]] = (10**9, 8 * 10**9)  # bytes, unless told otherwise: CPU, GPU
    # The measure that is looked for, a key of _SEARCHES, and the label of a case that it is.
    sought, varied = "largest_batch", "batch"
    first, most = 2, 2**16  # where a search begins, and ends; one image may be one value a channel

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        super().__init__(options, [peer for peer in peers if peer.mode != "graph"], results)
        self.budget = options.budget or self.budgets[self.gpu]
        self.images = options.batch or (64 if self.gpu else 4)

    def cases(self, dtype: str) -> list[Case]:
        """What bytes are counted of: one of depth, growth rate and batch varies at a time."""
        depth, batch = 100 if self.gpu else 40, self.images
        depths = (40, 100, 160, 220, 280) if self.gpu else (22, 40, 58, 76)
        return [
            *(self.case("depth", d, GROWTH_RATE, batch, dtype) for d in depths),
            *(self.case("growth_rate", depth, k, batch, dtype) for k in (12, 24, 40)),
            *(self.case("batch", depth, GROWTH_RATE, n * batch, dtype) for n in (1, 2, 4)),
        ]

    def searches(self, dtype: str) -> list[Callable[[int], Case]]:
        """A case of each network by a number, whose largest is looked for."""
        return [partial(model_case, name, size, dtype) for name, size in self.sizes.items()]

    def case(self, vary: str, depth: int, growth_rate: int, batch: int, dtype: str) -> Case:
        """One of the papers' networks for small images."""
        labels: dict[str, str | int] = {"vary": vary, "depth": depth, "growth_rate": growth_rate}
        size = self.options.size or _SIZE
        return Case(partial(small_densenet, depth, growth_rate), batch, size, dtype, labels)

    def ticks(self) -> int:
        looks = (len(self.cases(d)) + _LOOKS * len(self.searches(d)) for d in self.options.dtypes)
        return sum(looks) * len(self.peers)

    def measure(self) -> None:
        for dtype in self.options.dtypes:
            for search in self.searches(dtype):
                for peer in self.peers:
                    self.search(search, peer)
            for case in self.cases(dtype):
                release()
                for peer in self.peers:
                    self.count(case, peer)

    def search(self, case_of: Callable[[int], Case], peer: Peer) -> None:
        """A row of the largest number whose step fits the budget."""
        case = case_of(self.first).as_json()
        fixed = {name: value for name, value in case.items() if name not in ("vary", self.varied)}
        row = self.row({**fixed, "budget_bytes": self.budget}, peer.name)
        with row.failing():
            number = largest(partial(self.needed, case_of, peer), self.budget, self.first, self.most)
            found = int(case_of(number).as_json()[self.varied])
            if number == self.most:
                raise UnavailableError(f"{found} {_SEARCHES[self.sought][1]} fit, and no more were tried")
            row.measures[self.sought] = found

    def needed(self, case_of: Callable[[int], Case], peer: Peer, number: int) -> float:
        """Bytes that training holds at most: a step's, what lasts, and the images; infinite if too many."""
        case = case_of(number)
        self.tick(f"{peer.name}: {case}")
        release()
        try:
            step, images, labels = self.training_step(case, peer)
            peak = step_peaks(step, images, labels)["peak_bytes"]
            return peak + lasting_bytes(step) + images.nbytes
        except Exception as error:
            if is_out_of_memory(error):
                return math.inf
            raise

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        found = {"batches": _fitting(results, "largest_batch"), "deepest": _fitting(results, "deepest")}
        return found | {vary: _against(results, vary) for vary in _varied(results)}


class PaperSuite(MemorySuite):
    """The comparison of arXiv 1707.06990: DenseNet-BC of growth rate 12 on images of 32x32.

    Memory against depth, and how deep a network fits a budget.
    """

    name = "paper"
    title = "Memory against depth, after arXiv 1707.06990"
    summary = "the comparison of arXiv 1707.06990: memory against depth, and the deepest network that fits"
    models = ()
    budgets = (10**8, 8 * 10**9)
    sought, varied = "deepest", "depth"
    first, most = 20, 10_000  # layers in a block

    def cases(self, dtype: str) -> list[Case]:
        depths = (40, 100, 160, 220, 280, 340, 400) if self.gpu else (22, 40, 64, 88, 112)
        return [self.case("depth", depth, GROWTH_RATE, self.images, dtype) for depth in depths]

    def searches(self, dtype: str) -> list[Callable[[int], Case]]:
        return [lambda layers: self.case("budget", 6 * layers + 4, GROWTH_RATE, self.images, dtype)]


def _varied(results: Results) -> list[str]:
    """What the memory was counted against."""
    return list(dict.fromkeys(str(row.case["vary"]) for row in results.measured("peak_bytes")))


def _against(results: Results, vary: str) -> Table:
    """What a step keeps, at most holds, and what lasts, a row per peer and network."""
    rows = [row for row in results.measured("peak_bytes") if row.case["vary"] == vary]
    what = vary.replace("_", " ")
    return Table.of(f"memory of a training step in MB (1e6 bytes) against {what}", rows, {
        "peer": results.label, "network": lambda row: case_text(row.case, "vary", vary),
        what: lambda row: str(row.case[vary]), "kept for backward": megabytes("saved_bytes", ".2f"),
        "peak": megabytes("peak_bytes", ".2f"), "reserved": megabytes("reserved_bytes", ".2f"),
        "lasting": megabytes("lasting_bytes", ".2f"),
    }, left=2)  # fmt: skip


def _fitting(results: Results, measure: str) -> Table:
    """What fits, a row per peer and a column per network."""
    rows = results.measured(measure)
    if not rows:
        return EMPTY
    what, unit = _SEARCHES[measure]
    found = {(results.label(r), case_text(r.case, "budget_bytes")): str(r.measures[measure]) for r in rows}
    caption = f"{unit} that train in {int(rows[0].case['budget_bytes']) / 1e6:g} MB"
    return Table.pivot(f"{what} that fits", found, caption=caption)
