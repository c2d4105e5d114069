"""The DenseNet problems of KernelBench's level 3 (arXiv 2502.10517): forward passes in training mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..kernelbench import DENSENET_121, DENSENET_201, ListedBlock, PlainDenseNet, Shrink
from ..results import Results
from ..tables import Table, machine_name
from .base import Case
from .speed import InferenceSuite, OwnNetworks

_CPU_BATCH = 2


@dataclass(frozen=True)
class Problem:
    """A problem as KernelBench poses it."""

    label: str
    build: Callable[[int], nn.Module]  # for a number of classes, where it has some
    batch: int
    channels: int
    size: int  # height and width in pixels
    published: Mapping[str, float]  # milliseconds by PUBLISHED_FOR

    def case(self, dtype: str, batch: int | None = None, size: int | None = None) -> Case:
        """What is measured; of another batch or size if they are given."""
        labels = {"model": self.label}
        return Case(self.build, batch or self.batch, size or self.size, dtype, labels, self.channels)


# Published times are means of 100 calls on an H100 (80 GB HBM3) in float32, with cold caches. They stand in
# https://github.com/ScalingIntelligence/KernelBench, folder results/timing/H100_Modal.
PUBLISHED_FOR = {
    "eager": "KernelBench's H100, eager",
    "inductor": "KernelBench's H100, torch.compile",
}
PROBLEMS = (
    Problem("13: transition", lambda _: Shrink(32, 64), 128, 32, 256, {"eager": 7.33, "inductor": 3.15}),
    Problem(
        "14: dense block", lambda _: ListedBlock(6, 32, 32), 10, 32, 224, {"eager": 7.47, "inductor": 4.62}
    ),
    Problem(
        "15: DenseNet-121", lambda classes: PlainDenseNet(DENSENET_121, classes=classes), 10, 3, 224,
        {"eager": 6.68, "inductor": 8.93},
    ),
    Problem(
        "16: DenseNet-201", lambda classes: PlainDenseNet(DENSENET_201, classes=classes), 10, 3, 224,
        {"eager": 10.4, "inductor": 21.8},
    ),
)  # fmt: skip


class KernelBenchSuite(OwnNetworks, InferenceSuite):
    """Forward passes in training mode without gradients, as KernelBench times them.

    Batch norm takes the batch's statistics and updates the running ones; nothing is kept for backward. On a
    CPU the batch is 2.
    """

    name = "kernelbench"
    title = "KernelBench's DenseNets"
    summary = "forward passes of KernelBench's level 3, problems 13 to 16, in training mode without gradients"
    batch_statistics = True
    gpu_dtype = "float32"

    def cases(self) -> list[Case]:
        batch, size = self.options.batch or (None if self.gpu else _CPU_BATCH), self.options.size
        return [problem.case(dtype, batch, size) for problem in PROBLEMS for dtype in self.options.dtypes]

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        return {"problems": _by_problem(results), **super().tables(results)}

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        return {}


def _by_problem(results: Results) -> Table:
    """Medians in milliseconds, a row per case; on a GPU with the published times of the same case."""
    cases: dict[str, Mapping[str, Any]] = {str(row.case): row.case for row in results.timed()}
    on_gpu = results.options["device"].startswith("cuda")
    published = {str(p.case("float32").as_json()): p.published for p in PROBLEMS} if on_gpu else {}
    ours = [name for name, peer in results.peers.items() if peer.ours]
    rows = []
    for key, case in cases.items():
        least = results.fastest(case, ours)
        medians = [results.fastest(case, [name]) for name in results.peers]
        ratios = [
            other / least if least and (other := results.fastest(case, among)) else None
            for among in results.references().values()
        ]
        rows.append((
            f"{case['model']}, {case['batch']} x {case['size']}x{case['size']}",
            *("-" if median is None else f"{1e3 * median:.4g}" for median in medians),
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            *(f"{published[key][mode]:g}" if key in published else "-" for mode in PUBLISHED_FOR),
        ))  # fmt: skip
    header = (
        "milliseconds", *(peer.label for peer in results.peers.values()),
        *(f"dense_ext, {name} = 1" for name in results.references()), *PUBLISHED_FOR.values(),
    )  # fmt: skip
    caption = (
        f"{', '.join(results.options['dtypes'])}, {machine_name(results)}; "
        f"PyTorch {results.versions['torch']}; medians of {results.options['rounds']} rounds"
    )
    title = "forward in training mode without gradients"
    return Table(title, header, rows, caption=caption).without_empty_columns()
