"""Volumes [N, C, D, H, W]: MONAI's three-dimensional DenseNets, and blocks of other shapes, against eager."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets import DenseNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dense_ext
from dense_ext.backends import BACKENDS, CPU
from dense_ext.benchmark.memory import saved_bytes
from dense_ext.memory import Planner

from .helpers import (
    assert_equal,
    assert_trains_alike,
    eager_block,
    eager_transition,
    in_three_dimensions,
    randomize,
    twin,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def network(**options: Any) -> nn.Module:
    """A MONAI DenseNet of two blocks in float64."""
    options = {"init_features": 10, "growth_rate": 5, "block_config": (2, 3), "bn_size": 3} | options
    net = randomize(DenseNet(3, 2, 4, **options)).double()
    # So that ReLU cuts off some windows' maxima; otherwise this bias's gradient would be zero.
    with torch.no_grad():
        if isinstance(net.features.norm0, nn.BatchNorm3d):
            net.features.norm0.bias.sub_(1.5)
    return net


def volumes(*size: int, channels: int = 2) -> Tensor:
    return torch.randn(3, channels, *(size or (24, 36, 28)), dtype=torch.float64)


def test_a_network_trains_as_eager(backend: str, recompute: str) -> None:
    ours, eager = twin(network(), lambda m: dense_ext.swap(m, recompute=recompute, strict=True))
    rows = dense_ext.report(ours).rows
    assert [row.kind for row in rows] == ["stem", "dense block", "transition", "dense block"]
    assert {row.runs for row in rows} == {"fused"}
    expected = backend if BACKENDS[backend].takes_volumes else f"{backend}; PyTorch (3x3x3, pools)"
    assert {row.detail for row in rows} == {expected}
    assert_trains_alike(ours, eager, volumes())
    for model in (ours, eager):
        model.eval()
    x = volumes(33, 26, 31)
    assert_equal(ours(x), eager(x), "output in eval mode")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_memory_formats(memory_format: torch.memory_format, recompute: str) -> None:
    ours, eager = twin(network(), lambda m: dense_ext.swap(m, recompute=recompute))
    ours.to(memory_format=memory_format)  # type: ignore[call-overload]
    assert_trains_alike(ours, eager, volumes().contiguous(memory_format=memory_format), steps=1)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 3), (4, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("bn_size", [2, None])
def test_blocks(size: tuple[int, ...], bn_size: int | None, recompute: str) -> None:
    """With and without a bottleneck, and with sides of a single pixel."""
    block = dense_ext.DenseBlock(3, 6, 5, bn_size, recompute=recompute)
    ours = in_three_dimensions(block)
    eager = dense_ext.modules.EagerDenseBlock(dict(ours.items()))
    x = volumes(*size, channels=6)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in zip((ours, eager), leaves, strict=True)]
    assert_equal(outputs[0], outputs[1], "output")
    assert outputs[0].is_contiguous(memory_format=torch.channels_last_3d)
    grad = torch.randn_like(x[:, :1]) * torch.randn_like(outputs[1])
    gradients = []
    for y, leaf in zip(outputs, leaves, strict=True):
        gradients.append(torch.autograd.grad(y, [leaf, *eager.parameters()], grad))
    for a, b in zip(*gradients, strict=True):
        assert_equal(a, b, "gradient", 1e-8)


@pytest.mark.parametrize("size", [(2, 2, 2), (3, 5, 4), (2, 7, 3)])
def test_transitions(size: tuple[int, ...]) -> None:
    """With odd sides, whose last plane the pool ignores."""
    ours, eager = twin(in_three_dimensions(eager_transition()), dense_ext.swap)
    assert_trains_alike(ours, eager, volumes(*size, channels=6), steps=2)


def frozen(net: nn.Module) -> None:
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.eval()


def without_running_statistics(net: nn.Module) -> None:
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def cumulative(net: nn.Module) -> None:
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.momentum = None


@pytest.mark.parametrize("setting", [frozen, without_running_statistics, cumulative])
def test_batch_norm_settings(setting: Callable[[nn.Module], None]) -> None:
    ours, eager = twin(network(), dense_ext.swap)
    for model in (ours, eager):
        setting(model)
    assert_trains_alike(ours, eager, volumes(), steps=2)


def test_dropout_drops_elements() -> None:
    """The same elements in forward and backward. It uses torchvision's layers, since MONAI drops channels."""
    block = in_three_dimensions(eager_block(drop_rate=0.5))
    dense_ext.swap(block, recompute="block")
    x = volumes(4, 5, 3, channels=6).requires_grad_()

    def run(scaled: Tensor) -> Tensor:
        torch.manual_seed(3)
        return block(scaled)

    y = run(x)
    assert 0.3 < float((y[:, 6:] == 0).double().mean()) < 0.7
    direction = torch.randn_like(x)
    (slope,) = torch.autograd.grad((y.square().sum()), x)
    with torch.no_grad():
        step = 1e-6
        change = run(x + step * direction).square().sum() - run(x - step * direction).square().sum()
    assert float((slope * direction).sum()) == pytest.approx(float(change) / (2 * step), rel=1e-5)


