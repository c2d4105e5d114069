"""Speed of training steps and of inference: of the family, and of networks that are not of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ...packing import pack_weights
from ...swap import report
from ..engines import ENGINES
from ..errors import UsageError
from ..memory import peaks, step_bytes
from ..networks import flops_per_image, plain
from ..peers import MODES, OTHERS, Peer, for_inference
from ..results import Labels, Measurement, PeerLabel, Results
from ..step import DTYPES, GraphedStep, Step
from ..tables import EMPTY, Columns, Table, images_per_second, megabytes, ratios, times
from ..timing import calls_per_sample, interleave
from .base import Case, Options, Suite, model_case, release

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


@dataclass(frozen=True)
class Network:
    """A network that is not of the family, and its cases unless told otherwise: on a CPU, on a GPU."""

    label: str
    build: Callable[[int], nn.Module]  # for a number of classes, where it has some
    batch: tuple[int, int]
    size: tuple[int, int]  # height and width in pixels
    channels: int = 3
    published: Mapping[str, float] = field(default_factory=dict)  # milliseconds on a GPU, by PUBLISHED_FOR

    def case(self, dtype: str, gpu: bool, batch: int | None = None, size: int | None = None) -> Case:
        """What is measured; of another batch or size if they are given."""
        batch, size = batch or self.batch[gpu], size or self.size[gpu]
        return Case(self.build, batch, size, dtype, {"model": self.label}, self.channels)


class TimedSuite(Suite):
    """Times a call of each peer, case by case: a training step, or a forward without gradients.

    On a CPU the rounds of all peers are interleaved, so that a slow minute falls on every one. On a
    GPU a peer is timed alone: the memory its graphs hold must not be taken from the next.

    Of inference, peers that differ only in what they keep for backward run once, and dense_ext's weights
    are packed. Networks that are not of the family are run by those peers that run the network itself:
    eager in both memory formats and dense_ext.

    Raises:
        UsageError: none of the other peers runs networks of one's own, or the images are too small.
    """

    models: ClassVar[tuple[str, ...]] = FAMILY
    networks: ClassVar[tuple[Network, ...]] = ()  # where they are not of the family
    modes: ClassVar[tuple[str, ...]] = tuple(MODES)  # in which those are run
    # Images a call, where no option says so: few on a CPU, where all peers of a case are in memory.
    batches: ClassVar[tuple[tuple[int, ...], tuple[int, ...]]] = (4,), (64,)
    training: ClassVar[bool] = True
    batch_statistics: ClassVar[bool] = False  # whether networks are in training mode for inference
    tolerance: ClassVar[float] = 1  # of what losses of networks for images may differ by

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        if self.networks:
            others = [p.name for p in OTHERS.values() if p.source == "eager" and p.mode in self.modes]
            peers = [p for p in peers if p.name in others or (p.ours and p.mode in self.modes)]
            if all(peer.ours for peer in peers):
                known = f"of the peers, --suite {self.name} has {', '.join(others)}"
                raise UsageError(f"{known}; got none of them")
        super().__init__(options, peers if self.training else for_inference(peers), results)
        for case in self.cases() if self.networks else []:
            self.flops(case)

    def cases(self) -> list[Case]:
        options = self.options
        own = [
            network.case(dtype, self.gpu, options.batch, options.size)
            for network in self.networks
            for dtype in options.dtypes
        ]
        return own or [
            model_case(name, size, dtype, batch)
            for name, size in self.sizes.items()
            for batch in ((options.batch,) if options.batch else self.batches[self.gpu])
            for dtype in options.dtypes
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
        """The call's operations for an image.

        Raises:
            UsageError: the images are too small for the network.
        """
        shape = (case.channels, *[case.size] * self.results.dimensions)
        try:
            return flops_per_image(lambda: plain(case.build(case.classes)), shape, self.training)
        except (RuntimeError, ValueError) as error:
            what = f"{self.results.per.split()[1]}s of side {case.size}"
            raise UsageError(f"{what} are too small for {case.labels['model']}: {error}") from error

    def time(self, case: Case, peers: list[Peer], flops: int, rows: list[Measurement]) -> None:
        """Time some of a case's peers together; adds to ``rows``, its rows so far."""
        calls: dict[str, Callable[[], Tensor]] = {}
        count = 0
        for peer in peers:
            self.tick(f"{peer.name}: {case}")
            row = self.row(case.as_json(), peer.name)
            rows.append(row)
            with row.failing():
                step, *arguments = self.prepare(case, peer, row)
                if peer.ours:
                    row.served_by = list(dict.fromkeys(part.detail for part in report(step.model).rows))
                call = partial(GraphedStep(step, self.device) if peer.mode == "graph" else step, *arguments)
                # The others' are more than a graph's eager calls, and what torch.compile takes to be done.
                plain_calls = peer.mode == "eager" and not self.gpu
                # A loss is its own norm; of logits the norm is compared.
                values = [float(call().double().norm()) for _ in range(2 if plain_calls else 5)]
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
        settles = any(peer.mode in ENGINES for peer in peers)
        interleave(timed, self.device, self.options.rounds, self.tick, settles)

    def prepare(self, case: Case, peer: Peer, row: Measurement) -> tuple[Step, Tensor, Tensor]:
        """The step to time and what to call it with; measures its memory on the way."""
        if self.training:
            if peer.mode != "graph":  # what a graph holds is its own, not what a step that runs allocates
                row.measures |= step_bytes(*self.training_step(case, peer))
            # Anew, as measuring took steps, which changed the weights.
            return self.training_step(case, peer)
        images, labels = self.batch(case, peer)
        network = self.network(case, peer, self.batch_statistics)
        if peer.ours:
            pack_weights(network)
        step = Step(network, DTYPES[case.dtype], self.device)
        step(images, labels)
        if peer.mode not in ("graph", *ENGINES):  # whose memory PyTorch's allocator does not give
            row.measures |= peaks(lambda: step(images, labels), self.device)
        return step, images, labels

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        """Each row with samples; where there is one case, it stands below the table."""
        cases = results.timed_cases()
        one = cases[0] if len(cases) == 1 else None
        network: Columns = {"network": lambda row: f"{results.network(row.case)}, {row.case['dtype']}"}
        speed = Table.of(f"speed: {cls.title.lower()}", results.timed(), {
            **({} if one else network), "": results.label, **times(),
            "images/s": images_per_second, **ratios(results),
            "of matmul rate": lambda row: f"{results.matmul_share(row):.0%}",
            "kept, MB": megabytes("saved_bytes"), "peak, MB": megabytes("peak_bytes"),
        }, left=1 if one else 2, caption=cls._caption(results, one))  # fmt: skip
        return {"speed": speed, "networks": _by_network(results)}

    @classmethod
    def _caption(cls, results: Results, case: Labels | None) -> str:
        """What was measured; of one case also what bounds it, where it comes near that bound."""
        where = results.setting(case) if case else results.on
        text = f"{where}; PyTorch {results.versions['torch']}; {results.options['rounds']} rounds"
        if not case:
            return text
        row, work = results.timed()[0], results.work
        what = "step" if cls.training else "call"
        near = max(results.matmul_share(other) for other in results.timed()) > 0.5
        begin = f"What bounds the {what} is arithmetic:" if near else f"A {what} takes"
        flops = row.measures["flops"] / int(case["batch"])
        multiplies = work["matmul_flops_per_second"][case["dtype"]] / 1e9
        return (
            f"{text}. {begin} {flops / 1e9:.2f} GFLOP {results.per}, on a machine that multiplies matrices "
            f"at {multiplies:.0f} GFLOP/s and copies at {work['copy_bytes_per_second'] / 1e9:.0f} GB/s"
        )


