"""Each primitive on the shapes of a DenseNet: time, and how near to what the machine can do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import BACKENDS
from ...backends.base import Backend
from ...backends.reference import ReferenceBackend
from ...backends.table import TABLE, primitive_of
from ...models import MODELS
from ..errors import UnavailableError
from ..peers import Peer
from ..primitives import PrimitiveCase, model_cases
from ..results import Measurement, PeerLabel, Results
from ..step import DTYPES
from ..tables import Table, shown, times
from ..timing import ColdTimer
from .base import Options, Suite

ATEN = "aten"
_REFERENCE = ReferenceBackend()

Arguments = dict[str, Any]

# What PyTorch's modules do after norm and ReLU, from the activation and the weight.
_AFTER_ACTIVATION: dict[str, Callable[..., Tensor]] = {
    "bn_relu_conv1x1": F.conv2d,
    "bn_relu_conv3x3": partial(F.conv2d, padding=1),
    "bn_relu_pool_conv1x1": lambda activated, weight: F.avg_pool2d(F.conv2d(activated, weight), 2),
    "bn_relu_maxpool": lambda activated: F.max_pool2d(activated, 3, 2, 1),
}


def unfused(primitive: str, tensors: Arguments) -> Callable[[], Sequence[Tensor]]:
    """The primitive as PyTorch's modules do it one by one, batch norm over a dense input included.

    Backward is autograd's of input, norm and weight; its forward has run before. A primitive that
    is no module runs as the reference backend's formula.
    """
    name, _, direction = primitive_of(primitive).rpartition("_")
    if name not in _AFTER_ACTIVATION:
        return partial(_outputs, _REFERENCE, primitive, tensors)
    backward = direction == "backward"

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(backward)

    source = tensors["z" if name == "bn_relu_conv3x3" else "x"]
    x = leaf(source.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last))
    scale, shift = (leaf(tensors[n]) for n in ("scale", "shift"))
    weights = [leaf(tensors["weight"])] if "weight" in tensors else []

    def forward() -> Tensor:
        activated = F.relu(F.batch_norm(x, None, None, scale, shift, training=True))
        return _AFTER_ACTIVATION[name](activated, *weights)

    if not backward:
        return torch.no_grad()(lambda: (forward(),))
    y = forward()
    grad = tensors["grad_bn" if name == "bn_relu_conv1x1" else "grad"].permute(0, 3, 1, 2)
    return lambda: torch.autograd.grad(y, [x, scale, shift, *weights], grad, retain_graph=True)


def _outputs(backend: Backend, primitive: str, tensors: Arguments) -> list[Tensor]:
    """What the primitive writes, by a backend, into its arguments."""
    getattr(backend, primitive)(**tensors)
    return [tensors[name] for name in (*TABLE[primitive].writes, *TABLE[primitive].adds_to)]


def _doubled(tensors: Arguments) -> Arguments:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in tensors.items()}


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative L2 error of the tensors."""
    pairs = zip(got, expected, strict=True)
    errors = [(a.double() - b).norm() / b.norm().clamp_min(1e-300) for a, b in pairs]
    return float(torch.stack(errors).max())  # NaN if one is


def backend_error(backend: str, case: PrimitiveCase, tensors: Arguments) -> float:
    """The backend's error against the reference in float64 on the same numbers."""
    got = _outputs(BACKENDS[backend], case.primitive, copy.deepcopy(tensors))
    return relative_error(got, _outputs(_REFERENCE, case.primitive, _doubled(tensors)))


def unfused_error(case: PrimitiveCase, tensors: Arguments) -> float:
    """The error of what PyTorch does against the same in float64."""
    got = unfused(case.primitive, copy.deepcopy(tensors))()
    return relative_error(got, unfused(case.primitive, _doubled(tensors))())


