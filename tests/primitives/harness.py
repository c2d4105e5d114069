"""Tests a primitive: compares a backend with the reference in float64, on equal inputs.

Inputs are chosen so that scale*x + shift is exact in every accumulation type and never zero. Then all
backends agree on every ReLU mask, and only rounding differs. Tensors are slices of wider ones, outputs
hold NaN before they are written, and a call must not change a single bit except in its outputs.
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

# The channels of the wider tensor on either side of a slice; and the same for a 16-byte aligned slice.
GUARD, ALIGNED = 3, 8

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass
class Case:
    """One call of a primitive.

    Attributes:
        primitive: the primitive's name, or a key of ``THROUGH_NORM``.
        arguments: the arguments by name, including the outputs.
        lengths: for each output, the number of rounded terms in the sum that makes one value.
        statistics: (mean, var, of): outputs that are the moments of another output, as stored.
        scratch: arguments that the call may overwrite.
        first: the first call of a method that a backend inherits from the base class; it stores intermediate
            values in outputs of the same names.
    """

    primitive: str
    arguments: dict[str, Any]
    lengths: dict[str, int]
    statistics: tuple[str, str, str] | None = None
    scratch: tuple[str, ...] = ()
    first: Case | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype, or that of the weights if it is narrower: products round both to it."""
        dtypes = {v.dtype for v in self.arguments.values() if isinstance(v, Tensor)}
        return min(dtypes, key=lambda dtype: dtype.itemsize)

    def run(self, backend: Backend) -> dict[str, Tensor]:
        """Call the backend; returns the outputs by name."""
        getattr(backend, self.primitive)(**self.arguments)
        names = [*self.lengths, *(self.statistics or ())[:2]]
        return {n: self.arguments[n] for n in names if self.arguments[n] is not None}

    def copy(self, dtype: torch.dtype | None = None) -> Case:
        """The case with every tensor copied: with the same strides, or dense, of ``dtype`` and on the CPU."""

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
        special: whether to put NaN and infinities into the activations.
        guard: the number of channels on either side of a slice.
        weights: the dtype of convolution weights if it is not the activations'.
    """

    dtype: torch.dtype
    device: torch.device
    special: bool = False
    guard: int = GUARD
    weights: torch.dtype | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def accumulate(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.float64)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _slice(self, values: Tensor) -> Tensor:
        """The values as a slice in the middle of a wider tensor of random numbers."""
        wide = self._normal(*values.shape[:-1], values.shape[-1] + 2 * self.guard)
        inside = slice(self.guard, self.guard + values.shape[-1])
        wide[..., inside] = values
        return wide.to(self.device, self.dtype)[..., inside]

    def activations(self, *shape: int) -> Tensor:
        """Activations [N, ..., C]: multiples of 1/16 up to 4, which are exact in every dtype."""
        values = self._integers(-64, 64, *shape) / 16
        if self.special:  # away from the border: a kernel may or may not multiply by the padding's zeros
            for i, value in enumerate((math.nan, math.inf, -math.inf)):
                values[(0, *(side // 2 for side in shape[1:-1]), 7 + 11 * i)] = value
        return self._slice(values)

    def gradients(self, *shape: int) -> Tensor:
        """Gradients [N, H, W, C], normally distributed."""
        return self._slice(self._normal(*shape))

    def unwritten(self, *shape: int) -> Tensor:
        """An output [N, H, W, C], filled with NaN."""
        return self._slice(torch.full(shape, math.nan, dtype=torch.float64))

    def scale(self, channels: int) -> Tensor:
        """A scale [C]: multiples of 1/4 of both signs."""
        values = self._integers(1, 8, channels) / 4 * (self._integers(0, 1, channels) * 2 - 1)
        return values.to(self.device, self.accumulate)

    def shift(self, channels: int) -> Tensor:
        """A shift [C]: odd multiples of 1/128, so that scale*x + shift is never zero."""
        values = self._integers(-16, 16, channels) / 16 + 1 / 128
        return values.to(self.device, self.accumulate)

    def vector(self, *shape: int, positive: bool = False) -> Tensor:
        """A per-channel vector."""
        values = self._normal(*shape)
        return (values.abs() + 0.1 if positive else values).to(self.device, self.accumulate)

    def unwritten_vector(self, *shape: int) -> Tensor:
        """An output [C], filled with NaN."""
        return torch.full(shape, math.nan, device=self.device, dtype=self.accumulate)

    def weight(self, out: int, channels: int, *window: int, channels_last: bool = False) -> Tensor:
        """A convolution's weight, scaled to keep activations of order one."""
        values = self._normal(out, channels, *window) / math.sqrt(channels * math.prod(window))
        weight = values.to(self.device, self.weights or self.dtype)
        return weight.contiguous(memory_format=torch.channels_last) if channels_last else weight

    def unwritten_like(self, weight: Tensor) -> Tensor:
        """An output with the weight's shape and strides, filled with NaN."""
        return torch.full_like(weight, math.nan)


def through_norm(case: Case, make: Maker) -> Case:
    """The case of the backward pass through a norm that used the batch's statistics."""
    arguments = dict(case.arguments)
    del arguments["sums"]
    channels = arguments["grad_x"].shape[-1]
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


# --- checks ------------------------------------------------------------------------------------


