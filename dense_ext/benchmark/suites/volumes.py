"""Training steps of a network for volumes: MONAI's, as it comes and swapped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...swap import swap
from ..errors import UnavailableError, UsageError
from ..flops import flops_per_image
from ..peers import Peer
from ..results import Results
from ..step import DTYPES
from .base import SEED, Case, SuiteOptions
from .speed import StepSuite

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
        UsageError: none of the other peers is served, the volumes are too small, or images are asked for.
    """

    name = "volumes"
    tolerance = 10  # a channel has few values in the last block, and rounding shows all the more

    def __init__(self, options: SuiteOptions, peers: list[Peer], results: Results) -> None:
        served = [peer for peer in peers if peer.source == "eager" and peer.mode in ("eager", "graph")]
        if all(peer.ours for peer in served):
            raise UsageError(
                "of the peers, volumes have eager, eager-cl, graph and graph-cl; got none of them"
            )
        if options.data is not None:
            raise UsageError("volumes are made of noise; --data has images")
        super().__init__(options, served, results)
        results["data"] = "noise"
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

    def network(self, case: Case, peer: Peer, classes: int, training: bool = True) -> nn.Module:
        peer.check(self.device, DTYPES[case.dtype])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = case.build(classes)
        if peer.recompute is not None:
            backend = peer.backend or self.options.backend
            swap(network, recompute=peer.recompute, backend=backend, strict=True)
        return network.to(self.device, memory_format=_memory_format(peer)).train(training)

    def batch(self, case: Case, peer: Peer) -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(SEED)
        volumes = torch.randn(case.batch, 1, *[case.size] * 3, generator=generator)
        labels = torch.arange(case.batch, device=self.device) % _CLASSES
        return volumes.to(self.device).contiguous(memory_format=_memory_format(peer)), labels, _CLASSES


def _memory_format(peer: Peer) -> torch.memory_format:
    return torch.channels_last_3d if peer.channels_last else torch.contiguous_format
