"""Memory: against depth, growth rate and batch, and what fits a budget."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch

from ...memory import largest
from ...models import DenseNet
from ..errors import UnavailableError, is_out_of_memory
from ..memory import lasting_bytes, saved_bytes, step_peaks
from ..networks import small_densenet
from ..peers import Peer
from ..results import Results
from .base import Case, Row, Suite, SuiteOptions, build_model, failing_into, new_row, release

_SIZE = 32
_LOOKS = 4  # of a search, about
_MOST_IMAGES = 2**16  # a search for the largest batch ends here
_DEEPEST = 60_004  # and one for the deepest network here
_FIRST_BATCH = 2  # with which the one begins; one image may be one value a channel
_FIRST_LAYERS = 20  # a block, with which the other does
GROWTH_RATE = 12  # of the paper's networks


def _small(classes: int, depth: int, growth_rate: int) -> DenseNet:
    model = small_densenet(depth, growth_rate)
    model.classifier = torch.nn.Linear(model.classifier.in_features, classes)
    return model


class _CountedSuite(Suite):
    """A suite that counts the bytes of training steps, and looks for what fits a budget by running it.

    Peers that are recorded as a graph are left out: what is counted is a step that runs.
    """

    timed = False
    cpu_budget: ClassVar[int]  # bytes, unless told otherwise
    gpu_budget = 8 * 10**9

    def __init__(self, options: SuiteOptions, peers: list[Peer], results: Results) -> None:
        super().__init__(options, [peer for peer in peers if not peer.graphed], results)

    def case(self, vary: str, depth: int, growth_rate: int, batch: int, dtype: str) -> Case:
        """One of the papers' networks for small images."""
        labels: dict[str, str | int] = {"vary": vary, "depth": depth, "growth_rate": growth_rate}
        build = partial(_small, depth=depth, growth_rate=growth_rate)
        return Case(build, batch, self.options.size or _SIZE, dtype, labels)

    def count(self, case: Case, peer: Peer) -> Row:
        """A row of what a step keeps, at most holds, and what lasts from step to step."""
        self.tick(f"{peer.name}: {case}")
        row = self.row(case, peer)
        with failing_into(row):
            step, images, labels = self.training_step(case, peer)
            saved = saved_bytes(step.model, lambda: step.loss(images, labels))
            peaks = step_peaks(step, images, labels)
            row["measures"] = {"saved_bytes": saved, **peaks, "lasting_bytes": lasting_bytes(step)}
        return row

    @property
    def budget(self) -> int:
        return self.options.budget or (self.gpu_budget if self.gpu else self.cpu_budget)

    def needed(self, case: Case, peer: Peer) -> float:
        """Bytes that training holds at most: a step's, what lasts, and the images; infinite if too many."""
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


class MemorySuite(_CountedSuite):
    """The largest batch within a budget; bytes saved and at peak against depth, growth rate and batch.

    The first by network of the family, the others of the papers' networks for small images.
    """

    name = "memory"
    cpu_budget = 10**9

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
        found = []
        for name in self.options.models or ("densenet121",):
            build, size, labels = partial(build_model, name), self.pixels(name, 224), {"model": name}
            found += [Case(build, 1, size, dtype, labels) for dtype in self.options.dtypes]
        return found

    def ticks(self) -> int:
        return (len(self.cases()) + _LOOKS * len(self.searches())) * len(self.peers)

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
        labels = {k: v for k, v in case.as_json().items() if k != "batch"}
        row = new_row({**labels, "budget_bytes": self.budget}, peer.name)
        self.rows.append(row)

        def needed(batch: int) -> float:
            return self.needed(replace(case, batch=batch), peer)

        with failing_into(row):
            found = largest(needed, self.budget, _FIRST_BATCH, _MOST_IMAGES)
            if found == _MOST_IMAGES:
                raise UnavailableError(f"{found} images fit, and no more were tried")
            row["measures"] = {"largest_batch": found}


class PaperSuite(_CountedSuite):
    """The comparison of arXiv 1707.06990: DenseNet-BC of growth rate 12 on images of 32x32.

    Memory against depth, and how deep a network fits a budget.
    """

    name = "paper"
    cpu_budget = 10**8

    def cases(self, dtype: str) -> list[Case]:
        batch = self.options.batch or (64 if self.gpu else 4)
        depths = (40, 100, 160, 220, 280, 340, 400) if self.gpu else (22, 40, 64, 88, 112)
        return [self.case("depth", depth, GROWTH_RATE, batch, dtype) for depth in depths]

    def ticks(self) -> int:
        return sum(len(self.cases(dtype)) + _LOOKS for dtype in self.options.dtypes) * len(self.peers)

    def measure(self) -> None:
        for dtype in self.options.dtypes:
            for case in self.cases(dtype):
                release()
                for peer in self.peers:
                    self.count(case, peer)
            for peer in self.peers:
                self.search(case, peer)

    def search(self, case: Case, peer: Peer) -> None:
        """A row of the deepest network whose step fits the budget, by running it.

        Args:
            case: whose batch, size and dtype to take.
            peer: what runs it.
        """
        labels = {k: v for k, v in case.as_json().items() if k not in ("vary", "depth")}
        row = new_row({**labels, "budget_bytes": self.budget}, peer.name)
        self.rows.append(row)

        def needed(layers: int) -> float:
            sized = self.case("budget", 6 * layers + 4, GROWTH_RATE, case.batch, case.dtype)
            return self.needed(sized, peer)

        with failing_into(row):
            most = (_DEEPEST - 4) // 6
            layers = largest(needed, self.budget, _FIRST_LAYERS, most)
            if layers == most:
                raise UnavailableError(f"{_DEEPEST} layers fit, and no more were tried")
            row["measures"] = {"deepest": 6 * layers + 4}
