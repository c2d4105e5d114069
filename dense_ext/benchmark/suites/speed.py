"""Speed of training steps and of inference over the family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch

from ...swap import report
from ..bench import LOSS_TOLERANCE
from ..flops import flops_per_image
from ..graphs import GraphedStep
from ..machine import copy_bandwidth, matmul_rate
from ..memory import lasting_bytes, peaks, saved_bytes, step_peaks
from ..networks import plain
from ..peers import Peer, for_inference
from ..results import Results
from ..step import DTYPES, InferenceStep
from ..timing import calls_per_sample, interleave
from .base import Case, Row, Suite, SuiteOptions, build_model, failing_into, release

FAMILY = ("densenet121", "densenet169", "densenet201", "densenet161", "densenet264",
          "densenet_bc_100_12", "densenet_bc_250_24", "densenet_bc_190_40")  # fmt: skip
# How the failure of a row with wrong values begins, and that of one whose values nobody can judge.
DISAGREES = "disagrees"
UNJUDGED = "nothing to compare with: no peer but dense_ext ran"
# What such rows say of the run.
WRONG = {
    DISAGREES: "dense_ext's results are not the eager network's",
    UNJUDGED: "dense_ext's results were compared with nothing, as no other peer ran",
}

Call = Callable[[], Any]


class _TimedSuite(Suite):
    """Times a call of each peer, case by case.

    On a CPU the rounds of all peers are interleaved, so that a slow minute falls on every one. On a
    GPU a peer is timed alone: the memory its graphs hold must not be taken from the next.
    """

    training: ClassVar[bool]
    tolerance: ClassVar[float] = 1  # of what losses of networks for images may differ by

    def batches(self) -> tuple[int, ...]:
        """Images a call, where no option says so: few on a CPU, where all peers of a case are in memory."""
        return (64,) if self.gpu else (4,)

    def cases(self) -> list[Case]:
        found = []
        for name in self.options.models or FAMILY:
            size = self.pixels(name)
            batches = (self.options.batch,) if self.options.batch else self.batches()
            found += [
                Case(partial(build_model, name), batch, size, dtype, {"model": name})
                for batch in batches
                for dtype in self.options.dtypes
            ]
        return found

    def ticks(self) -> int:
        return 1 + len(self.cases()) * len(self.peers) * (1 + self.options.rounds)

    def measure(self) -> None:
        self.tick("the machine's rates")
        self.results["work"] = {
            "copy_bytes_per_second": copy_bandwidth(self.device),
            "matmul_flops_per_second": {
                dtype: matmul_rate(self.device, DTYPES[dtype]) for dtype in self.options.dtypes
            },
        }
        for case in self.cases():
            flops = self.flops(case)
            rows: list[Row] = []
            for group in [[p] for p in self.peers] if self.gpu else [self.peers]:
                release()
                self.time(case, group, flops * case.batch, rows)

    def flops(self, case: Case) -> int:
        """The call's operations for an image."""
        return flops_per_image(lambda: plain(case.build(10)), (3, case.size, case.size), self.training)

    def time(self, case: Case, peers: list[Peer], flops: int, rows: list[Row]) -> None:
        """Time some of a case's peers together; adds to ``rows``, its rows so far."""
        calls: dict[str, tuple[Call, Row]] = {}
        count = 0
        for peer in peers:
            self.tick(f"{peer.name}: {case}")
            row = self.row(case, peer)
            rows.append(row)
            with failing_into(row):
                call = self.prepare(case, peer, row)
                # More than a graph's eager calls, and what torch.compile takes to be done.
                row["values"] = [self.value(call) for _ in range(5)][:2]
                row["measures"]["flops"] = flops
                count = count or calls_per_sample(call, self.device)
                calls[peer.name] = call, row
        mark_disagreement(rows, self.results["peers"], self.tolerance * LOSS_TOLERANCE[case.dtype])
        timed = {name: call for name, (call, row) in calls.items() if row["failure"] is None}
        entries = {name: calls[name][1] for name in timed}
        for row in entries.values():
            row["calls_per_sample"] = count
        samples = {name: row["seconds"] for name, row in entries.items()}
        if timed:
            interleave(timed, samples, entries, self.device, self.options.rounds, count, self.tick)

    @abstractmethod
    def prepare(self, case: Case, peer: Peer, row: Row) -> Call:
        """What to time; measures its memory on the way."""

    @abstractmethod
    def value(self, call: Call) -> float:
        """A number the call computed, to compare between peers."""

    def note_backends(self, peer: Peer, network: torch.nn.Module, row: Row) -> None:
        if peer.ours:
            row["served_by"] = list(dict.fromkeys(part.detail for part in report(network).rows))


