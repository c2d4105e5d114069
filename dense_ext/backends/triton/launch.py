"""Compiles kernels and launches them.

A *plan* holds everything that a primitive's launch needs besides its tensors: the compiled kernel, the grid
and the numeric arguments. It depends on the shapes, strides, dtype, alignment and device. Building it
chooses the configuration and compiles the kernel, for which Triton has its own cache on disk. Plans are
cached, so that a later call costs a look-up and one call into C per kernel. The binary that runs is the one
that :meth:`Kernel.compile` produces ahead of time for the same architecture: nothing is specialised further
at run time.

If ``TRITON_INTERPRET=1`` is set before Triton is imported, kernels run on the CPU, in Triton's
interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.interpreter import InterpretedFunction

from ..base import gpu_unavailable_reason, tf32_allowed
from . import TritonBackend
from .configs import Config, find_config, has_architecture, shape_class

INTERPRETED: bool = triton.knobs.runtime.interpret

# The maximum number of programs on a grid's second or third axis.
MAX_ON_AXIS = 65535

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Target(NamedTuple):
    """The GPU that kernels are compiled for, and its number of multiprocessors."""

    gpu: GPUTarget
    multiprocessors: int

    @property
    def architecture(self) -> str:
        """The GPU's name in the configuration table: "sm_80" also for others with its tensor instructions."""
        if self.gpu.backend != "cuda":
            return str(self.gpu.arch)
        major = self.gpu.arch // 10
        return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


@functools.cache
def target_of(device: int) -> Target:
    """The GPU with index ``device``; -1 is the interpreter, which uses sm_90's configurations."""
    if device < 0:
        return Target(GPUTarget("cuda", 90, 32), 2)
    with torch.cuda.device(device):
        gpu = triton.runtime.driver.active.get_current_target()
    return Target(gpu, torch.cuda.get_device_properties(device).multi_processor_count)


class Variant(NamedTuple):
    """Everything that a binary of a kernel depends on, besides the GPU."""

    types: tuple[torch.dtype | None, ...]  # of the pointer arguments; None if the argument is None
    numbers: tuple[str, ...]  # Triton's types of the numeric arguments
    alignment: int  # in bytes, of every pointer to activations or weights
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]


class Launch:
    """A compiled kernel with its grid and numeric arguments; call it with the tensors."""

    __slots__ = ("device", "function", "grid", "metadata", "rest", "run")

    def __init__(
        self, kernel: CompiledKernel, device: int, grid: tuple[int, ...], rest: tuple[Any, ...]
    ) -> None:
        self.run, self.function, self.metadata = kernel.run, kernel.function, kernel.packed_metadata
        self.device, self.grid, self.rest = device, grid, rest

    def __call__(self, *tensors: Tensor | None) -> None:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self(*tensors)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        return self.run(
            *self.grid, stream, self.function, self.metadata, None, None, None, *tensors, *self.rest
        )


class Kernel:
    """A Triton function whose parameters are pointers, then numbers, then constants.

    Names of pointers to activations and weights end in ``_ptr``; they have the alignment that the plan found.
    Names of pointers to float32 vectors and partial results end in ``_vec``; they need no alignment.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.name = function.__name__
        self._compiled: dict[tuple[int, Variant], CompiledKernel] = {}

    def compile(self, variant: Variant, gpu: GPUTarget) -> CompiledKernel:
        """The kernel's binary for a GPU. Compiling needs no GPU in the machine."""
        names = self.function.arg_names
        pointers, numbers = len(variant.types), len(variant.numbers)
        signature, constants, attributes = {}, dict(variant.constants), {}
        for i, (name, dtype) in enumerate(zip(names, variant.types, strict=False)):
            if dtype is None:
                signature[name], constants[name] = "constexpr", None
                continue
            signature[name] = f"*{_TYPES[dtype]}"
            if name.endswith("_ptr"):
                attributes[(i,)] = [["tt.divisibility", variant.alignment]]
        signature.update(zip(names[pointers : pointers + numbers], variant.numbers, strict=True))
        signature.update((name, "constexpr") for name in names[pointers + numbers :])
        source = ASTSource(self.function, signature, constants, attributes)
        return triton.compile(source, target=gpu, options=dict(variant.options))

    def bind(
        self,
        device: int,
        grid: Sequence[int],
        types: Sequence[torch.dtype | None],
        numbers: Sequence[int | float],
        alignment: int = 4,
        config: Config | None = None,
        **constants: Any,
    ) -> Callable[..., None]:
        """Returns a function that launches the kernel on ``device`` when called with the tensors."""
        config = config or Config()
        constants |= config.blocks
        if INTERPRETED:
            return self._interpreted(tuple(grid), tuple(numbers), constants)
        kinds = tuple("fp32" if isinstance(n, float) else "i32" for n in numbers)
        order = self.function.arg_names[len(types) + len(numbers) :]
        fixed = tuple((name, constants[name]) for name in order)
        variant = Variant(tuple(types), kinds, alignment, fixed, config.options)
        compiled = self._compiled.get((device, variant))
        if compiled is None:
            with torch.cuda.device(device):
                compiled = self.compile(variant, target_of(device).gpu)
                _ = compiled.run  # reading the attribute loads the binary on the current device
            self._compiled[device, variant] = compiled
        padded = (*grid, 1, 1)[:3]
        return Launch(compiled, device, padded, (*numbers, *(None for _ in fixed)))

    def _interpreted(
        self, grid: tuple[int, ...], numbers: tuple[int | float, ...], constants: dict[str, Any]
    ) -> Callable[..., None]:
        assert isinstance(self.function, InterpretedFunction)
        launcher = self.function[grid]
        return lambda *tensors: launcher(*tensors, *numbers, **constants)


