"""The bytes that each Triton kernel moves, counted from its launch and observed in the interpreter.

The count is the number of *different* addresses that a launch reads, plus those that it writes. That is what
must come from device memory if programs read shared data from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from dense_ext.backends.triton import launch


@dataclass
class Call:
    """One launch: the kernel's numbers and constants by name, and which of its pointers are not None."""

    kernel: str
    grid: tuple[int, ...]
    numbers: dict[str, Any]
    present: set[str]
    itemsize: int

    def __getitem__(self, name: str) -> int:
        """A number by name; sizes given in units are converted to elements."""
        if f"{name}_units" in self.numbers:
            return int(self.numbers[f"{name}_units"] * self.numbers["UNIT"])
        return int(self.numbers[name])

    def bytes(self) -> int:
        """The bytes that the launch moves."""
        return COUNTS[self.kernel](self)


def _partial_moments(call: Call, channels: int) -> int:
    return (2 * channels + 1) * call.grid[1] * 4 if "partials_vec" in call.present else 0


def _channel_stats(c: Call) -> int:
    return c["M"] * c["c"] * c.itemsize + _partial_moments(c, c["c"])


def _merge(c: Call) -> int:
    return ((2 * c["C"] + 1) * c["P"] + 2 * c["C"]) * 4


def _reduce(c: Call) -> int:
    weight = (c["row_size"] - c["sums_size"]) * c.itemsize if "weight_ptr" in c.present else 0
    return c["P"] * c["row_size"] * 4 + (c["sums_size"] * 4 if "sums_vec" in c.present else 0) + weight


def _scale_shift(c: Call) -> int:
    return 6 * c["C"] * 4


def _bn_gradient(c: Call) -> int:
    return (11 if "u_vec" in c.present else 5) * c["C"] * 4


def _affine(c: Call) -> int:
    vectors = 3 if "factor_vec" in c.present else 2
    return 3 * c["M"] * c["c"] * c.itemsize + vectors * c["c"] * 4


def _accumulate(c: Call) -> int:
    return 3 * c["M"] * c["c"] * c.itemsize + c["c"] * 4


def _conv1x1_forward(c: Call) -> int:
    matrices = c["M"] * (c["c"] + c["b"]) + c["b"] * c["c"]
    return matrices * c.itemsize + 2 * c["c"] * 4 + _partial_moments(c, c["b"])


def _conv1x1_fused(c: Call) -> int:
    matrices = c["M"] * (2 * c["b"] + 3 * c["c"]) + c["b"] * c["c"]
    return matrices * c.itemsize + 3 * (c["b"] + c["c"]) * 4 + c.grid[1] * c["row_size"] * 4


def _conv1x1_split(c: Call) -> int:
    matrices = c["M"] * (c["b"] + 3 * c["c"]) + c["b"] * c["c"]
    return matrices * c.itemsize + 3 * c["c"] * 4 + c.grid[1] * c["row_size"] * 4


def _conv3x3_forward(c: Call) -> int:
    matrices = c["M"] * (c["b"] + c["k"]) + 9 * c["b"] * c["k"]
    return matrices * c.itemsize + 2 * c["b"] * 4 + _partial_moments(c, c["k"])


def _conv3x3_backward(c: Call) -> int:
    matrices = c["M"] * (2 * c["b"] + c["k"]) + 9 * c["b"] * c["k"]
    return matrices * c.itemsize + 3 * c["b"] * 4 + c.grid[1] * c["row_size"] * 4


def _windowed(c: Call) -> int:
    """The number of input pixels that lie in a 2x2 window."""
    return 4 * c["Q"]


def _pool_forward(c: Call) -> int:
    matrices = _windowed(c) * c["c"] + c["Q"] * c["k"] + c["c"] * c["k"]
    return matrices * c.itemsize + 2 * c["c"] * 4


def _pool_sums(c: Call) -> int:
    pooled = c["Q"] * c["c"] if "pooled_ptr" in c.present else 0
    matrices = _windowed(c) * c["c"] + c["Q"] * c["k"] + c["c"] * c["k"] + pooled
    return matrices * c.itemsize + 3 * c["c"] * 4 + c.grid[1] * 2 * c["c"] * 4


def _pool_weight(c: Call) -> int:
    return c["Q"] * (c["c"] + c["k"]) * c.itemsize + c.grid[1] * c["c"] * c["k"] * 4