def mark_disagreement(rows: list[Row], peers: dict[str, Any], tolerance: float) -> None:
    """Fail rows of dense_ext, which then have no samples, for their values.

    Those "disagree" whose values are not those of the first other peer that has some, even if it failed
    later. If none has, and none is still to come, nobody knows whether the values are right.

    Args:
        rows: a case's so far.
        peers: the results', by name.
        tolerance: share that values may differ by.
    """
    others = [name for name, peer in peers.items() if not peer["ours"]]
    reference = next((row for row in rows if row["peer"] in others and "values" in row), None)
    if reference is None and not {row["peer"] for row in rows}.issuperset(others):
        return
    for row in rows:
        if row["failure"] is None and row["peer"] not in others:
            row["failure"] = UNJUDGED if reference is None else _difference(row, reference, tolerance)
            if row["failure"] is not None:
                row["seconds"].clear()


def _difference(row: Row, reference: Row, tolerance: float) -> str | None:
    """Where the values disagree, if they do."""
    for got, expected in zip(row["values"], reference["values"], strict=True):
        if not abs(got - expected) <= tolerance * abs(expected):  # NaN is not
            return f"{DISAGREES}: {got:.6g}, {reference['peer']} has {expected:.6g}"
    return None


class StepSuite(_TimedSuite):
    """Training steps: forward, cross entropy, backward and SGD with momentum."""

    name = "step"
    training = True

    def prepare(self, case: Case, peer: Peer, row: Row) -> Call:
        step, images, labels = self.training_step(case, peer)
        if not peer.graphed:  # what a graph holds is its own, not what a step that runs allocates
            saved = saved_bytes(step.model, lambda: step.loss(images, labels))
            row["measures"] |= {"saved_bytes": saved, **step_peaks(step, images, labels)}
            row["measures"]["lasting_bytes"] = lasting_bytes(step)
            # Measuring took steps, which changed the weights.
            step, images, labels = self.training_step(case, peer)
        self.note_backends(peer, step.model, row)
        call = GraphedStep(step, self.device) if peer.graphed else step
        return partial(call, images, labels)

    def value(self, call: Call) -> float:
        return float(call())


class InferenceSuite(_TimedSuite):
    """Forward passes in evaluation mode without gradients, of one image and of a batch.

    Of peers that differ only in what they keep for backward, one runs.
    """

    name = "inference"
    training = False

    def __init__(self, options: SuiteOptions, peers: list[Peer], results: Results) -> None:
        super().__init__(options, for_inference(peers), results)

    def batches(self) -> tuple[int, ...]:
        return (1, *super().batches())

    def prepare(self, case: Case, peer: Peer, row: Row) -> Call:
        images, labels, classes = self.batch(case, peer)
        network = self.network(case, peer, classes, training=False)
        self.note_backends(peer, network, row)
        step = InferenceStep(network, DTYPES[case.dtype], self.device)
        step(images, labels)
        if not peer.graphed:
            row["measures"] |= peaks(lambda: step(images, labels), self.device)
        call = GraphedStep(step, self.device) if peer.graphed else step
        return partial(call, images, labels)

    def value(self, call: Call) -> float:
        return float(call().double().norm())