def base_of(tensor: Tensor) -> Tensor:
    """The tensor this is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def same_view(tensor: Tensor, base: Tensor) -> Tensor:
    """The view of ``base`` that corresponds to ``tensor`` as a view of its own base."""
    if tensor._base is None:
        return base
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, also where they are NaN."""
    bits = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def tolerance(dtype: torch.dtype, length: int, operands: torch.dtype | None = None) -> float:
    """The relative error that rounding explains for a sum of ``length`` terms stored in ``dtype``.

    A store rounds to nearest, with an error of at most half an eps. The rounding errors of a sum are random
    and of either sign, so relative to the result they grow with the square root of the length (Higham,
    Accuracy and Stability, section 2.8). If both factors of a product were first rounded to ``operands``,
    each term is off by at most one eps of that type, again at random. The terms have either sign too, so
    relative to the result that is one eps, whatever the length.
    """
    store = torch.finfo(dtype).eps / 2
    rounded = 0.0 if operands is None else torch.finfo(operands).eps
    return store + rounded + math.sqrt(length + 4) * torch.finfo(accumulate_dtype(dtype)).eps


def assert_close(what: str, got: Tensor, expected: Tensor, tol: float) -> None:
    """Compare each element relative to the largest value, and the relative L2 error; NaN and inf agree."""
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
    """Assert that ``mean`` and ``var`` are the moments of x [N, ..., C] over its pixels."""
    x = x.double().flatten(0, -2)
    if not x.isfinite().all():
        assert torch.equal(var.isfinite(), x.isfinite().all(0)), f"{what}: NaN in other places"
        return
    tol = tolerance(mean.dtype, len(x))
    true_var, true_mean = torch.var_mean(x, dim=0, correction=0)
    mean_error = (mean.double() - true_mean).abs()
    size = x.square().mean(0).sqrt()
    assert (mean_error <= tol * size).all(), f"{what}: mean off by {mean_error.max():.3e}"
    # An error of d in the mean adds d^2 to the variance.
    var_error = (var.double() - true_var).abs()
    assert (var_error <= tol * true_var + (tol * size) ** 2).all(), f"{what}: variance"


def assert_as_exact_as_eager(what: str, mean: Tensor, var: Tensor, x: Tensor) -> None:
    """Assert that ``mean`` and ``var`` of x [N, H, W, C] are off by at most twice as much as eager's.

    Eager's are those of contiguous images on a CPU, which it sums in double. Where they happen to be nearly
    exact, the bound is that of a sum whose length adds nothing: a store, and a few roundings of each term.
    """
    eager = torch.batch_norm_update_stats(x.to(mean.dtype).movedim(-1, 1).contiguous(), None, None, 0.0)
    x = x.double().flatten(0, -2)
    true_var, true_mean = torch.var_mean(x, dim=0, correction=0)
    tol, size = tolerance(mean.dtype, 0), x.square().mean(0).sqrt()
    # A mean that is off by its own rounding d adds d^2 to the variance, eager's too.
    floors = tol * size, tol * true_var + (tol * size).square()
    for name, got, its, true, floor in zip(
        ("mean", "variance"), (mean, var), eager, (true_mean, true_var), floors, strict=True
    ):
        error, allowed = (got.double() - true).abs(), 2 * (its.double() - true).abs().max()
        assert (error <= floor.clamp(min=allowed)).all(), f"{what}: {name} off by {error.max():.3e}"


def check_values(backend: Backend, case: Case) -> None:
    """Assert that the backend's outputs equal the reference's, and that it changed nothing else."""
    expected = case.copy(torch.float64).run(ReferenceBackend())
    before = case.copy()
    outputs = case.run(backend)
    operands = _operands(case) if backend.rounds_operands(case.dtype) else None
    inherited = getattr(type(backend), case.primitive) is getattr(Backend, case.primitive, None)
    first = case.first.copy(torch.float64).run(ReferenceBackend()) if case.first and inherited else {}

    for name, length in case.lengths.items():
        if name in outputs:
            tol = tolerance(outputs[name].dtype, length, operands)
            if name in first:  # the first call has rounded an intermediate value before
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
    """The size of a relative to b, by the largest value or the norm, ignoring NaN and inf."""
    a, b = (t[t.isfinite()] for t in (a, b))
    if not a.any() or not b.any():
        return 0.0
    return max((a.abs().max() / b.abs().max()).item(), (a.norm() / b.norm()).item())


def _operands(case: Case) -> torch.dtype:
    """The dtype to whose precision the factors of products are rounded; tf32 has float16's precision."""
    return torch.float16 if tf32_allowed(case.dtype) else case.dtype


def check_repeats(backend: Backend, case: Case, done: Case) -> None:
    """Assert that the case gives the same bits as one that is done and had the same inputs."""
    for name, output in case.run(backend).items():
        assert equal_bits(output, done.arguments[name]), f"{case.primitive} {name} differs"


def skip_unless_volumes(backend: Backend) -> None:
    """Skip a test of volumes for a backend that does not take them."""
    if not backend.takes_volumes:
        pytest.skip(f"{backend.name} takes images alone")


def check_op(backend: Backend, case: Case) -> None:
    """Assert that the op of a compiled backend's primitive passes torch.library.opcheck."""
    if isinstance(backend, CompiledBackend) and case.primitive in backend.library.names:
        op = backend.library.op(case.primitive)
        given = {**case.arguments, "tf32": False}
        torch.library.opcheck(op, tuple(given[argument.name] for argument in op._schema.arguments))


def check_refuses(backend: Backend, case: Case, name: str, value: Tensor | None, message: str) -> None:
    """Assert that a compiled backend refuses the case with ``value`` for the argument ``name``."""
    if not isinstance(backend, CompiledBackend):
        pytest.skip(f"{backend.name} leaves checking to its caller")
    wrong = case.copy()
    device = next(v.device for v in case.arguments.values() if isinstance(v, Tensor))
    wrong.arguments[name] = None if value is None else value.to(device)
    with pytest.raises(RuntimeError, match=message):
        wrong.run(backend)
