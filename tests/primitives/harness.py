"""How a primitive is tested: a backend against the reference in float64, on equal inputs.

Inputs are made so that scale*x + shift is exact in every accumulation type and never zero: then
all backends agree on every ReLU mask, and what differs is rounding alone. Tensors are slices of
wider ones, outputs hold NaN before they are written, and after a call nothing but the outputs may
have changed, to the bit.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dense_ext.backends.base import Backend, accumulate_dtype, tf32_allowed
from dense_ext.backends.compiled import CompiledBackend
from dense_ext.backends.reference import ReferenceBackend

# Channels of the wider tensor on either side of a slice; of one that begins and ends at 16 bytes.
GUARD, ALIGNED = 3, 8

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass
class Case:
    """One call of a primitive.

    Attributes:
        primitive: its name, or that of what a backend makes of several.
        arguments: by name, the outputs among them.
        lengths: of each output, how many rounded terms a value is the sum of.
        statistics: (mean, var, of): outputs that are the moments of another output, as stored.
        scratch: arguments the call may destroy.
        first: what a backend may call first, and then go on with its outputs of the same names.
    """

    primitive: str
    arguments: dict[str, Any]
    lengths: dict[str, int]
    statistics: tuple[str, str, str] | None = None
    scratch: tuple[str, ...] = ()
    first: Case | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        dtypes = {v.dtype for v in self.arguments.values() if isinstance(v, Tensor)}
        return min(dtypes, key=lambda dtype: dtype.itemsize)

    def run(self, backend: Backend) -> dict[str, Tensor]:
        """Call the backend; the outputs by name."""
        getattr(backend, self.primitive)(**self.arguments)
        names = [*self.lengths, *(self.statistics or ())[:2]]
        return {n: self.arguments[n] for n in names if self.arguments[n] is not None}

    def copy(self, dtype: torch.dtype | None = None) -> Case:
        """The same with every tensor copied, with its strides or as a dense one of ``dtype`` on the CPU."""

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if dtype is not None:
                return value.to("cpu", dtype).clone(memory_format=torch.contiguous_format)
            return same_view(value, base_of(value).clone())

        arguments = {name: copied(value) for name, value in self.arguments.items()}
        return dataclasses.replace(self, arguments=arguments)


@dataclass
class Maker:
    """Makes the tensors of a case.

    Attributes:
        special: put NaN and infinities into the activations.
        guard: channels on either side of a slice.
    """

    dtype: torch.dtype
    device: torch.device
    special: bool = False
    guard: int = GUARD
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def accumulate(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.float64)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _slice(self, values: Tensor) -> Tensor:
        """The values in the middle of a wider tensor of random numbers."""
        wide = self._normal(*values.shape[:-1], values.shape[-1] + 2 * self.guard)
        inside = slice(self.guard, self.guard + values.shape[-1])
        wide[..., inside] = values
        return wide.to(self.device, self.dtype)[..., inside]

    def activations(self, *shape: int) -> Tensor:
        """[N, H, W, C] multiples of 1/16 up to 4: exact in every dtype."""
        values = self._integers(-64, 64, *shape) / 16
        if self.special:  # away from the border, whose zeros a kernel may or may not multiply by
            for i, value in enumerate((math.nan, math.inf, -math.inf)):
                values[0, shape[1] // 2, shape[2] // 2, 7 + 11 * i] = value
        return self._slice(values)

    def gradients(self, *shape: int) -> Tensor:
        """[N, H, W, C], normally distributed."""
        return self._slice(self._normal(*shape))

    def unwritten(self, *shape: int) -> Tensor:
        """[N, H, W, C] of NaN, for an output."""
        return self._slice(torch.full(shape, math.nan, dtype=torch.float64))

    def scale(self, channels: int) -> Tensor:
        """Multiples of 1/4, of both signs."""
        values = self._integers(1, 8, channels) / 4 * (self._integers(0, 1, channels) * 2 - 1)
        return values.to(self.device, self.accumulate)

    def shift(self, channels: int) -> Tensor:
        """Odd multiples of 1/128: scale*x + shift, x and scale as above, is never zero."""
        values = self._integers(-16, 16, channels) / 16 + 1 / 128
        return values.to(self.device, self.accumulate)

    def vector(self, *shape: int, positive: bool = False) -> Tensor:
        """A per-channel vector."""
        values = self._normal(*shape)
        return (values.abs() + 0.1 if positive else values).to(self.device, self.accumulate)

    def unwritten_vector(self, *shape: int) -> Tensor:
        """A per-channel vector of NaN, for an output."""
        return torch.full(shape, math.nan, device=self.device, dtype=self.accumulate)

    def weight(self, out: int, channels: int, size: int, channels_last: bool = False) -> Tensor:
        """A convolution's weight, scaled to keep activations of order one."""
        values = self._normal(out, channels, size, size) / math.sqrt(channels * size * size)
        weight = values.to(self.device, self.dtype)
        return weight.contiguous(memory_format=torch.channels_last) if channels_last else weight

    def unwritten_like(self, weight: Tensor) -> Tensor:
        """A weight of NaN with the same strides, for an output."""
        return torch.full_like(weight, math.nan)


