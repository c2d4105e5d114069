"""Memory: against depth, growth rate and batch, and what fits a budget."""

from __future__ import annotations

from functools import partial

import torch
from numpy.polynomial import Polynomial

from ...models import DenseNet
from ..errors import UnavailableError
from ..memory import largest, lasting_bytes, saved_bytes, step_peaks
from ..networks import small_densenet
from ..peers import Peer
from ..results import Results
from .base import Case, Row, Suite, SuiteOptions, failing_into, new_row, release

_SIZE = 32
_MOST_IMAGES = 2**16  # a search for the largest batch ends here
_DEEPEST = 60_004  # and one for the deepest network here
GROWTH_RATE = 12  # of the paper's networks


def _small(classes: int, depth: int, growth_rate: int) -> DenseNet:
    model = small_densenet(depth, growth_rate)
    model.classifier = torch.nn.Linear(model.classifier.in_features, classes)
    return model


class _CountedSuite(Suite):
    """A suite that counts the bytes of training steps of the papers' networks for small images.

    Peers that are recorded as a graph are left out: what is counted is a step that runs.
    """

    timed = False

    def __init__(self, options: SuiteOptions, peers: list[Peer], results: Results) -> None:
        super().__init__(options, [peer for peer in peers if not peer.graphed], results)

    def case(self, vary: str, depth: int, growth_rate: int, batch: int, dtype: str) -> Case:
        labels: dict[str, str | int] = {"vary": vary, "depth": depth, "growth_rate": growth_rate}
        build = partial(_small, depth=depth, growth_rate=growth_rate)
        return Case(build, batch, self.options.size or _SIZE, dtype, labels)

    def count(self, case: Case, peer: Peer) -> Row:
        """A row of what a step keeps, at most holds, and what lasts from step to step."""
        self.tick(f"{peer.name}: {case}")
        row = self.row(case, peer)
        with failing_into(row):
            step, images, labels = self.training_step(case, peer)
            saved = saved_bytes(step.model, lambda: step.loss(images, labels)[0])
            peaks = step_peaks(step, images, labels)
            row["measures"] = {"saved_bytes": saved, **peaks, "lasting_bytes": lasting_bytes(step)}
        return row

    @property
    def budget(self) -> int:
        return self.options.budget or (8 * 10**9 if self.gpu else 10**8)


class MemorySuite(_CountedSuite):
    """Bytes saved and at peak against depth, growth rate and batch; the largest batch within a budget."""

    name = "memory"

    def cases(self) -> list[Case]:
        """One of depth, growth rate and batch varies at a time."""
        depth, growth_rate = (100, 12) if self.gpu else (40, 12)
        batch = self.options.batch or (64 if self.gpu else 4)
        depths = (40, 100, 160, 220, 280) if self.gpu else (22, 40, 58, 76)
        return [
            case
            for dtype in self.options.dtypes
            for case in (
                *(self.case("depth", d, growth_rate, batch, dtype) for d in depths),
                *(self.case("growth_rate", depth, k, batch, dtype) for k in (12, 24, 40)),
                *(self.case("batch", depth, growth_rate, n * batch, dtype) for n in (1, 2, 4)),
            )
        ]

    def searches(self) -> list[Case]:
        """Where the largest batch is looked for."""
        return [self.case("budget", 40, GROWTH_RATE, 1, dtype) for dtype in self.options.dtypes]

    def ticks(self) -> int:
        return (len(self.cases()) + len(self.searches())) * len(self.peers)

    def measure(self) -> None:
        for case in self.searches():
            for peer in self.peers:
                self.search(case, peer)
        for case in self.cases():
            release()
            for peer in self.peers:
                self.count(case, peer)

    def search(self, case: Case, peer: Peer) -> None:
        """A row of the largest batch whose step fits the budget, by running it."""
        self.tick(f"{peer.name}: largest batch in {self.budget / 1e9:g} GB")
        labels = {k: v for k, v in case.as_json().items() if k != "batch"}
        row = new_row({**labels, "budget_bytes": self.budget}, peer.name)
        self.rows.append(row)

        def fits(batch: int) -> bool:
            release()
            try:
                sized = Case(case.build, batch, case.size, case.dtype, case.labels)
                step, images, labels = self.training_step(sized, peer)
                peak = step_peaks(step, images, labels)["peak_bytes"]
                return peak + lasting_bytes(step) + images.nbytes <= self.budget
            except torch.OutOfMemoryError:
                return False

        with failing_into(row):
            found = largest(fits, _MOST_IMAGES)
            if found == _MOST_IMAGES:
                raise UnavailableError(f"{found} images fit, and no more were tried")
            row["measures"] = {"largest_batch": found}


class PaperSuite(_CountedSuite):
    """The comparison of arXiv 1707.06990: DenseNet-BC of growth rate 12 on images of 32x32.

    Memory against depth; and from a parabola through it, how deep a network fits a budget.
    """

    name = "paper"

    def cases(self, dtype: str) -> list[Case]:
        batch = self.options.batch or (64 if self.gpu else 4)
        depths = (40, 100, 160, 220, 280, 340, 400) if self.gpu else (22, 40, 64, 88, 112)
        return [self.case("depth", depth, GROWTH_RATE, batch, dtype) for depth in depths]

    def ticks(self) -> int:
        return sum(len(self.cases(dtype)) for dtype in self.options.dtypes) * len(self.peers)

    def measure(self) -> None:
        for dtype in self.options.dtypes:
            counted: dict[str, list[Row]] = {peer.name: [] for peer in self.peers}
            for case in self.cases(dtype):
                release()
                for peer in self.peers:
                    counted[peer.name].append(self.count(case, peer))
            for rows in counted.values():
                self.rows.append(deepest_row(rows, self.budget))


def deepest_row(rows: list[Row], budget: int) -> Row:
    """The depth at which the parabola through a peer's peaks, and what lasts, meets the budget."""
    case = {k: v for k, v in rows[0]["case"].items() if k != "depth"}
    row = new_row({**case, "vary": "budget", "budget_bytes": budget}, rows[0]["peer"])
    measured = [r for r in rows if r["failure"] is None]
    with failing_into(row):
        if len(measured) < 3:
            raise UnavailableError(f"{len(measured)} depths were measured, a parabola needs 3")
        depths = [r["case"]["depth"] for r in measured]
        needed = [r["measures"]["peak_bytes"] + r["measures"]["lasting_bytes"] for r in measured]
        parabola = Polynomial.fit(depths, needed, 2)
        # Depths are 6n + 4.
        layers = largest(lambda n: bool(parabola(6 * n + 4) <= budget), (_DEEPEST - 4) // 6)
        row["measures"] = {"deepest": 6 * layers + 4}
    return row
