"""Training steps of a network for volumes: MONAI's, as it comes and swapped."""

from __future__ import annotations

from torch import nn

from ..errors import UnavailableError
from ..results import Results
from ..tables import Table
from .base import Case
from .speed import OwnNetworks, StepSuite, bytes_and_times


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
    modes = ("eager", "graph")
    dimensions = 3
    per = "a volume"
    tolerance = 10  # a channel has few values in the last block, and rounding shows all the more

    def cases(self) -> list[Case]:
        batch = self.options.batch or (8 if self.gpu else 4)
        size = self.options.size or (96 if self.gpu else 64)
        labels = {"model": "monai densenet121 3-D"}
        return [
            Case(monai_densenet121, batch, size, dtype, labels, channels=1) for dtype in self.options.dtypes
        ]

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        return {
            dtype: bytes_and_times(cls, results, 2, lambda row: cls.setting(results, row), dtype=dtype)
            for dtype in results.options["dtypes"]
        }