def through_norm(case: Case, make: Maker) -> Case:
    """The case of a backward pass through a norm of the batch's statistics."""
    arguments = dict(case.arguments)
    del arguments["sums"]
    channels = arguments["grad_x"].shape[3]
    arguments |= {
        "var": make.vector(channels, positive=True),
        "norm_weight": make.vector(channels),
        "eps": 1e-5,
        "grad_norm_weight": make.unwritten_vector(channels),
        "grad_norm_bias": make.unwritten_vector(channels),
    }
    lengths = {name: length for name, length in case.lengths.items() if name != "sums"}
    # u and v are sums over all pixels.
    lengths |= dict.fromkeys(("grad_x", "grad_norm_weight", "grad_norm_bias"), case.lengths["sums"])
    return Case(case.primitive.replace("_backward", "_norm_backward"), arguments, lengths, first=case)


# --- what is checked ---------------------------------------------------------------------------


def base_of(tensor: Tensor) -> Tensor:
    """The tensor this is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def same_view(tensor: Tensor, base: Tensor) -> Tensor:
    """The part of ``base`` that ``tensor`` is of its own base."""
    if tensor._base is None:
        return base
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; NaN may equal NaN."""
    bits = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def tolerance(dtype: torch.dtype, length: int, operands: torch.dtype | None = None) -> float:
    """What rounding explains: a store in ``dtype`` of a sum of ``length`` terms.

    A store rounds to nearest, off by half an eps at most. The rounding errors of a sum are random
    and of either sign: relative to the result they grow with the square root of the length
    (Higham, Accuracy and Stability, section 2.8). Where both factors of a product were rounded to
    ``operands`` first, each term is off by an eps of it at the most, again at random: relative to
    the result, whose terms are of either sign too, that is an eps whatever the length.
    """
    store = torch.finfo(dtype).eps / 2
    rounded = 0.0 if operands is None else torch.finfo(operands).eps
    return store + rounded + math.sqrt(length + 4) * torch.finfo(accumulate_dtype(dtype)).eps


def assert_close(what: str, got: Tensor, expected: Tensor, tol: float) -> None:
    """Relative to the largest value, for each element, and relative L2; NaN and inf must agree."""
    got = got.double()
    assert got.shape == expected.shape, what
    assert torch.equal(got.isnan(), expected.isnan()), f"{what}: NaN in other places"
    assert torch.equal(got[got.isinf()], expected[expected.isinf()]), f"{what}: other infinities"
    finite = expected.isfinite()
    error, size = (got - expected)[finite], expected[finite]
    if size.numel() == 0:
        return
    largest = size.abs().max().item()
    assert error.abs().max().item() <= tol * largest, (
        f"{what}: off by {error.abs().max():.3e}, of at most {largest:.3e}, tolerance {tol:.1e}"
    )
    assert error.norm().item() <= tol * size.norm().item(), f"{what}: relative L2 error"