def _by_network(results: Results) -> Table:
    """How many times as fast as the fastest other network dense_ext is, a row a network and dtype.

    How far that network's samples spread says how far the ratios are to be trusted.
    """
    if not results.references():
        return EMPTY
    speeds: dict[tuple[str, str], str] = {}
    apart: dict[str, float] = {}
    reference, among = list(results.references().items())[-1]
    options, several = results.options, len(results.options["dtypes"]) > 1
    batches = list(dict.fromkeys(str(row.case["batch"]) for row in results.rows))
    for row in results.timed():
        case, least = row.case, results.fastest(row.case, among)
        network = f"{case['model']}, {results.sides(case)}" + f", {case['dtype']}" * several
        if results.ours(row) and least:
            batch = f"images: {case['batch']}" if len(batches) > 1 else ""
            how = results.label(row).removeprefix("dense_ext").removeprefix(", ")
            speeds[network, ", ".join(filter(None, (how, batch))) or "dense_ext"] = (
                f"{least / row.median:.2f}"
            )
        elif row.median == least:
            apart[network] = max(apart.get(network, 0), max(row.seconds) / min(row.seconds))
    cells = speeds | {(network, "its slowest / fastest sample"): f"{a:.2f}" for network, a in apart.items()}
    caption = (
        f"images a call: {' and '.join(batches)}; {', '.join(options['dtypes'])}, {results.on}, "
        f"{options['rounds']} rounds"
    )
    return Table.pivot("speed by network", cells, f"{reference} = 1", caption=caption, short=True)


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


class InferenceSuite(TimedSuite):
    """Forward passes in evaluation mode without gradients, of one image and of a batch."""

    name = "inference"
    title = "Inference"
    summary = "forward passes over the family"
    batches = (1, 4), (1, 64)
    training = False
