"""The default suite: memory and speed of one network's training step, and memory against depth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ...models import DenseNet
from ..errors import UsageError
from ..memory import saved_bytes
from ..networks import image_size, torchvision_twin
from ..peers import Peer
from ..results import Measurement, Results, by_peer
from ..step import DTYPES
from ..tables import EMPTY, Table, images_per_second, megabytes, ratios
from .base import Options, release
from .speed import TimedSuite

# A block as in the CIFAR networks; a small image, so that 400 layers fit anywhere.
GROWTH_RATE, IN_CHANNELS, SIZE = 12, 24, 8
DEPTHS = (25, 100, 200, 300, 400)


class QuickSuite(TimedSuite):
    """A training step of one network, and the memory of one block against its depth.

    Unless told what to measure on, a CPU counts the step's memory on other images than it times.

    Raises:
        UsageError: several models or dtypes, or one that torchvision has no twin of.
    """

    name = "quick"
    title = "A training step"
    summary = "memory and speed of a training step of one network, and memory against depth"
    models = ("densenet121",)
    batches = (16,), (64,)

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        if len(options.models) > 1 or len(options.dtypes) > 1:
            raise UsageError("--suite quick takes one --model and one --dtype")
        super().__init__(options, peers, results)
        (self.case,), (name,) = self.cases(), self.sizes
        self.memory_case = self.case
        if not (self.gpu or options.batch or options.size):
            self.memory_case = replace(self.case, batch=8, size=image_size(name))
        with torch.device("meta"):
            torchvision_twin(self.case.build(10))  # refuses what torchvision has no twin of
        # One memory format suffices for the memory of a block.
        plain = {
            p.source: p for p in peers if p.mode == "eager" and p.source in ("eager", "memory-efficient")
        }
        ours = [peer for peer in peers if peer.ours and peer.mode == "eager"]
        self.depth_peers = [*plain.values(), *ours] if options.depth else []

    def ticks(self) -> int:
        counted = len(self.peers) if self.memory_case != self.case else 0
        return super().ticks() + counted + len(self.depth_peers) * len(DEPTHS)

    def measure(self) -> None:
        if self.memory_case != self.case:
            for peer in self.peers:
                self.count(self.memory_case, peer)
        super().measure()
        release()
        for peer in self.depth_peers:
            for layers in DEPTHS:
                self.tick(f"{peer.name}, block of {layers} layers")
                row = self.row({
                    "vary": "layers", "layers": layers, "growth_rate": GROWTH_RATE, "batch": 1, "size": SIZE,
                    "bottleneck": 4 * GROWTH_RATE, "dtype": self.case.dtype,
                }, peer.name)  # fmt: skip
                with row.failing():
                    kept = block_bytes(
                        peer, layers, self.device, DTYPES[self.case.dtype], self.options.backend
                    )
                    row.measures["saved_bytes"] = kept

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        return {"summary": _summary(results), **super().tables(results), "depth": _depth(results)}


def block_bytes(peer: Peer, layers: int, device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Bytes that a block of ``layers`` layers keeps of an image, measured by a forward pass."""
    model = DenseNet(GROWTH_RATE, (layers,), IN_CHANNELS, small_inputs=True)
    network = peer.build(model, device, backend)
    block = network.get_submodule("features.denseblock1")
    # A block's input comes from a convolution, which under autocast gives ``dtype``.
    x = peer.images(torch.rand(1, IN_CHANNELS, SIZE, SIZE, device=device, dtype=dtype)).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return saved_bytes(block, lambda: block(x))


def straight_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and R^2, the share of the variance that it explains."""
    return statistics.linear_regression(xs, ys).slope, statistics.correlation(xs, ys) ** 2


def _depth_rows(results: Results) -> list[Measurement]:
    return [row for row in results.measured("saved_bytes") if "layers" in row.case]


def _depth(results: Results) -> Table:
    """The lines through memory against depth."""
    by_depth = [rows for rows in by_peer(_depth_rows(results)).values() if len(rows) > 1]
    if not by_depth:
        return EMPTY
    case = max((rows[-1].case for rows in by_depth), key=lambda case: case["layers"])

    def line(rows: list[Measurement]) -> tuple[float, float]:
        layers = [int(row.case["layers"]) for row in rows]
        return straight_line(layers, [row.measures["saved_bytes"] for row in rows])

    return Table.of("memory of one dense block against its depth", by_depth, {
        "": lambda rows: results.label(rows[-1]),
        f"MB at {case['layers']} layers": lambda rows: megabytes("saved_bytes", ".2f")(rows[-1]),
        "line: kB a layer": lambda rows: f"{line(rows)[0] / 1e3:.1f}",
        "line: R²": lambda rows: f"{line(rows)[1]:.6f}",
    }, caption=f"growth rate {case['growth_rate']}, bottleneck of {case['bottleneck']} channels; "
               f"{case['size']}x{case['size']} pixels, {case['dtype']}")  # fmt: skip


def _summary(results: Results) -> Table:
    """Memory of a step by peer, on the first case that it was counted on, and speed, in its own setting."""
    rows = results.measured("peak_bytes")
    rows = [row for row in rows if row.case == rows[0].case]
    most = max(rows, key=lambda row: row.measures["saved_bytes"], default=None)
    eager = next((row for row in rows if row.peer == "eager"), most)
    if eager is None:
        return EMPTY
    kept, timed = eager.measures["saved_bytes"], {row.peer: row for row in results.timed()}

    def of_timed(cell: Callable[[Measurement], str]) -> Callable[[Measurement], str]:
        return lambda row: cell(timed[row.peer]) if row.peer in timed else "-"

    caption = f"memory: {results.setting(eager.case)}"
    if timed:
        case = next(iter(timed.values())).case
        caption += f"; speed: {case['batch']} images of {results.sides(case)}, medians of "
        caption += f"{results.options['rounds']} rounds, PyTorch {results.versions['torch']}"
    speed = {"images/s": images_per_second, **ratios(results)}
    return Table.of("memory and speed of a training step", rows, {
        "": results.label, "kept for backward, MB an image": megabytes("saved_bytes", per_image=True),
        f"times less than {results.label(eager)}": lambda row: f"{kept / row.measures['saved_bytes']:.1f}",
        "peak, MB an image": megabytes("peak_bytes", per_image=True),
        **{name: of_timed(cell) for name, cell in speed.items()},
    }, caption=caption)  # fmt: skip
