"""A training step without dropout neither waits for the GPU nor reads its results.

Dropout is excluded because its seeds are on the host. On a GPU, PyTorch itself refuses calls that wait. On a
CPU no call waits; the tests refuse the operators and Python calls that would wait on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dense_ext
from dense_ext import schedule

from ..helpers import eager_block, small_densenet

# PyTorch's tag for operators that depend on values: item, equal, nonzero, masks as indices; not is_nonzero.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Calls that run no operator if the tensors are already on the host.
COPYING = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
NOTICED = r"copies to the host|reads values|synchronizing"


class NoCopies(TorchFunctionMode):
    """Refuses the calls of ``COPYING``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in COPYING, f"{func.__name__} copies to the host"
        return func(*args, **(kwargs or {}))


class NoReads(TorchDispatchMode):
    """Refuses operators whose results depend on tensors' values."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kernels = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.type.upper()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        reads = func is torch.ops.aten.is_nonzero.default or not READING.isdisjoint(func.tags)
        assert not reads, f"{func} reads values"
        if not func.namespace.startswith("dense_ext"):
            return func(*args, **(kwargs or {}))
        # Modes are off while an operator runs, so call its kernel directly, with both modes on.
        with NoCopies(), self:
            return func.redispatch(self.kernels, *args, **(kwargs or {}))


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Raises if the host waits for the device or, on a CPU, would wait on a GPU."""
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        with NoCopies(), NoReads(device):
            yield
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", ["none", "bottleneck", "block"])
def test_a_training_step_waits_for_nothing(device: torch.device, backend: str, recompute: str) -> None:
    model = dense_ext.swap(
        small_densenet(blocks=(2, 1)).float().to(device), recompute=recompute, backend=backend
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x = torch.randn(2, 3, 17, 16, device=device)
    with nothing_waits(device):
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.nonzero, lambda x: bool(x.sum() > 0)])
def test_waiting_is_noticed(
    device: torch.device,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Tensor], Any],
    where: str,
) -> None:
    """Also inside an operator, and in code that autograd calls."""

    def reading(run: Callable[..., Any], ops: Any, block: Any, x: Tensor, *rest: Any) -> Any:
        read(x)
        return run(ops, block, x, *rest)

    for name in (where, f"plain_{where}"):
        monkeypatch.setattr(schedule, name, partial(reading, getattr(schedule, name)))
    block = dense_ext.swap(eager_block(1).float().to(device), backend=backend)
    x = torch.randn(2, 6, 5, 4, device=device)
    with pytest.raises((AssertionError, RuntimeError), match=NOTICED), nothing_waits(device):
        block(x).sum().backward()
