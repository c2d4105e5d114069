"""Compares a model with its eager twin, and runs programs in processes of their own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.densenet import DenseNet, _DenseBlock, _Transition

# The relative error within which float64 results count as equal to eager's. It is far above rounding (1e-16
# times the longest sum of about 1e4 terms, through some tens of layers) and far below any algebraic mistake.
RELATIVE = 1e-9

ROOT = Path(__file__).resolve().parent.parent


def randomize(module: nn.Module) -> nn.Module:
    """Give norms weights, biases and running statistics like those of a trained network.

    Initial ones (weight 1, bias 0) hide mistakes and make some gradients exactly zero.
    """
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.3)
            if m.running_mean is not None:
                m.running_mean.normal_(std=0.3)
                m.running_var.uniform_(0.5, 1.5)
    return module


def small_densenet(
    drop_rate: float = 0.0, bn_size: int = 3, growth_rate: int = 5, blocks: tuple[int, ...] = (2, 3, 1, 2)
) -> nn.Module:
    """A torchvision DenseNet in float64 with four blocks, one of which has a single layer."""
    net = DenseNet(growth_rate, blocks, 8, bn_size, drop_rate, num_classes=4)
    return randomize(net).double()


def eager_block(
    layers: int = 3, channels: int = 6, growth_rate: int = 5, bn_size: int = 2, drop_rate: float = 0.0
) -> nn.Module:
    """A torchvision dense block in float64."""
    return randomize(_DenseBlock(layers, channels, bn_size, growth_rate, drop_rate)).double()


def eager_transition(channels: int = 6, out_channels: int = 3) -> nn.Module:
    """A torchvision transition in float64."""
    return randomize(_Transition(channels, out_channels)).double()


_FOR_VOLUMES: dict[type[nn.Module], Any] = {
    nn.BatchNorm2d: nn.BatchNorm3d, nn.Conv2d: nn.Conv3d, nn.AvgPool2d: nn.AvgPool3d,
}  # fmt: skip


def in_three_dimensions(module: nn.Module) -> nn.Module:
    """The module in float64, with its norms, convolutions and pools replaced by those for volumes."""
    for parent in module.modules():
        for name, child in parent.named_children():
            kind = _FOR_VOLUMES.get(type(child))
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, kind(child.num_features))
            elif isinstance(child, nn.Conv2d):
                sizes = child.kernel_size[0], child.stride[0], child.padding[0]
                setattr(parent, name, kind(child.in_channels, child.out_channels, *sizes, bias=False))
            elif kind is not None:
                setattr(parent, name, kind(child.kernel_size, child.stride, child.padding))
    return randomize(module).double()


def assert_equal(
    actual: Tensor | None,
    expected: Tensor | None,
    what: str,
    relative: float = RELATIVE,
    rounding: float = 1e-30,
) -> None:
    """Assert that both are None, or equal in dtype and shape, and in values.

    The values' error may be ``relative`` of the largest expected value, or ``rounding`` if that is larger.
    """
    if expected is None or actual is None:
        assert actual is expected, f"{what}: one of the two is None"
        return
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), what
        return
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max().item()
    bound = max(relative * expected.abs().max().item(), rounding)
    assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"


def assert_same_state(actual: nn.Module, expected: nn.Module, relative: float = RELATIVE) -> None:
    """Assert equal parameters, gradients and buffers, with the same names in the same order.

    A bias before a norm has no gradient but rounding, which is compared with the largest gradient.
    """
    assert list(actual.state_dict()) == list(expected.state_dict())
    gradients = [p.grad for p in expected.parameters() if p.grad is not None and p.grad.numel()]
    largest = max([0.0, *(float(gradient.abs().max()) for gradient in gradients)])
    for (name, a), (_, e) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert_equal(a.detach(), e.detach(), name, relative)
        rounding = 1e-4 * relative * largest if name.endswith("bias") else 1e-30
        assert_equal(a.grad, e.grad, f"gradient of {name}", relative, rounding)
    for (name, a), (_, e) in zip(actual.named_buffers(), expected.named_buffers(), strict=True):
        assert_equal(a, e, name, relative)


def assert_trains_alike(
    actual: nn.Module, expected: nn.Module, x: Tensor, steps: int = 3, relative: float = RELATIVE
) -> None:
    """Assert equal outputs, gradients, parameters, buffers and counters through steps of SGD."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (actual, expected)]
    weights = None
    for step in range(steps):
        outputs, grads = [], []
        for model, optimizer in zip((actual, expected), optimizers, strict=True):
            optimizer.zero_grad()
            leaf = x.detach().clone().requires_grad_()
            y = model(leaf)
            if weights is None:
                weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
            (F.softplus(y) * weights).sum().backward()
            outputs.append(y.detach())
            grads.append(leaf.grad)
        assert_equal(outputs[0], outputs[1], f"output of step {step}", relative)
        assert_equal(grads[0], grads[1], f"input gradient of step {step}", relative)
        assert_same_state(actual, expected, relative)
        for optimizer in optimizers:
            optimizer.step()


def second_derivative(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the squared norm of the input's gradient, for the loss that squares the output."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), leaf)[0]


def twin(module: nn.Module, change: Callable[[nn.Module], object]) -> tuple[nn.Module, nn.Module]:
    """A copy of ``module`` to which ``change`` has been applied, and ``module`` itself."""
    other = copy.deepcopy(module)
    change(other)
    return other, module


class BackwardBuffers(TorchDispatchMode):
    """Records the addresses of the gradients that blocks' backwards may overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.pointers: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.dense_ext.dense_block_backward_.default:
            self.pointers.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    """Records the names of the dense_ext operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "dense_ext":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def run_python(*arguments: object) -> str:
    """Runs Python in a process of its own, which finds dense_ext here; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(*command: object) -> str:
    """Runs a program in two processes; returns what they print."""
    return run_python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)
