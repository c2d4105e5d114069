"""Training steps of a network for volumes: MONAI's, as it comes and swapped."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UnavailableError, UsageError
from ..flops import flops_per_image
from ..peers import Peer
from ..results import Results
from ..tables import Table
from .base import Case, Options
from .speed import StepSuite, bytes_and_times

_CLASSES = 10


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


class VolumeSuite(StepSuite):
    """Training steps on cubes of noise; ``size`` is their side.

    Of the peers, those that MONAI's network has: eager in both memory formats, and dense_ext; plain or as
    CUDA graphs.

    Raises:
        UnavailableError: MONAI is not installed.
        UsageError: none of the other peers is served, or the volumes are too small.
    """

    name = "volumes"
    title = "Training steps on volumes"
    summary = "training steps of MONAI's network in three dimensions"
    models = ()
    dimensions = 3
    per = "a volume"
    tolerance = 10  # a channel has few values in the last block, and rounding shows all the more

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        served = [p for p in peers if p.mode in ("eager", "graph") and (p.ours or p.source == "eager")]
        if all(peer.ours for peer in served):
            raise UsageError(
                "of the peers, volumes have eager, eager-cl, graph and graph-cl; got none of them"
            )
        super().__init__(options, served, results)
        case = self.cases()[0]
        try:
            self.operations = flops_per_image(
                lambda: case.build(_CLASSES), (1, *[case.size] * 3), self.training
            )
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"volumes of side {case.size} are too small for the network: {error}") from error

    def cases(self) -> list[Case]:
        batch = self.options.batch or (8 if self.gpu else 4)
        size = self.options.size or (96 if self.gpu else 64)
        labels = {"model": "monai densenet121 3-D"}
        return [Case(monai_densenet121, batch, size, dtype, labels) for dtype in self.options.dtypes]

    def flops(self, case: Case) -> int:
        return self.operations

    def classes(self, case: Case) -> int:
        return _CLASSES

    def twin(self, model: Any, peer: Peer) -> nn.Module:
        return model.to(self.device)

    def batch(self, case: Case, peer: Peer, channels: int = 1) -> tuple[Tensor, Tensor]:
        return super().batch(case, peer, channels)

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        return {"volumes": bytes_and_times(cls, results, 2, lambda row: cls.setting(results, row))}