# A list to which `configure` appends the key of each look-up, while it is set; `dense-ext tune` sets it.
looked_up: list[tuple[str, str, str, str]] | None = None

_Planner = TypeVar("_Planner", bound=Callable[..., Any])
_PLANNERS: list[Any] = []


def plan(planner: _Planner) -> _Planner:
    """Cache the plans that the decorated function returns, by its arguments."""
    kept = functools.lru_cache(maxsize=4096)(planner)
    _PLANNERS.append(kept)
    return kept  # type: ignore[return-value]


def forget_plans() -> None:
    """Empty the cache of plans, after configurations changed."""
    for kept in _PLANNERS:
        kept.cache_clear()


# --- parts of plans --------------------------------------------------------------------------------


def configure(kernel: Kernel, device: int, precision: str, sizes: tuple[int, ...]) -> Config:
    """The configuration of a kernel for a problem's sizes."""
    name = kernel.name.removesuffix("_kernel")
    key = name, target_of(device).architecture, precision, shape_class(*sizes)
    config = find_config(*key)
    if looked_up is not None:
        looked_up.append(key)
    return config


def persistent_programs(device: int, pixels: int, config: Config, blocks: int) -> int:
    """How many programs share the tiles of pixels, given ``blocks`` programs on the grid's first axis."""
    tiles = triton.cdiv(pixels, config.blocks["BLOCK_M"])
    at_once = target_of(device).multiprocessors * config.programs_per_multiprocessor
    return max(1, min(tiles, at_once // blocks))


def fp32_precision(dtype: torch.dtype) -> str:
    """The precision in the configuration table: "16bit", or for float32 PyTorch's setting."""
    if dtype != torch.float32:
        return "16bit"
    return "tf32" if torch.version.hip is None and tf32_allowed(dtype) else "ieee"


def dot_precision(precision: str) -> str:
    """Triton's ``input_precision`` for a precision of the table. It has no effect on 16-bit products."""
    return "tf32" if precision == "tf32" else "ieee"


def alignment_of(*views: Tensor, weight: Tensor | None = None) -> int:
    """The alignment in bytes, at most 16, of every pixel's first channel, for all views [N, H, W, C].

    It is the largest power of two that divides the addresses of the views and the weight, the views' pixel
    strides, and their numbers of channels, all in bytes.
    """
    bits = 16 if weight is None else 16 | weight.data_ptr()
    for view in views:
        bits |= view.data_ptr() | (view.shape[3] | view.stride(2)) * view.element_size()
    return bits & -bits


def pixels_of(x: Tensor) -> int:
    """M of x [N, H, W, C].

    Raises:
        ValueError: x has more pixels than 32-bit indices can count.
    """
    n, h, w, _ = x.shape
    pixels, limit = n * h * w, TritonBackend.max_pixels
    if pixels > limit:
        raise ValueError(f"the Triton backend takes up to {limit} pixels, got {pixels} ({list(x.shape)})")
    return pixels


def two_axes(tiles: int) -> tuple[int, int]:
    """The sizes of a grid's second and third axes, for at least ``tiles`` programs in all."""
    rows = max(1, triton.cdiv(tiles, MAX_ON_AXIS))
    return triton.cdiv(tiles, rows), rows


def partial_results(length: int, x: Tensor) -> Tensor:
    """Scratch memory for ``length`` float32 on x's device."""
    return torch.empty(length, dtype=torch.float32, device=x.device)


def dense_1x1(weight: Tensor) -> Tensor:
    """The weight [K, C, 1, 1] in dense [K, C] memory, copied only if it is not."""
    return weight if weight.is_contiguous() else weight.contiguous()


def dense_3x3(weight: Tensor) -> Tensor:
    """The weight [K, B, 3, 3] in dense [K, 3, 3, B] memory, copied only if it is not."""
    layout = torch.channels_last
    return weight if weight.is_contiguous(memory_format=layout) else weight.contiguous(memory_format=layout)


def zero(*outputs: Tensor | None) -> None:
    """Write zeros to the outputs: sums over no pixels."""
    for output in outputs:
        if output is not None:
            output.zero_()


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels can't run on tensors of ``dtype`` on ``device``, or None if they can."""
    if INTERPRETED:
        if device.type != "cpu":
            return "TRITON_INTERPRET is set: kernels run in the interpreter, on the CPU"
        # Triton 3.6's interpreter computes tl.dot of bfloat16 wrongly.
        return "the interpreter does not compute in bfloat16" if dtype == torch.bfloat16 else None
    return _can_compile(device.index)


@functools.cache
def _can_compile(device: int | None) -> str | None:
    if reason := gpu_unavailable_reason(device):
        return reason
    try:
        architecture = target_of(torch.cuda.current_device() if device is None else device).architecture
    except Exception as error:  # the first use compiles Triton's driver stub, which can fail in any way
        return f"Triton can't compile here: {type(error).__name__}: {error}"
    return None if has_architecture(architecture) else f"has no configurations for {architecture}"
