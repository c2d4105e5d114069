"""One benchmark run: every peer in one process, on the same weights and images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import MODELS, DenseNet
from ..swap import report
from . import depth
from .errors import MeasurementError, UnavailableError, reason
from .flops import flops_per_image
from .graphs import GraphedStep
from .images import Batch, sample_batch
from .machine import copy_bandwidth, matmul_rate
from .memory import saved_bytes, step_peaks
from .networks import torchvision_twin
from .peers import Peer
from .results import Results
from .step import DTYPES, TrainStep, sgd_step
from .timing import calls_per_sample, interleave

SEED = 0
# Losses of the first two steps may differ from the first peer's by this share. float32 accumulates
# rounding over hundreds of convolutions, then one update; the others round every activation to 8 or 11 bits.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
# torch.compile gives up on a network after 8 versions of it; a run has as many as compiled peers.
COMPILED_VERSIONS = 64

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        model: a name from ``dense_ext.models.MODELS``.
        batch, size: images a step, and their height and width in pixels, when timing.
        memory_batch, memory_size: the same when measuring memory.
        dtype: a name from ``step.DTYPES``; other than float32 by autocast.
        device: torch's name of it.
        backend: dense_ext's, or "auto".
        rounds: samples of each peer.
        data: images by class, or None for scikit-learn's photographs.
        depths: layers of the blocks in the memory-against-depth study; empty leaves it out.
    """

    model: str
    batch: int
    size: int
    memory_batch: int
    memory_size: int
    dtype: str
    device: str
    backend: str
    rounds: int
    data: Path | None
    depths: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The options without the machine's paths."""
        return {**asdict(self), "data": self.data.name if self.data else None}


