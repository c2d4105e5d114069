"""What the suites share: options, cases, and networks with their images on the device."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...models import MODELS
from ..errors import UsageError
from ..memory import collect, step_bytes
from ..networks import image_size
from ..peers import Peer
from ..results import Labels, Measurement, PeerLabel, Results, Tick, case_text
from ..step import DTYPES, Step, sgd_step
from ..tables import Kind
from ..timing import copy_bandwidth, matmul_rate

SEED = 0
_SMALL = 32  # pixels: images of CIFAR's size are of 10 classes, larger ones of ImageNet's 1000
# torch.compile gives up on a network after 8 versions of it; a run has as many as compiled peers.
_COMPILED_VERSIONS = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; None and an empty tuple leave it to the suite."""

    models: tuple[str, ...] = ()  # names from dense_ext.models.MODELS
    batch: int | None = None  # images a step
    size: int | None = None  # their height and width in pixels
    dtypes: tuple[str, ...] = ("float32",)  # names from step.DTYPES; other than float32 by autocast
    device: str = "cpu"
    backend: str = "auto"  # dense_ext's
    rounds: int = 7  # samples of each row that is timed
    budget: int | None = None  # bytes that a network is to fit
    depth: bool = True  # whether quick also measures the memory of one block against its depth

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # as it is read again


@dataclass(frozen=True)
class Case:
    """What every peer is measured on."""

    build: Callable[[int], Any] = field(compare=False)  # makes the network for a number of classes
    batch: int
    size: int  # height and width in pixels
    dtype: str  # a name from step.DTYPES
    labels: Labels  # what else tells it from other cases: the model's name, its depth
    channels: int = 3  # of an image
    classes: int = 10

    def as_json(self) -> dict[str, str | int]:
        return {**self.labels, "batch": self.batch, "size": self.size, "dtype": self.dtype}

    def __str__(self) -> str:
        return case_text(self.as_json())


def model_case(name: str, size: int, dtype: str, batch: int) -> Case:
    """A case of one of the family, by name."""
    classes = 10 if size <= _SMALL else 1000
    return Case(lambda n: MODELS[name](num_classes=n), batch, size, dtype, {"model": name}, classes=classes)


def release() -> None:
    """Give back what the networks so far hold, compiled ones too."""
    torch._dynamo.reset()
    collect()


class Suite(Kind):
    """One suite's run; ``results.rows`` grows as it goes, so that an interruption keeps them.

    Args:
        options: what to measure.
        peers: what to measure it on.
        results: gets the peers and rows.

    Raises:
        UsageError: the suite cannot measure what the options ask for.
    """

    summary: ClassVar[str]  # what it measures, for --help
    models: ClassVar[tuple[str, ...]] = ("densenet121",)  # empty for a suite with networks of its own
    pixels: ClassVar[tuple[int, int]] = (128, 224)  # of images for ImageNet, on a CPU and on a GPU
    timed: ClassVar[bool] = True
    gpu_dtype: ClassVar[str] = "bfloat16"  # on a GPU, unless told otherwise; on a CPU it is float32

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        if options.models and not self.models:
            raise UsageError(f"--suite {self.name} has networks of its own and takes no --model")
        self.options, self.peers, self.results = options, peers, results
        self.device = torch.device(options.device)
        self.gpu = self.device.type == "cuda"
        # The networks by name, and the height and width of their images, as asked for or as they take them.
        self.sizes = {
            name: options.size or image_size(name, self.pixels[self.gpu])
            for name in options.models or self.models
        }
        results.peers = {p.name: PeerLabel(p.label, p.ours, p.mode) for p in peers}

    @abstractmethod
    def ticks(self) -> int:
        """How often a whole run ticks."""

    @abstractmethod
    def measure(self) -> None:
        """Fill the rows."""

    def run(self, tick: Tick) -> None:
        """Measure everything; ``tick`` is told what comes next."""
        self.tick = tick
        torch.backends.cudnn.benchmark = self.timed  # eager at its best
        with torch._dynamo.config.patch(recompile_limit=_COMPILED_VERSIONS):
            self.measure()

    def measure_rates(self) -> None:
        """What the machine copies and multiplies; called again, the best of both times."""
        self.tick("the machine's rates")
        before = self.results.work or {"copy_bytes_per_second": 0, "matmul_flops_per_second": {}}
        best, copied = before["matmul_flops_per_second"], before["copy_bytes_per_second"]
        rates = {dtype: matmul_rate(self.device, DTYPES[dtype]) for dtype in self.options.dtypes}
        self.results.work = {
            "copy_bytes_per_second": max(copied, copy_bandwidth(self.device)),
            "matmul_flops_per_second": {dtype: max(r, best.get(dtype, 0)) for dtype, r in rates.items()},
        }

    def row(self, case: Labels, peer: str) -> Measurement:
        """A new row of the results."""
        self.results.rows.append(Measurement(dict(case), peer))
        return self.results.rows[-1]

    def network(self, case: Case, peer: Peer, training: bool = True) -> nn.Module:
        """The peer's network with the case's weights.

        Raises:
            UnavailableError: the peer cannot run here.
        """
        peer.check(self.device, DTYPES[case.dtype])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = case.build(case.classes)
        return peer.build(network, self.device, self.options.backend, training)

    def batch(self, case: Case, peer: Peer) -> tuple[Tensor, Tensor]:
        """Noise, the same for every peer, and labels; speed and memory do not depend on what images show."""
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(
            case.batch, case.channels, *[case.size] * self.results.dimensions, generator=generator
        )
        labels = torch.arange(case.batch, device=self.device) % case.classes
        return peer.images(images.to(self.device)), labels

    def training_step(self, case: Case, peer: Peer) -> tuple[Step, Tensor, Tensor]:
        """The peer's training step, and what to call it with."""
        return sgd_step(self.network(case, peer), DTYPES[case.dtype], self.device), *self.batch(case, peer)

    def count(self, case: Case, peer: Peer) -> None:
        """A row of what a training step keeps, at most holds, and what lasts from step to step."""
        self.tick(f"{peer.name}: {case}")
        row = self.row(case.as_json(), peer.name)
        with row.failing():
            row.measures |= step_bytes(*self.training_step(case, peer))
