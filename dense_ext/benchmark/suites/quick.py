"""The default suite: memory and speed of one network's training step, and memory against depth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ...modules import DenseBlock
from ..errors import UsageError
from ..memory import saved_bytes, step_bytes
from ..networks import torchvision_block, torchvision_twin
from ..peers import Peer
from ..results import Measurement, Results
from ..step import DTYPES
from ..tables import EMPTY, Draw, Table, megabytes, ratio_cells, ratio_columns
from .base import Case, Options, failing, model_case, release
from .speed import StepSuite, bytes_and_times

# A block as in the CIFAR networks; a small image, so that 400 layers fit anywhere.
GROWTH_RATE, IN_CHANNELS, SIZE = 12, 24, 8
DEPTHS = (25, 100, 200, 300, 400)


class QuickSuite(StepSuite):
    """A training step of one network, its memory counted on other images than its speed if asked for.

    Raises:
        UsageError: several models or dtypes, or one that torchvision has no twin of.
    """

    name = "quick"
    title = "A training step"
    summary = "memory and speed of a training step of one network, and memory against depth"
    models = ("densenet121",)

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        if len(options.models) > 1 or len(options.dtypes) > 1:
            raise UsageError("--suite quick takes one --model and one --dtype")
        super().__init__(options, peers, results)
        with torch.device("meta"):
            torchvision_twin(self.cases()[0].build(10))  # refuses what torchvision has no twin of

    def cases(self) -> list[Case]:
        options, gpu = self.options, self.gpu
        batch, size = options.batch or (64 if gpu else 16), options.size or (224 if gpu else 128)
        return [model_case((options.models or self.models)[0], size, options.dtypes[0], batch)]

    def memory_case(self) -> Case:
        """What memory is counted on."""
        (case,), options, gpu = self.cases(), self.options, self.gpu
        batch, size = (case.batch, case.size) if gpu else (8, 224)
        return replace(case, batch=options.memory_batch or batch, size=options.memory_size or size)

    def depth_peers(self) -> list[Peer]:
        """One memory format suffices for the memory of a block."""
        plain = [p for p in self.peers if p.mode == "eager" and p.source in ("eager", "memory-efficient")]
        ours = [p for p in self.peers if p.ours and p.mode == "eager"]
        return [*{p.source: p for p in plain}.values(), *ours] if self.options.depth else []

    def ticks(self) -> int:
        memory = 0 if self.memory_case() == self.cases()[0] else len(self.peers)
        return super().ticks() + memory + len(self.depth_peers()) * len(DEPTHS)

    def measure(self) -> None:
        case = self.memory_case()
        if case != self.cases()[0]:
            for peer in self.peers:
                self.tick(f"memory of {peer.name}")
                row = self.row(case.as_json(), peer.name)
                with failing(row):
                    row.measures |= step_bytes(*self.training_step(case, peer))
        super().measure()
        release()
        for peer in self.depth_peers():
            for layers in DEPTHS:
                self.tick(f"{peer.name}, block of {layers} layers")
                row = self.row({
                    "vary": "layers", "layers": layers, "growth_rate": GROWTH_RATE, "batch": 1, "size": SIZE,
                    "bottleneck": 4 * GROWTH_RATE, "dtype": self.options.dtypes[0],
                }, peer.name)  # fmt: skip
                with failing(row):
                    dtype = DTYPES[self.options.dtypes[0]]
                    kept = block_bytes(peer, layers, self.device, dtype, self.options.backend)
                    row.measures["saved_bytes"] = kept

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        return {"memory": _memory(results), **super().tables(results), "depth": _depth(results)}

    @classmethod
    def short_tables(cls, results: Results) -> dict[str, Table]:
        def setting(row: Measurement) -> str:
            versions = f"PyTorch {results.versions['torch']}, timm {results.versions['timm']}"
            return f"{row.case['model']}, {cls.setting(results, row)}; {versions}"

        return {"summary": _summary(results), "peers": bytes_and_times(cls, results, 3, setting)}

    @classmethod
    def figures(cls, results: Results) -> dict[str, Draw]:
        from ..figures import depth_lines, memory_bars, throughput_bars

        found: dict[str, Draw] = {"memory": memory_bars} if results.measured("peak_bytes") else {}
        if results.references():
            found["throughput"] = throughput_bars
        rows = _depth_rows(results)
        return found | {"depth": partial(depth_lines, rows=rows)} if rows else found


def block_bytes(peer: Peer, layers: int, device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Bytes that a block of ``layers`` layers keeps of an image, measured by a forward pass."""
    with torch.device("meta"):
        block: nn.Module
        if peer.recompute is not None:
            backend = peer.backend or backend
            block = DenseBlock(layers, IN_CHANNELS, GROWTH_RATE, recompute=peer.recompute, backend=backend)
        else:
            block = torchvision_block(layers, IN_CHANNELS, GROWTH_RATE, peer.source == "memory-efficient")
    block.to_empty(device=device).to(memory_format=peer.memory_format())  # type: ignore[call-overload]
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data.fill_(0.01)  # the bytes do not depend on the values
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
    by_peer: dict[str, list[Measurement]] = {}
    for row in _depth_rows(results):
        by_peer.setdefault(results.label(row), []).append(row)
    lines = {label: rows for label, rows in by_peer.items() if len(rows) > 1}
    cells = []
    for label, rows in lines.items():
        kept = [row.measures["saved_bytes"] for row in rows]
        slope, r2 = straight_line([int(row.case["layers"]) for row in rows], kept)
        cells.append((label, f"{kept[-1] / 1e6:.2f}", f"{slope / 1e3:.1f}", f"{r2:.6f}"))
    if not cells:
        return EMPTY
    case = max((rows[-1].case for rows in lines.values()), key=lambda case: case["layers"])
    caption = (
        f"growth rate {case['growth_rate']}, bottleneck of {case['bottleneck']} channels; "
        f"{case['size']}x{case['size']} pixels, {case['dtype']}"
    )
    header = ("", f"MB at {case['layers']} layers", "line: kB a layer", "line: R²")
    return Table("memory of one dense block against its depth", header, cells, caption=caption)