class Bench:
    """The stages of a run; each fills its part of ``results`` as it goes.

    Interrupted, ``results`` holds what was measured until then.
    """

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        self.options, self.peers, self.results = options, peers, results
        self.device, self.dtype = torch.device(options.device), DTYPES[options.dtype]
        self.timing_batch = self._batch(options.batch, options.size)
        torch.manual_seed(SEED)
        self.model: DenseNet = MODELS[options.model](num_classes=self.timing_batch.classes)
        torchvision_twin(self.model)  # refuses what torchvision has no twin of
        self.weights = self.model.state_dict()
        results["peers"] = {p.name: p.as_json() for p in peers}
        results["data"] = self.timing_batch.source

    def ticks(self) -> int:
        """How often a whole run ticks."""
        timed = len(self.peers) * (1 + self.options.rounds)
        return 1 + len(self.peers) + timed + len(self.depth_peers()) * len(self.options.depths)

    def depth_peers(self) -> list[Peer]:
        """One memory format suffices for the memory of a block."""
        plain = [p for p in self.running() if p.source in ("eager", "memory-efficient") and p.mode == "eager"]
        kinds = {p.memory_efficient: p for p in plain if not p.ours}
        return [*kinds.values(), *(p for p in plain if p.ours)]

    def run(self, tick: Tick) -> None:
        """All stages; ``tick`` is told what comes next.

        Raises:
            MeasurementError: dense_ext's losses are not the eager network's.
        """
        self.tick = tick
        torch.backends.cudnn.benchmark = True  # eager at its best
        with torch._dynamo.config.patch(recompile_limit=COMPILED_VERSIONS):
            self.measure_work()
            self.measure_memory()
            self.measure_speed()
            if self.options.depths:
                depth.measure_depth(
                    self.depth_peers(), self.results.setdefault("depth", {}), self.device, self.dtype,
                    self.options.backend, self.tick, self.options.depths, self.failing,
                )  # fmt: skip

    def measure_work(self) -> None:
        """The step's arithmetic and the machine's rates: what could bound it."""
        self.tick("the machine's rates")
        shape = 3, self.options.size, self.options.size
        self.results["work"] = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "forward_flops_per_image": flops_per_image(self._plain_twin, shape, backward=False),
            "step_flops_per_image": flops_per_image(self._plain_twin, shape, backward=True),
            "matmul_flops_per_second": matmul_rate(self.device, self.dtype),
            "copy_bytes_per_second": copy_bandwidth(self.device),
        }

    def measure_memory(self) -> None:
        """Saved and peak bytes per image of each peer."""
        batch = self._batch(self.options.memory_batch, self.options.memory_size)
        measured = self.results.setdefault("memory", {})
        for peer in self.peers:
            self.tick(f"memory of {peer.name}")
            with self.failing(peer):
                measured[peer.name] = self._memory(peer, batch)

    def _memory(self, peer: Peer, batch: Batch) -> dict[str, float]:
        step, images, labels = self._step(peer, batch)
        saved = saved_bytes(step.model, lambda: step.loss(images, labels))
        counted = {"saved_bytes": saved, **step_peaks(step, images, labels)}
        return {f"{name}_per_image": nbytes / len(images) for name, nbytes in counted.items()}

    def measure_speed(self) -> None:
        """Seconds per step of each peer, in interleaved rounds, after checking that they agree."""
        steps, count = {}, 0
        for peer in self.running():
            self.tick(f"first steps of {peer.name}")
            with self.failing(peer):
                step, images, labels = self._step(peer, self.timing_batch)
                call = partial(GraphedStep(step, self.device) if peer.graphed else step, images, labels)
                if peer.ours:
                    served = dict.fromkeys(row.detail for row in report(step.model).rows)
                    self.results["peers"][peer.name]["served_by"] = list(served)
                # More calls than a graph makes before it is recorded, and than compiling takes.
                losses = [float(call()) for _ in range(5)][:2]
                self.results.setdefault("first_losses", {})[peer.name] = losses
                count = count or calls_per_sample(call, self.device)
                steps[peer.name] = call
        self.check_agreement()
        samples: dict[str, list[float]] = {name: [] for name in steps}
        self.results["speed"] = {"calls_per_sample": count, "seconds": samples}
        interleave(steps, samples, self.results["peers"], self.device, self.options.rounds, count, self.tick)
        # The machine's best, also if something else ran on it at the start.
        work = self.results["work"]
        work["matmul_flops_per_second"] = max(
            work["matmul_flops_per_second"], matmul_rate(self.device, self.dtype)
        )

    def check_agreement(self) -> None:
        """Refuse to go on if the first two losses of dense_ext differ from the first peer's."""
        losses, running = self.results["first_losses"], self.running()
        if not running or running[0].ours:
            raise UnavailableError("no peer to compare with can run here; see --peers")
        reference = running[0].name
        tolerance = self.results["loss_tolerance"] = LOSS_TOLERANCE[self.options.dtype]
        for peer in running:
            for i, (loss, expected) in enumerate(zip(losses[peer.name], losses[reference], strict=True)):
                difference = abs(loss - expected) / abs(expected)
                if peer.ours and not (math.isfinite(loss) and difference <= tolerance):
                    raise MeasurementError(
                        f"{peer.name} has loss {loss:.6g} in step {i + 1}, {reference} has {expected:.6g}: "
                        f"they differ by {difference:.2g}, tolerance {tolerance:g}; no speed is reported"
                    )

    def running(self) -> list[Peer]:
        """The peers that have not failed."""
        return [peer for peer in self.peers if "failure" not in self.results["peers"][peer.name]]

    @contextmanager
    def failing(self, peer: Peer) -> Iterator[None]:
        """What goes wrong inside is the reason why the peer has no figures."""
        try:
            yield
        except Exception as error:
            self.results["peers"][peer.name]["failure"] = reason(error)

    def _plain_twin(self) -> torch.nn.Module:
        network: torch.nn.Module = torchvision_twin(self.model, device="cpu")
        return network

    def _batch(self, batch: int, size: int) -> Batch:
        return sample_batch(self.options.data, batch, size, SEED)

    def _step(self, peer: Peer, batch: Batch) -> tuple[TrainStep, Tensor, Tensor]:
        peer.check(self.device, self.dtype)
        network = peer.build(self.model, self.weights, self.device, self.options.backend)
        step = sgd_step(network, self.dtype, self.device)
        return step, peer.images(batch.images.to(self.device)), batch.labels.to(self.device)
