"""Speed of training steps and of inference over the family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from ...packing import pack_weights
from ...swap import report
from ..cuda_graph import GraphedStep
from ..errors import UsageError
from ..flops import flops_per_image
from ..memory import peaks, step_bytes
from ..networks import plain
from ..peers import MODES, OTHERS, Peer, for_inference
from ..results import Measurement, PeerLabel, Results
from ..step import DTYPES, InferenceStep
from ..tables import EMPTY, Draw, Table, machine_name, megabytes, ratio_cells, ratio_columns, spread
from ..timing import calls_per_sample, interleave
from .base import Case, Options, Suite, failing, model_case, release

FAMILY = ("densenet121", "densenet169", "densenet201", "densenet161", "densenet264",
          "densenet_bc_100_12", "densenet_bc_250_24", "densenet_bc_190_40")  # fmt: skip
# Losses of the first two steps may differ from the first peer's by this share. float32 accumulates
# rounding over hundreds of convolutions, then one update; the others round every activation to 8 or 11 bits.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
# How the failure of a row with wrong values begins, and that of one whose values nobody can judge.
DISAGREES = "disagrees"
UNJUDGED = "nothing to compare with: no peer but dense_ext ran"
# What such rows say of the run.
WRONG = {
    DISAGREES: "dense_ext's results are not the eager network's",
    UNJUDGED: "dense_ext's results were compared with nothing, as no other peer ran",
}

Call = Callable[[], Any]


class TimedSuite(Suite):
    """Times a call of each peer, case by case.

    On a CPU the rounds of all peers are interleaved, so that a slow minute falls on every one. On a
    GPU a peer is timed alone: the memory its graphs hold must not be taken from the next.
    """

    models: ClassVar[tuple[str, ...]] = FAMILY
    training: ClassVar[bool]
    tolerance: ClassVar[float] = 1  # of what losses of networks for images may differ by
    per: ClassVar[str] = "an image"

    def batches(self) -> tuple[int, ...]:
        """Images a call, where no option says so: few on a CPU, where all peers of a case are in memory."""
        return (64,) if self.gpu else (4,)

    def cases(self) -> list[Case]:
        batches = (self.options.batch,) if self.options.batch else self.batches()
        return [
            model_case(name, self.pixels(name), dtype, batch)
            for name in self.options.models or self.models
            for batch in batches
            for dtype in self.options.dtypes
        ]

    def ticks(self) -> int:
        return 2 + len(self.cases()) * len(self.peers) * (1 + self.options.rounds)

    def measure(self) -> None:
        self.measure_rates()
        for case in self.cases():
            flops = self.flops(case)
            rows: list[Measurement] = []
            for group in [[p] for p in self.peers] if self.gpu else [self.peers]:
                release()
                self.time(case, group, flops * case.batch, rows)
        self.measure_rates()

    def flops(self, case: Case) -> int:
        """The call's operations for an image."""
        return flops_per_image(lambda: plain(case.build(10)), (3, case.size, case.size), self.training)

    def time(self, case: Case, peers: list[Peer], flops: int, rows: list[Measurement]) -> None:
        """Time some of a case's peers together; adds to ``rows``, its rows so far."""
        calls: dict[str, Call] = {}
        count = 0
        for peer in peers:
            self.tick(f"{peer.name}: {case}")
            row = self.row(case.as_json(), peer.name)
            rows.append(row)
            with failing(row):
                call = self.prepare(case, peer, row)
                # The others' are more than a graph's eager calls, and what torch.compile takes to be done.
                plain_calls = peer.mode == "eager" and not self.gpu
                values = [self.value(call) for _ in range(2 if plain_calls else 5)]
                # The last call is the first that replays what a graph recorded in the one before.
                row.values = [*values[:2], *(values[-1:] if self.gpu else [])]
                row.measures["flops"] = flops
                count = count or calls_per_sample(call, self.device)
                calls[peer.name] = call
        mark_disagreement(rows, self.results.peers, self.tolerance * LOSS_TOLERANCE[case.dtype])
        timed = [(row, calls[row.peer]) for row in rows if row.peer in calls and row.failure is None]
        for row, _ in timed:
            row.calls_per_sample = count
        # An engine's threads still wait for work, on all cores, when the next peer's call begins.
        settles = any(peer.engine for peer in peers)
        interleave(timed, self.device, self.options.rounds, self.tick, settles)

    @abstractmethod
    def prepare(self, case: Case, peer: Peer, row: Measurement) -> Call:
        """What to time; measures its memory on the way."""

    @abstractmethod
    def value(self, call: Call) -> float:
        """A number the call computed, to compare between peers."""

    def note_backends(self, peer: Peer, network: torch.nn.Module, row: Measurement) -> None:
        if peer.ours:
            row.served_by = list(dict.fromkeys(part.detail for part in report(network).rows))

    @classmethod
    def setting(cls, results: Results, row: Measurement) -> str:
        """Images and machine of a row in a line."""
        case, images = row.case, f"{row.case['batch']} {cls.per.split()[1]}s of {cls.sides(row)}"
        return f"{images}, {case['dtype']}, {machine_name(results)}"

    @classmethod
    def sides(cls, row: Measurement) -> str:
        """An image's or a volume's size in pixels."""
        return "x".join([str(row.case["size"])] * cls.dimensions)

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        """Each row with samples; where there is one case, it stands below the table."""
        rows = results.timed()
        header = ["network", "", "median s", "min to max", "images/s", *ratio_columns(results),
                  "of matmul rate", "kept, MB", "peak, MB"]  # fmt: skip
        cells = [
            [
                f"{row.case['model']}, {row.case['batch']} x {cls.sides(row)}, {row.case['dtype']}",
                results.label(row), *spread(row), f"{int(row.case['batch']) / row.median:.1f}",
                *ratio_cells(results, row), f"{results.matmul_share(row):.0%}",
                megabytes(row, "saved_bytes"), megabytes(row, "peak_bytes"),
            ]
            for row in rows
        ]  # fmt: skip
        one_case = len({str(row.case) for row in rows}) == 1
        caption = cls._bound(results, rows[0]) if one_case else ""
        if one_case:
            header, cells = header[1:], [row[1:] for row in cells]
        table = Table(f"speed: {cls.title.lower()}", header, cells, 1 if one_case else 2, caption)
        return {"speed": table.without_empty_columns()}

    @classmethod
    def _bound(cls, results: Results, row: Measurement) -> str:
        """What was measured, and what bounds it where it comes near that bound."""
        work, flops = results.work, row.measures["flops"] / int(row.case["batch"])
        what = "step" if cls.training else "call"
        near = max(results.matmul_share(other) for other in results.timed()) > 0.5
        begin = f"What bounds the {what} is arithmetic:" if near else f"A {what} takes"
        multiplies = work["matmul_flops_per_second"][row.case["dtype"]] / 1e9
        return (
            f"{row.case['model']}, {cls.setting(results, row)}; PyTorch {results.versions['torch']}; "
            f"{results.options['rounds']} rounds. {begin} {flops / 1e9:.2f} GFLOP {cls.per}, on a machine "
            f"that multiplies matrices at {multiplies:.0f} GFLOP/s and copies at "
            f"{work['copy_bytes_per_second'] / 1e9:.0f} GB/s"
        )

    @classmethod
    def figures(cls, results: Results) -> dict[str, Draw]:
        from ..figures import speed_dots

        draw = partial(speed_dots, title=cls.title, dimensions=cls.dimensions)
        return {"throughput": draw} if results.references() else {}