def _pool_data(c: Call) -> int:
    images = c["cells"] // (-(-c["H"] // 2) * -(-c["W"] // 2))
    windows = images * (c["H"] // 2) * (c["W"] // 2)
    matrices = 2 * images * c["H"] * c["W"] * c["c"] + windows * c["k"] + c["c"] * c["k"]
    return matrices * c.itemsize + (4 if "u_vec" in c.present else 2) * c["c"] * 4


def _maxpool_forward(c: Call) -> int:
    images = c["outputs"] // (-(-c["H"] // 2) * -(-c["W"] // 2))
    return (images * c["H"] * c["W"] + c["outputs"]) * c["c"] * c.itemsize + 2 * c["c"] * 4


def _maxpool_backward(c: Call) -> int:
    images = c["cells"] // (-(-c["H"] // 2) * -(-c["W"] // 2))
    passes = 1 + ("grad_x_ptr" in c.present)
    vectors = 3 + 2 * ("u_vec" in c.present) + 2 * c.grid[1] * ("partials_vec" in c.present)
    return (passes * images * c["H"] * c["W"] + c["cells"]) * c["c"] * c.itemsize + vectors * c["c"] * 4


COUNTS: dict[str, Callable[[Call], int]] = {
    "channel_stats_kernel": _channel_stats,
    "merge_moments_kernel": _merge,
    "reduce_partials_kernel": _reduce,
    "bn_scale_shift_kernel": _scale_shift,
    "bn_gradient_kernel": _bn_gradient,
    "affine_gradient_kernel": _affine,
    "scaled_accumulate_kernel": _accumulate,
    "bn_relu_conv1x1_forward_kernel": _conv1x1_forward,
    "bn_relu_conv1x1_backward_fused_kernel": _conv1x1_fused,
    "bn_relu_conv1x1_backward_split_kernel": _conv1x1_split,
    "bn_relu_conv3x3_forward_kernel": _conv3x3_forward,
    "bn_relu_conv3x3_backward_kernel": _conv3x3_backward,
    "bn_relu_pool_conv1x1_forward_kernel": _pool_forward,
    "bn_relu_pool_conv1x1_sums_kernel": _pool_sums,
    "bn_relu_pool_conv1x1_weight_kernel": _pool_weight,
    "bn_relu_pool_conv1x1_data_kernel": _pool_data,
    "bn_relu_maxpool_forward_kernel": _maxpool_forward,
    "bn_relu_maxpool_backward_kernel": _maxpool_backward,
}


@contextmanager
def recorded(patch: pytest.MonkeyPatch, runs: bool) -> Iterator[list[tuple[Call, int | None]]]:
    """Collects launches; if ``runs``, the interpreter runs them and their observed bytes are recorded."""
    calls: list[tuple[Call, int | None]] = []
    bind = launch.Kernel.bind

    def recording(
        self: Any,
        device: int,
        grid: Sequence[int],
        types: Sequence[torch.dtype | None],
        numbers: Sequence[float],
        *args: Any,
        **constants: Any,
    ) -> Callable[..., None]:
        run = bind(self, device, grid, types, numbers, *args, **constants) if runs else None
        names = self.function.arg_names
        present = {name for name, dtype in zip(names, types, strict=False) if dtype is not None}
        values = dict(zip(names[len(types) :], numbers, strict=False))
        matrices = [t.itemsize for n, t in zip(names, types, strict=False) if t and n.endswith("_ptr")]
        call = Call(self.name, tuple(grid), values | constants, present, min(matrices, default=4))

        def launched(*tensors: Any) -> None:
            if run is None:
                calls.append((call, None))
                return
            with counted(patch) as seen:
                run(*tensors)
            calls.append((call, seen()))

        return launched

    patch.setattr(launch.Kernel, "bind", recording)
    launch.forget_plans()
    yield calls
    launch.forget_plans()


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Counts the bytes at different addresses that the interpreter reads and writes."""
    from triton.runtime.interpreter import InterpreterBuilder

    read: list[np.ndarray] = []
    written: list[np.ndarray] = []

    def watch(pointers: Any, mask: Any, into: list[np.ndarray]) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel()
        into.append(np.stack([addresses, np.full(addresses.size, size, addresses.dtype)], axis=1))

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch(pointers, mask, read)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch(pointers, mask, written)
        return store(self, pointers, value, mask, *rest)

    with patch.context() as watching:
        # Loads and stores without a mask call these too.
        watching.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        watching.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        yield lambda: sum(
            int(np.unique(np.concatenate(part), axis=0)[:, 1].sum()) for part in (read, written) if part
        )
