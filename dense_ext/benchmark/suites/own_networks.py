"""Suites of networks that are not of the family: for volumes, of classes to be recognised, KernelBench's."""

from __future__ import annotations

from torch import nn

from ..errors import UnavailableError
from ..kernelbench import DENSENET_121, DENSENET_201, JoinedDenseNet, ListedBlock, PlainDenseNet, Shrink
from ..results import Results
from ..tables import Table
from .speed import Network, TimedSuite


class RecognisedSuite(TimedSuite):
    """Training steps of KernelBench's DenseNet-121, and of a DenseNet-BC whose layers call torch.cat."""

    name = "recognised"
    title = "Training steps of recognised networks"
    summary = "training steps of two networks of classes that dense_ext does not know"
    models = ()
    networks = (
        Network(
            "DenseNet-121 of plain layers", lambda classes: PlainDenseNet(DENSENET_121, classes=classes),
            (8, 64), (128, 224),
        ),
        Network("DenseNet-BC-40-12", lambda classes: JoinedDenseNet(6, classes=classes), (8, 64), (32, 32)),
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


class VolumeSuite(TimedSuite):
    """Training steps on cubes of noise; ``size`` is their side.

    Raises:
        UnavailableError: MONAI is not installed.
    """

    name = "volumes"
    title = "Training steps on volumes"
    summary = "training steps of MONAI's network in three dimensions"
    models = ()
    networks = (Network("monai densenet121 3-D", monai_densenet121, (4, 8), (64, 96), channels=1),)
    modes = ("eager", "graph")
    tolerance = 10  # a channel has few values in the last block, and rounding shows all the more


# Published times are means of 100 calls on an H100 (80 GB HBM3) in float32, with cold caches. They stand in
# https://github.com/ScalingIntelligence/KernelBench, folder results/timing/H100_Modal.
PUBLISHED_FOR = {"eager": "KernelBench's H100, eager", "inductor": "KernelBench's H100, torch.compile"}


class KernelBenchSuite(TimedSuite):
    """The DenseNet problems of KernelBench's level 3 (arXiv 2502.10517), as KernelBench times them.

    Forward passes in training mode without gradients: batch norm takes the batch's statistics and updates
    the running ones; nothing is kept for backward. On a CPU the batch is 2, on a GPU KernelBench's.
    """

    name = "kernelbench"
    title = "KernelBench's DenseNets"
    summary = "forward passes of KernelBench's level 3, problems 13 to 16, in training mode without gradients"
    models = ()
    training = False
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
        options, cells = results.options, {}
        on_gpu = options["device"].startswith("cuda")
        published = {str(n.case("float32", gpu=True).as_json()): n.published for n in cls.networks if on_gpu}
        ours = [name for name, peer in results.peers.items() if peer.ours]
        several = len(options["dtypes"]) > 1
        for case in results.timed_cases():
            problem = results.network(case) + f", {case['dtype']}" * several
            for name, peer in results.peers.items():
                if least := results.fastest(case, [name]):
                    cells[problem, peer.label] = f"{1e3 * least:.4g}"
            for name, among in results.references().items():
                least, other = results.fastest(case, ours), results.fastest(case, among)
                if least and other:
                    cells[problem, f"dense_ext, {name} = 1"] = f"{other / least:.2f}"
            for mode, milliseconds in published.get(str(case), {}).items():
                cells[problem, PUBLISHED_FOR[mode]] = f"{milliseconds:g}"
        caption = (
            f"{', '.join(options['dtypes'])}, {results.on}; "
            f"PyTorch {results.versions['torch']}; medians of {options['rounds']} rounds"
        )
        title = "forward in training mode without gradients"
        return Table.pivot(title, cells, "milliseconds", caption=caption)
