"""Training steps of networks that dense_ext does not know and recognises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..kernelbench import DENSENET_121, JoinedDenseNet, PlainDenseNet
from ..results import Measurement, Results
from ..tables import Table
from .base import Case
from .speed import OwnNetworks, StepSuite, bytes_and_times


@dataclass(frozen=True)
class Network:
    """A network to measure, and the height and width of its images in pixels."""

    label: str
    build: Callable[[int], nn.Module]  # for a number of classes
    size: int
    gpu_size: int


# By the name of their table.
NETWORKS = {
    "plain": Network(
        "DenseNet-121 of plain layers", lambda classes: PlainDenseNet(DENSENET_121, classes=classes), 128, 224
    ),
    "joined": Network("DenseNet-BC-40-12", lambda classes: JoinedDenseNet(6, classes=classes), 32, 32),
}


class RecognisedSuite(OwnNetworks, StepSuite):
    """Training steps of KernelBench's DenseNet-121, and of a DenseNet-BC whose layers call torch.cat."""

    name = "recognised"
    title = "Training steps of recognised networks"
    summary = "training steps of two networks of classes that dense_ext does not know"

    def cases(self) -> list[Case]:
        batch = self.options.batch or (64 if self.gpu else 8)
        return [
            Case(network.build, batch, self._size(network), dtype, {"model": network.label})
            for network in NETWORKS.values()
            for dtype in self.options.dtypes
        ]

    def _size(self, network: Network) -> int:
        return self.options.size or (network.gpu_size if self.gpu else network.size)

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        def setting(row: Measurement) -> str:
            return f"{row.case['model']}, {cls.setting(results, row)}; PyTorch {results.versions['torch']}"

        return {
            name: bytes_and_times(cls, results, 3, setting, model=network.label)
            for name, network in NETWORKS.items()
        }
