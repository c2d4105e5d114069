"""Suites of networks that are not of the family: for volumes, of classes to be recognised, KernelBench's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import nn

from ..errors import UnavailableError, UsageError
from ..kernelbench import DENSENET_121, DENSENET_201, JoinedDenseNet, ListedBlock, PlainDenseNet, Shrink
from ..peers import MODES, OTHERS, Peer
from ..results import Labels, Results
from ..tables import Table, machine_name, shown, sides
from .base import Case, Options
from .speed import InferenceSuite, StepSuite, TimedSuite


@dataclass(frozen=True)
class Network:
    """A network, and what it is measured on unless told otherwise: on a CPU, on a GPU."""

    label: str
    build: Callable[[int], nn.Module]  # for a number of classes, where it has some
    batch: tuple[int, int]
    size: tuple[int, int]  # height and width in pixels
    channels: int = 3
    published: Mapping[str, float] = field(default_factory=dict)  # milliseconds by PUBLISHED_FOR

    def case(self, dtype: str, gpu: bool, batch: int | None = None, size: int | None = None) -> Case:
        """What is measured; of another batch or size if they are given."""
        batch, size = batch or self.batch[gpu], size or self.size[gpu]
        return Case(self.build, batch, size, dtype, {"model": self.label}, self.channels)


class OwnNetworks(TimedSuite):
    """A suite of networks that are not of the family.

    Of the peers, those that run the network itself: eager in both memory formats and dense_ext, in
    :attr:`modes`.

    Raises:
        UsageError: none of the other peers is served, or the images are too small.
    """

    models = ()
    networks: ClassVar[tuple[Network, ...]]
    modes: ClassVar[tuple[str, ...]] = tuple(MODES)

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        served = [p for p in peers if p.mode in self.modes and (p.ours or p.source == "eager")]
        if all(peer.ours for peer in served):
            known = [p.name for p in OTHERS.values() if p.mode in self.modes and p.source == "eager"]
            raise UsageError(f"of the peers, --suite {self.name} has {', '.join(known)}; got none of them")
        super().__init__(options, served, results)
        for case in self.cases():
            self.flops(case)

    def cases(self) -> list[Case]:
        options = self.options
        return [
            network.case(dtype, self.gpu, options.batch, options.size)
            for network in self.networks
            for dtype in options.dtypes
        ]


class RecognisedSuite(OwnNetworks, StepSuite):
    """Training steps of KernelBench's DenseNet-121, and of a DenseNet-BC whose layers call torch.cat."""

    name = "recognised"
    title = "Training steps of recognised networks"
    summary = "training steps of two networks of classes that dense_ext does not know"
    networks = (
        Network(
            "DenseNet-121 of plain layers", lambda classes: PlainDenseNet(DENSENET_121, classes=classes),
            (8, 64), (128, 224),
        ),
        Network(
            "DenseNet-BC-40-12", lambda classes: JoinedDenseNet(6, classes=classes), (8, 64), (32, 32)
        ),
    )  # fmt: skip


def monai_densenet121(classes: int) -> nn.Module:
    """MONAI's DenseNet-121 for volumes of one channel.

    Raises:
        UnavailableError: MONAI is not installed.
    """
    try:
        from monai.networks.nets.densenet import DenseNet121
    except ImportError as error:
        raise UnavailableError(f"MONAI is not installed: {error}") from error
    network: nn.Module = DenseNet121(spatial_dims=3, in_channels=1, out_channels=classes)
    return network


class VolumeSuite(OwnNetworks, StepSuite):
    """Training steps on cubes of noise; ``size`` is their side.

    Raises:
        UnavailableError: MONAI is not installed.
    """

    name = "volumes"
    title = "Training steps on volumes"
    summary = "training steps of MONAI's network in three dimensions"
    networks = (Network("monai densenet121 3-D", monai_densenet121, (4, 8), (64, 96), channels=1),)
    modes = ("eager", "graph")
    dimensions = 3
    per = "a volume"
    tolerance = 10  # a channel has few values in the last block, and rounding shows all the more


# Published times are means of 100 calls on an H100 (80 GB HBM3) in float32, with cold caches. They stand in
# https://github.com/ScalingIntelligence/KernelBench, folder results/timing/H100_Modal.
PUBLISHED_FOR = {
    "eager": "KernelBench's H100, eager",
    "inductor": "KernelBench's H100, torch.compile",
}


class KernelBenchSuite(OwnNetworks, InferenceSuite):
    """The DenseNet problems of KernelBench's level 3 (arXiv 2502.10517), as KernelBench times them.

    Forward passes in training mode without gradients: batch norm takes the batch's statistics and updates
    the running ones; nothing is kept for backward. On a CPU the batch is 2, on a GPU KernelBench's.
    """

    name = "kernelbench"
    title = "KernelBench's DenseNets"
    summary = "forward passes of KernelBench's level 3, problems 13 to 16, in training mode without gradients"
    batch_statistics = True
    gpu_dtype = "float32"
    networks = (
        Network(
            "13: transition", lambda _: Shrink(32, 64), (2, 128), (256, 256), 32,
            {"eager": 7.33, "inductor": 3.15},
        ),
        Network(
            "14: dense block", lambda _: ListedBlock(6, 32, 32), (2, 10), (224, 224), 32,
            {"eager": 7.47, "inductor": 4.62},
        ),
        Network(
            "15: DenseNet-121", lambda classes: PlainDenseNet(DENSENET_121, classes=classes), (2, 10),
            (224, 224), published={"eager": 6.68, "inductor": 8.93},
        ),
        Network(
            "16: DenseNet-201", lambda classes: PlainDenseNet(DENSENET_201, classes=classes), (2, 10),
            (224, 224), published={"eager": 10.4, "inductor": 21.8},
        ),
    )  # fmt: skip

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        return {"problems": cls._by_problem(results), **super().tables(results)}

    @classmethod
    def _by_problem(cls, results: Results) -> Table:
        """Medians in milliseconds, a row per case; on a GPU with the published times of the same case."""
        on_gpu = results.options["device"].startswith("cuda")
        published = {str(n.case("float32", gpu=True).as_json()): n.published for n in cls.networks if on_gpu}
        ours = [name for name, peer in results.peers.items() if peer.ours]
        references = results.references().items()

        def milliseconds(case: Labels, name: str) -> str:
            seconds = results.fastest(case, [name])
            return shown(seconds and 1e3 * seconds, ".4g")

        def ratio(case: Labels, among: list[str]) -> str:
            least, other = results.fastest(case, ours), results.fastest(case, among)
            return shown(other / least if least and other else None, ".2f")

        def known(case: Labels, mode: str) -> str:
            return shown(published.get(str(case), {}).get(mode), "g")

        caption = (
            f"{', '.join(results.options['dtypes'])}, {machine_name(results)}; "
            f"PyTorch {results.versions['torch']}; medians of {results.options['rounds']} rounds"
        )
        return Table.of("forward in training mode without gradients", results.timed_cases(), {
            "milliseconds": lambda case: f"{case['model']}, {case['batch']} x {sides(case)}",
            **{peer.label: partial(milliseconds, name=name) for name, peer in results.peers.items()},
            **{f"dense_ext, {name} = 1": partial(ratio, among=among) for name, among in references},
            **{label: partial(known, mode=mode) for mode, label in PUBLISHED_FOR.items()},
        }, caption=caption).without_empty_columns()  # fmt: skip
