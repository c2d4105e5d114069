"""Each primitive on the shapes of a DenseNet: time, and how near to what the machine can do."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...backends import BACKENDS
from ...backends.base import Backend, accumulate_dtype
from ...backends.reference import ReferenceBackend
from ...backends.table import TABLE, Shape, primitive_of
from ...models import MODELS, DenseNet
from ...modules import DenseBlock, FusedFeatures, Transition
from ..errors import UnavailableError
from ..peers import Peer
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


@dataclass(frozen=True)
class PrimitiveCase:
    """One call of a primitive in a DenseNet."""

    primitive: str
    where: str  # in the network, e.g. "block 1, layer 6"
    shapes: dict[str, Shape]  # of its tensor arguments
    widths: dict[str, int] = field(default_factory=dict)  # of buffers that arguments are slices of

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | float | int]:
        """The arguments of a call: random, of order one."""
        generator = torch.Generator(device).manual_seed(0)
        scalars: dict[str, Tensor | float | int] = {**TABLE[self.primitive].scalars}
        return scalars | {name: self._tensor(name, dtype, device, generator) for name in self.shapes}

    def _tensor(
        self, name: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Tensor:
        shape = self.shapes[name]
        if len(shape) < 4:
            vector = torch.rand(shape, device=device, generator=generator, dtype=accumulate_dtype(dtype))
            # Repeated calls may feed on their own output (grad_bn and grad are scratch): it keeps its size.
            small = name in ("z_u", "z_v", "u", "v")
            return torch.ones_like(vector) if name == "z_scale" else vector * 1e-3 if small else vector + 0.5
        wide = (*shape[:-1], self.widths.get(name, shape[-1]))
        values = torch.randn(wide, device=device, generator=generator)
        if name.endswith("weight"):
            values /= math.sqrt(math.prod(shape[1:]))
        return values.to(dtype)[..., : shape[-1]]


def _case(primitive: str, where: str, slices: dict[str, int], **sizes: Shape) -> PrimitiveCase:
    """A call by the sizes of its arguments' dimensions; those in ``slices`` are of buffers so wide."""
    return PrimitiveCase(primitive, where, TABLE[primitive].shapes(**sizes), slices)


def _block_cases(where: str, block: DenseBlock, shape: Shape) -> Iterator[PrimitiveCase]:
    """The first, the middle and the last layer, and what a block does once."""
    *p, c0 = shape[0], *shape[2:], shape[1]
    parameters = [p for p in next(iter(block.values())).parameters() if p.dim() == 4]
    growth, bottleneck = parameters[-1].shape[0], parameters[0].shape[0] if len(parameters) == 2 else 0
    width = c0 + len(block) * growth  # of the buffer that layers read slices of, and write one to

    def case(primitive: str, slices: str = "", layer: str = "", **sizes: int) -> PrimitiveCase:
        channels = {name: (size,) for name, size in sizes.items()}
        return _case(primitive, where + layer, dict.fromkeys(slices.split(), width), p=tuple(p), **channels)

    yield case("channel_stats", "x", c=c0)
    yield case("affine_gradient", "grad x", c=c0)
    for i in sorted({0, len(block) // 2, len(block) - 1}):
        layer, c = f", layer {i + 1}", c0 + i * growth
        yield case("bn_scale_shift", layer=layer, c=c)
        yield case("bn_gradient", layer=layer, c=c)
        if bottleneck:
            yield case("bn_relu_conv1x1_forward", "x", layer, c=c, b=bottleneck)
            yield case("bn_relu_conv1x1_backward", "x grad_x", layer, c=c, b=bottleneck)
        else:
            yield case("scaled_accumulate", "out", layer, c=c)
        read, inner = ("", bottleneck) if bottleneck else ("z ", c)
        yield case("bn_relu_conv3x3_forward", read + "y", layer, c=inner, k=growth)
        yield case("bn_relu_conv3x3_backward", read + "grad y", layer, c=inner, k=growth)


def _pool_cases(where: str, shape: Shape, out_channels: int | None = None) -> Iterator[PrimitiveCase]:
    """A transition's calls, or without ``out_channels`` the stem's."""
    n, c, h, w = shape
    if out_channels is None:
        pool, q = "bn_relu_maxpool", (n, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    else:
        pool, q = "bn_relu_pool_conv1x1", (n, h // 2, w // 2)
    for direction in ("forward", "norm_backward"):
        yield _case(f"{pool}_{direction}", where, {}, p=(n, h, w), q=q, c=(c,), k=(out_channels or c,))


def model_cases(build: Callable[[], DenseNet], batch: int, size: int) -> list[PrimitiveCase]:
    """The calls of a training step's primitives, of the first, middle and last layer of each block.

    Args:
        build: makes the network, which is run on tensors without memory to see its shapes.
        batch, size: images, and their height and width in pixels.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # input and output
    with FakeTensorMode(), torch.no_grad():
        model = build()
        for name, module in model.features.named_children():
            if isinstance(module, DenseBlock | Transition) or name == "conv0":
                module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
        model(torch.empty(batch, 3, size, size))
    found: list[PrimitiveCase] = []
    for name, (x, y) in seen.items():
        module = model.features.get_submodule(name)
        if isinstance(module, DenseBlock):
            found += _block_cases(name.replace("denseblock", "block "), module, tuple(x.shape))
        elif isinstance(module, Transition):
            weight = next(p for p in module.parameters() if p.dim() == 4)
            where = name.replace("transition", "transition ")
            found += _pool_cases(where, tuple(x.shape), weight.shape[0])
        elif name == "conv0" and isinstance(model.features, FusedFeatures):
            found += _pool_cases("stem", tuple(y.shape))
    return found


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