def assert_moments(what: str, mean: Tensor, var: Tensor, x: Tensor) -> None:
    """``mean`` and ``var`` are the moments of x [N, H, W, C] over its pixels."""
    x = x.double().flatten(0, 2)
    if not x.isfinite().all():
        assert torch.equal(var.isfinite(), x.isfinite().all(0)), f"{what}: NaN in other places"
        return
    tol = tolerance(mean.dtype, len(x))
    true_var, true_mean = torch.var_mean(x, dim=0, correction=0)
    mean_error = (mean.double() - true_mean).abs()
    size = x.square().mean(0).sqrt()
    assert (mean_error <= tol * size).all(), f"{what}: mean off by {mean_error.max():.3e}"
    # A mean off by d adds d^2 to the variance.
    var_error = (var.double() - true_var).abs()
    assert (var_error <= tol * true_var + (tol * size) ** 2).all(), f"{what}: variance"


def check_values(backend: Backend, case: Case) -> None:
    """The backend's outputs are the reference's, and it changed nothing else."""
    expected = case.copy(torch.float64).run(ReferenceBackend())
    before = case.copy()
    outputs = case.run(backend)
    operands = _operands(case) if backend.rounds_operands else None
    inherited = getattr(type(backend), case.primitive) is getattr(Backend, case.primitive, None)
    first = case.first.copy(torch.float64).run(ReferenceBackend()) if case.first and inherited else {}

    for name, length in case.lengths.items():
        if name in outputs:
            tol = tolerance(outputs[name].dtype, length, operands)
            if name in first:  # rounded once before, in another size
                tol += torch.finfo(outputs[name].dtype).eps / 2 * _ratio(first[name], expected[name])
            assert_close(f"{case.primitive} {name}", outputs[name].cpu(), expected[name], tol)
    if case.statistics is not None and case.statistics[0] in outputs:
        mean, var, of = (case.arguments[name] for name in case.statistics)
        assert_moments(f"{case.primitive} {case.statistics[0]}", mean, var, of)

    for name, value in case.arguments.items():
        if isinstance(value, Tensor) and name not in case.scratch:
            now, then = base_of(value).clone(), base_of(before.arguments[name]).clone()
            if name in outputs:
                same_view(value, now).zero_()
                same_view(value, then).zero_()
            assert equal_bits(now, then), f"{case.primitive} wrote outside its outputs: {name}"


def _ratio(a: Tensor, b: Tensor) -> float:
    """The size of a in that of b, by the largest value or the norm; NaN and inf aside."""
    a, b = (t[t.isfinite()] for t in (a, b))
    if not a.any() or not b.any():
        return 0.0
    return max((a.abs().max() / b.abs().max()).item(), (a.norm() / b.norm()).item())


def _operands(case: Case) -> torch.dtype:
    """What the factors of products are rounded to; tf32 has as many bits as float16."""
    return torch.float16 if tf32_allowed(case.dtype) else case.dtype


def check_repeats(backend: Backend, case: Case) -> None:
    """The same inputs give the same bits."""
    again = case.copy()
    first, second = case.run(backend), again.run(backend)
    for name in first:
        assert equal_bits(first[name], second[name]), f"{case.primitive} {name} differs"


def check_op(backend: Backend, case: Case) -> None:
    """The op behind a compiled backend's primitive passes torch.library.opcheck."""
    if isinstance(backend, CompiledBackend) and case.primitive in backend.library.names:
        op = backend.library.op(case.primitive)
        given = {**case.arguments, "tf32": False}
        torch.library.opcheck(op, tuple(given[argument.name] for argument in op._schema.arguments))


def check_refuses(backend: Backend, case: Case, name: str, value: Tensor | None, message: str) -> None:
    """A compiled backend refuses the case with ``value`` for the argument ``name``."""
    if not isinstance(backend, CompiledBackend):
        pytest.skip(f"{backend.name} leaves checking to its caller")
    wrong = case.copy()
    device = next(v.device for v in case.arguments.values() if isinstance(v, Tensor))
    wrong.arguments[name] = None if value is None else value.to(device)
    with pytest.raises(RuntimeError, match=message):
        wrong.run(backend)