def test_memory_is_linear_in_depth() -> None:
    def kept(layers: int, swapped: bool) -> int:
        block = in_three_dimensions(eager_block(layers, growth_rate=8)).float()
        if swapped:
            dense_ext.swap(block)
        x = torch.randn(2, 6, 4, 6, 5)
        return saved_bytes(block, lambda: block(x).sum())

    ours = [kept(layers, True) for layers in (4, 8, 16)]
    assert ours[2] - ours[1] == pytest.approx(2 * (ours[1] - ours[0]), rel=0.01)
    assert kept(16, False) > 12 * ours[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_exact_than_eager_in_16_bits(dtype: torch.dtype) -> None:
    """Only a block, since PyTorch has no 16-bit pools for volumes on a CPU; averaged as in test_operators."""
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        truth = in_three_dimensions(eager_block(4, growth_rate=8))
        # Start from values that the storage type represents, so that only the computation differs.
        truth.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in truth.state_dict().items()})
        x = volumes(6, 8, 7, channels=6).to(dtype)
        ours, eager = (copy.deepcopy(truth).to(dtype) for _ in range(2))
        dense_ext.swap(ours, strict=True)
        exact, *others = (
            tensors_of_a_step(m, x.to(next(m.parameters()).dtype)) for m in (truth, ours, eager)
        )
        errors = [
            statistics.median(float((a - e).norm() / e.norm()) for a, e in zip(found, exact, strict=True))
            for found in others
        ]
        ratios.append(errors[0] / errors[1])
    assert statistics.geometric_mean(ratios) <= 1.15, ratios


def tensors_of_a_step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    gradients = torch.autograd.grad(y.double().square().sum(), [leaf, *module.parameters()])
    return [tensor.detach().double() for tensor in (y, *gradients)]


def test_every_dtype_under_autocast_is_eagers() -> None:
    """On a CPU autocast pools volumes in float32, so everything after the pool is float32 too."""
    ours, eager = twin(network().float(), dense_ext.swap)
    x = volumes().float()
    dtypes: list[dict[str, torch.dtype]] = []
    for model in (ours, eager):
        seen: dict[str, torch.dtype] = {}
        for name, part in model.features.named_children():
            if name.startswith(("denseblock", "transition", "norm5")):
                part.register_forward_hook(lambda m, i, y, name=name, seen=seen: seen.update({name: y.dtype}))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        dtypes.append(seen | {"output": y.dtype})
        y.float().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert dtypes[0] == dtypes[1]
    assert dtypes[0]["transition1"] == torch.float32


def test_compiled(pytestconfig: pytest.Config) -> None:
    ours, eager = twin(network(), dense_ext.swap)
    # Inductor takes half a minute; test_operators.py has it for images.
    ours.compile(
        fullgraph=True, backend="inductor" if pytestconfig.getoption("--exhaustive") else "aot_eager"
    )
    assert_trains_alike(ours, eager, volumes(), steps=1)


def test_fake_kernels_match_the_operators() -> None:
    seen: dict[Any, tuple[Any, ...]] = {}

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "dense_ext":
                seen.setdefault(func, args)
            return func(*args, **(kwargs or {}))

    with Noting():
        dense_ext.swap(network())(volumes(8, 12, 10).requires_grad_()).sum().backward()
    assert {func._opname for func in seen} >= {"dense_block", "transition", "stem", "stem_backward"}
    for func, args in seen.items():
        torch.library.opcheck(func, detached(args), test_utils=("test_schema", "test_faketensor"))


def detached(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def test_an_empty_batch() -> None:
    block = dense_ext.swap(in_three_dimensions(eager_block()))
    x = torch.empty(0, 6, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = block(x)
    assert y.shape == (0, 21, 3, 4, 5)
    y.sum().backward()
    assert x.grad is not None


def test_an_image_for_volumes_is_refused() -> None:
    block = dense_ext.swap(in_three_dimensions(eager_block()))
    with pytest.raises(ValueError, match=r"must be 5-D \[N, 6, D, H, W\], got shape \(2, 6, 4, 4\)"):
        block(torch.randn(2, 6, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": "instance"}, "norm1 is InstanceNorm3d, not BatchNorm"),
        ({"act": "prelu"}, "relu1 is PReLU, not ReLU"),
    ],
)
def test_parts_that_cannot_be_fused_stay(options: dict[str, Any], reason: str) -> None:
    net = network(**options)
    with pytest.warns(UserWarning, match=reason):
        ours, eager = twin(net, dense_ext.swap)
    x = volumes()
    assert_equal(ours(x), eager(x), "output")


@pytest.mark.skipif(CPU.library.path is None, reason="the C++ backend is not built")
def test_swap_chooses_what_fits() -> None:
    shape, options = (2, 2, 24, 24, 24), {"block_config": (2, 12), "growth_rate": 32}
    planner = Planner(network(**options), shape[1:], optimizer="adamw", channels_last=False)
    for memory, fits in (("1TiB", True), (planner.estimate(2, "none").peak - 1, False)):
        model = dense_ext.swap(network(**options), recompute="auto", input_shape=shape, memory=memory)
        policies = [row.recompute for row in dense_ext.report(model).rows if row.kind == "dense block"]
        assert (policies == ["none"] * 2) == fits