class PrimitiveSuite(Suite):
    """Every primitive by backend and dtype, beside unfused ATen, on the shapes of networks.

    A backend that is asked for by name is the only one. On a CPU each round goes through all rows, so that
    what a row's samples say of the machine's noise is that of the whole run, not of one moment.
    """

    name = "primitives"
    title = "Primitives"
    summary = "each primitive beside PyTorch's unfused modules and the machine's rates"

    def __init__(self, options: Options, peers: list[Peer], results: Results) -> None:
        super().__init__(options, peers, results)
        backends = BACKENDS if options.backend == "auto" else [options.backend]
        results.peers = {ATEN: PeerLabel("unfused ATen", ours=False)}
        results.peers |= {name: PeerLabel(f"dense_ext, {name}", ours=True) for name in backends}
        self.rounds = 1 if self.gpu else options.rounds  # of one sample each; on a GPU one of all samples
        batch = options.batch or (64 if self.gpu else 2)
        cases: dict[str, PrimitiveCase] = {}  # equal ones once
        for name, size in self.sizes.items():
            for case in model_cases(MODELS[name], batch, size):
                cases.setdefault(f"{case.primitive}{case.shapes}{case.widths}", case)
        self.cases = list(cases.values())

    def ticks(self) -> int:
        return 1 + self.rounds * len(self.cases) * len(self.options.dtypes) * len(self.results.peers)

    def measure(self) -> None:
        self.measure_rates()
        timer, samples = ColdTimer(self.device), self.options.rounds // self.rounds
        for i in range(self.rounds):
            rows = iter(self.results.rows[:])
            for case, dtype in itertools.product(self.cases, self.options.dtypes):
                tensors = case.tensors(DTYPES[dtype], self.device)
                for peer in self.results.peers:
                    self.tick(f"{case.primitive}, {case.where}, {dtype}, {peer}")
                    row = next(rows) if i > 0 else self.new_row(case, dtype, peer)
                    if row.failure is None:
                        with row.failing():
                            call, error = self.call(row, case, tensors)
                            if i == 0:
                                row.measures["relative_error"] = error()
                            row.seconds += timer.samples(call, samples)

    def new_row(self, case: PrimitiveCase, dtype: str, peer: str) -> Measurement:
        shapes = {name: "x".join(map(str, shape)) for name, shape in case.shapes.items() if len(shape) == 4}
        if not shapes:  # of vectors: the first
            shapes = {name: str(shape[-1]) for name, shape in itertools.islice(case.shapes.items(), 1)}
        shape = " ".join(f"{name} {text}" for name, text in shapes.items())
        where = {"primitive": case.primitive, "where": case.where, "shape": shape, "dtype": dtype}
        row = self.row(where, peer)
        row.measures = {
            "minimum_bytes": TABLE[case.primitive].minimum_bytes(case.shapes, DTYPES[dtype]),
            "flops": TABLE[case.primitive].flops(case.shapes),
        }
        return row

    def call(
        self, row: Measurement, case: PrimitiveCase, tensors: Arguments
    ) -> tuple[Callable[[], object], Callable[[], float]]:
        """What is timed of a row, and what gives its error."""
        if row.peer == ATEN:
            return unfused(case.primitive, tensors), partial(unfused_error, case, tensors)
        backend, dtype = BACKENDS[row.peer], DTYPES[str(row.case["dtype"])]
        if reason := backend.unavailable_reason(primitive_of(case.primitive), self.device, dtype):
            raise UnavailableError(reason)
        error = partial(backend_error, row.peer, case, tensors)
        return partial(getattr(backend, case.primitive), **tensors), error

    @classmethod
    def tables(cls, results: Results) -> dict[str, Table]:
        aten = {str(row.case): row.median for row in results.timed() if row.peer == next(iter(results.peers))}

        def speed(row: Measurement) -> str:
            unfused = aten.get(str(row.case))
            return f"{unfused / row.median:.2f}" if unfused else "-"

        def bandwidth(row: Measurement) -> float:
            return float(row.measures["minimum_bytes"]) / row.median

        return {"primitives": Table.of("primitives, from empty caches", results.timed(), {
            "primitive": lambda row: str(row.case["primitive"]),
            "where": lambda row: f"{row.case['where']}: {row.case['shape']}",
            "dtype": lambda row: str(row.case["dtype"]),
            "by": results.label,
            **times("us", lambda seconds: f"{seconds * 1e6:.4g}"),
            "ATen = 1": speed,
            "GB/s at least": lambda row: f"{bandwidth(row) / 1e9:.3g}",
            "of copy": lambda row: f"{bandwidth(row) / results.work['copy_bytes_per_second']:.0%}",
            "GFLOP/s": lambda row: f"{row.measures['flops'] / row.median / 1e9:.4g}",
            "of matmul": lambda row: f"{results.matmul_share(row):.0%}",
            "error": lambda row: shown(row.measures["relative_error"], ".1e", "not finite"),
        }, left=4)}  # fmt: skip
