"""What the suites share: cases, rows, and rows that say why there is no measurement."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...models import MODELS, DenseNet
from ..bench import COMPILED_VERSIONS
from ..errors import reason
from ..images import sample_batch
from ..networks import takes_small_images
from ..peers import Peer
from ..results import Results
from ..step import DTYPES, TrainStep, sgd_step

SEED = 0

Tick = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class SuiteOptions:
    """What to measure; None and an empty tuple leave it to the suite.

    Args:
        models: names from ``dense_ext.models.MODELS``.
        batch, size: images a step, and their height and width in pixels.
        dtypes: names from ``step.DTYPES``; other than float32 by autocast.
        device: torch's name of it.
        backend: dense_ext's, or "auto".
        rounds: samples of each row that is timed.
        budget: bytes that a network is to fit.
        data: images by class, or None for scikit-learn's photographs.
    """

    models: tuple[str, ...]
    batch: int | None
    size: int | None
    dtypes: tuple[str, ...]
    device: str
    backend: str
    rounds: int
    budget: int | None
    data: Path | None

    def as_json(self) -> dict[str, Any]:
        """The options without the machine's paths."""
        return {**asdict(self), "data": self.data.name if self.data else None}


@dataclass(frozen=True)
class Case:
    """What every peer is measured on.

    Args:
        build: makes the network for a number of classes.
        batch, size: images, and their height and width in pixels.
        dtype: a name from ``step.DTYPES``.
        labels: what else tells the case from others, as it stands in the row: the model's name, its depth.
    """

    build: Callable[[int], Any]
    batch: int
    size: int
    dtype: str
    labels: Mapping[str, str | int]

    def as_json(self) -> dict[str, str | int]:
        return {**self.labels, "batch": self.batch, "size": self.size, "dtype": self.dtype}

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.as_json().items())


def build_model(name: str, classes: int) -> DenseNet:
    """One of the family, by name."""
    return MODELS[name](num_classes=classes)


def new_row(case: Mapping[str, str | int], peer: str) -> Row:
    """A row without measurements.

    ``measures`` are by name and in base units (bytes, operations); ``seconds`` are raw samples.
    """
    return {"case": dict(case), "peer": peer, "failure": None, "measures": {}, "seconds": []}


@contextmanager
def failing_into(row: Row) -> Iterator[None]:
    """What goes wrong inside becomes the row's ``failure``; memory it held is given back."""
    try:
        yield
    except Exception as error:
        row["failure"] = reason(error)
    if row["failure"] is not None:
        _collect()


def _collect() -> None:
    """Give back the memory of what nobody refers to."""
    gc.collect()
    # A kernel that failed leaves the GPU to this process unusable: later rows say so, each for itself.
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def release() -> None:
    """Give back what the networks so far hold, compiled ones too."""
    torch._dynamo.reset()
    _collect()


class Suite(ABC):
    """One suite's run; ``results["rows"]`` grows as it goes, so that an interruption keeps them.

    Args:
        options: what to measure.
        peers: what to measure it on.
        results: gets "peers" and "rows".
    """

    name: ClassVar[str]
    timed: ClassVar[bool] = True

    def __init__(self, options: SuiteOptions, peers: list[Peer], results: Results) -> None:
        self.options, self.peers, self.results = options, peers, results
        self.device = torch.device(options.device)
        self.gpu = self.device.type == "cuda"
        self.rows: list[Row] = results.setdefault("rows", [])
        results["peers"] = {p.name: p.as_json() for p in peers}

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
        with torch._dynamo.config.patch(recompile_limit=COMPILED_VERSIONS):
            self.measure()

    def pixels(self, model: str, of_photographs: int | None = None) -> int:
        """Height and width of a network's images, by name: as asked for, or as its kind takes them.

        Args:
            model: its name.
            of_photographs: what a network for ImageNet takes; None for what is timed.
        """
        if self.options.size:
            return self.options.size
        with torch.device("meta"):
            small = takes_small_images(MODELS[model]())
        return 32 if small else of_photographs or (224 if self.gpu else 128)

    def row(self, case: Case, peer: Peer) -> Row:
        """A new row of the results."""
        self.rows.append(new_row(case.as_json(), peer.name))
        return self.rows[-1]

    def network(self, case: Case, peer: Peer, classes: int, training: bool = True) -> nn.Module:
        """The peer's network with the case's weights.

        Raises:
            UnavailableError: the peer cannot run here.
        """
        peer.check(self.device, DTYPES[case.dtype])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = case.build(classes)
        return peer.build(model, model.state_dict(), self.device, self.options.backend, training)

    def batch(self, case: Case, peer: Peer) -> tuple[Tensor, Tensor, int]:
        """Images and labels on the device, and the number of classes."""
        batch = sample_batch(self.options.data, case.batch, case.size, SEED)
        self.results["data"] = batch.source
        return peer.images(batch.images.to(self.device)), batch.labels.to(self.device), batch.classes

    def training_step(self, case: Case, peer: Peer) -> tuple[TrainStep, Tensor, Tensor]:
        """The peer's training step, and what to call it with."""
        images, labels, classes = self.batch(case, peer)
        network = self.network(case, peer, classes)
        return sgd_step(network, DTYPES[case.dtype], self.device), images, labels