class OwnNetworks(TimedSuite):
    """A suite of networks that are not of the family.

    Of the peers, those that run the network itself: eager in both memory formats and dense_ext, in
    :attr:`modes`.

    Raises:
        UsageError: none of the other peers is served, or the images are too small.
    """

    models = ()
    modes: ClassVar[tuple[str, ...]] = tuple(MODES)

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        served = [p for p in peers if p.mode in self.modes and (p.ours or p.source == "eager")]
        if all(peer.ours for peer in served):
            known = [p.name for p in OTHERS.values() if p.mode in self.modes and p.source == "eager"]
            raise UsageError(f"of the peers, --suite {self.name} has {', '.join(known)}; got none of them")
        super().__init__(options, served, results)
        self.operations = {case.labels["model"]: self._flops(case) for case in self.cases()}

    def _flops(self, case: Case) -> int:
        shape = (case.channels, *[case.size] * self.dimensions)
        try:
            return flops_per_image(lambda: case.build(self.classes(case)), shape, self.training)
        except (RuntimeError, ValueError) as error:
            what = f"{self.per.split()[1]}s of side {case.size}"
            raise UsageError(f"{what} are too small for {case.labels['model']}: {error}") from error

    def flops(self, case: Case) -> int:
        return self.operations[case.labels["model"]]

    def classes(self, case: Case) -> int:
        return 10

    def twin(self, model: Any, peer: Peer) -> torch.nn.Module:
        network: torch.nn.Module = model.to(self.device)
        return network


def bytes_and_times(
    suite: type[TimedSuite],
    results: Results,
    decimals: int,
    setting: Callable[[Measurement], str],
    **of: str,
) -> Table:
    """A step's bytes and time by peer, on the first case that has both; ``of`` are labels of the case."""
    rows = [row for row in results.timed() if "saved_bytes" in row.measures]
    rows = [row for row in rows if of.items() <= row.case.items()]
    rows = [row for row in rows if row.case == rows[0].case]
    if not rows:
        return EMPTY
    cells = [
        [
            results.label(row),
            *(megabytes(row, name, share=int(row.case["batch"])) for name in ("saved_bytes", "peak_bytes")),
            *spread(row, lambda value: f"{value:.{decimals}f}"),
            *ratio_cells(results, row),
        ]
        for row in rows
    ]
    header = (f"MB {suite.per}", "kept for backward", "peak of a step", "median s", "min to max",
              *ratio_columns(results))  # fmt: skip
    caption = f"{setting(rows[0])}; {results.options['rounds']} rounds"
    return Table(f"memory and speed: {suite.title.lower()}", header, cells, caption=caption)