def _memory(results: Results) -> Table:
    """Bytes kept for backward and the peak of a step, on the first case they were counted on."""
    rows = results.measured("peak_bytes")
    rows = [row for row in rows if row.case == rows[0].case]
    largest = max(rows, key=lambda row: row.measures["saved_bytes"], default=None)
    eager = next((row for row in rows if row.peer == "eager"), largest)
    if eager is None:
        return EMPTY
    cells = [
        (
            results.label(row), megabytes(row, "saved_bytes", share=int(row.case["batch"])),
            f"{eager.measures['saved_bytes'] / row.measures['saved_bytes']:.1f}",
            megabytes(row, "peak_bytes", share=int(row.case["batch"])),
        )
        for row in rows
    ]  # fmt: skip
    header = ("MB an image", "kept for backward", f"times less than {results.label(eager)}", "peak of a step")
    caption = f"{eager.case['model']}, {QuickSuite.setting(results, eager)}"
    return Table("memory of a training step in MB (1e6 bytes)", header, cells, caption=caption)


def _summary(results: Results) -> Table:
    """Memory and speed of a step by peer, each in its own setting."""
    memory, timed = _memory(results), results.timed()
    if not (memory.rows and timed):
        return EMPTY
    in_memory = {label: cells for label, *cells in memory.rows}
    rows = [
        (label, *in_memory[label], f"{int(row.case['batch']) / row.median:.1f}", *ratio_cells(results, row))
        for row in timed if (label := results.label(row)) in in_memory
    ]  # fmt: skip
    header = ("", "kept for backward, MB an image", memory.header[2], "peak, MB an image", "images/s",
              *ratio_columns(results))  # fmt: skip
    case, versions = timed[0].case, results.versions
    speed = f"{case['batch']} images of {case['size']}x{case['size']}"
    caption = (
        f"memory: {memory.caption}; speed: {speed}, medians of {results.options['rounds']} rounds, "
        f"PyTorch {versions['torch']}"
    )
    return Table("memory and speed of a training step", header, rows, caption=caption)