def _by_network(results: Results, column: Callable[[Measurement], str]) -> Table:
    """How many times as fast as the fastest other network dense_ext is, a row a network and dtype.

    How far that network's samples spread says how far the ratios are to be trusted.
    """
    if not results.references():
        return EMPTY
    found: dict[str, dict[str, str]] = {}
    apart: dict[str, float] = {}
    reference, among = list(results.references().items())[-1]
    several = len(results.options["dtypes"]) > 1
    for row in results.timed():
        case, least = row.case, results.fastest(row.case, among)
        network = f"{case['model']}, {case['size']}x{case['size']}" + f", {case['dtype']}" * several
        if results.ours(row) and least:
            found.setdefault(network, {})[column(row)] = f"{least / row.median:.2f}"
        elif row.median == least:
            apart[network] = max(apart.get(network, 0), max(row.seconds) / min(row.seconds))
    columns = list(dict.fromkeys(name for speeds in found.values() for name in speeds))
    rows = [
        (network, *(speeds.get(name, "-") for name in columns), f"{apart[network]:.2f}")
        for network, speeds in found.items()
    ]
    header = (f"{reference} = 1", *columns, "its slowest / fastest sample")
    batches = " and ".join(dict.fromkeys(str(row.case["batch"]) for row in results.rows))
    caption = (
        f"images a call: {batches}; {', '.join(results.options['dtypes'])}, {machine_name(results)}, "
        f"{results.options['rounds']} rounds"
    )
    return Table("speed by network", header, rows, caption=caption)


def mark_disagreement(rows: list[Measurement], peers: Mapping[str, PeerLabel], tolerance: float) -> None:
    """Fail rows of dense_ext, which then have no samples, for their values.

    Those "disagree" whose values are not those of the first other peer that has some, even if it failed
    later. If none has, and none is still to come, nobody knows whether the values are right.

    Args:
        rows: a case's so far.
        peers: the results', by name.
        tolerance: share that values may differ by.
    """
    others = [name for name, peer in peers.items() if not peer.ours]
    reference = next((row for row in rows if row.peer in others and row.values), None)
    if reference is None and not {row.peer for row in rows}.issuperset(others):
        return
    for row in rows:
        if row.failure is None and row.peer not in others:
            wrong = UNJUDGED if reference is None else _difference(row, reference, tolerance)
            if wrong is not None:
                row.fail(wrong)


def _difference(row: Measurement, reference: Measurement, tolerance: float) -> str | None:
    """Where the values disagree, if they do."""
    for got, expected in zip(row.values, reference.values, strict=True):
        if not abs(got - expected) <= tolerance * abs(expected):  # NaN is not
            return f"{DISAGREES}: {got:.6g}, {reference.peer} has {expected:.6g}"
    return None


class StepSuite(TimedSuite):
    """Training steps: forward, cross entropy, backward and SGD with momentum."""

    name = "step"
    title = "Training steps"
    summary = "training steps over the family"
    training = True

    def prepare(self, case: Case, peer: Peer, row: Measurement) -> Call:
        step, images, labels = self.training_step(case, peer)
        if not peer.graphed:  # what a graph holds is its own, not what a step that runs allocates
            row.measures |= step_bytes(step, images, labels)
            # Measuring took steps, which changed the weights.
            step, images, labels = self.training_step(case, peer)
        self.note_backends(peer, step.model, row)
        call = GraphedStep(step, self.device) if peer.graphed else step
        return partial(call, images, labels)

    def value(self, call: Call) -> float:
        return float(call())

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        return {"steps": _by_network(results, lambda row: row.peer.replace("dense_ext-", "recompute "))}


class InferenceSuite(TimedSuite):
    """Forward passes in evaluation mode without gradients, of one image and of a batch.

    Of peers that differ only in what they keep for backward, one runs. dense_ext runs with packed weights.
    """

    name = "inference"
    title = "Inference"
    summary = "forward passes over the family"
    training = False
    batch_statistics: ClassVar[bool] = False  # whether networks are in training mode

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        super().__init__(options, for_inference(peers), results)

    def batches(self) -> tuple[int, ...]:
        return (1, *super().batches())

    def prepare(self, case: Case, peer: Peer, row: Measurement) -> Call:
        images, labels = self.batch(case, peer)
        network = self.network(case, peer, self.batch_statistics)
        if peer.ours:
            pack_weights(network)
        self.note_backends(peer, network, row)
        step = InferenceStep(network, DTYPES[case.dtype], self.device)
        step(images, labels)
        if not (peer.graphed or peer.engine):  # whose memory PyTorch's allocator does not give
            row.measures |= peaks(lambda: step(images, labels), self.device)
        call = GraphedStep(step, self.device) if peer.graphed else step
        return partial(call, images, labels)

    def value(self, call: Call) -> float:
        return float(call().double().norm())

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        def column(row: Measurement) -> str:
            compiled = results.peers[row.peer].mode == "aotinductor"
            return "AOTInductor, " * compiled + f"images: {row.case['batch']}"

        return {"inference": _by_network(results, column)}
