"""Runs a whole DenseNet through the GPU backends' kernels.

Triton's kernels run in its interpreter and CUDA's in the emulator, or both on a GPU; see ``--device``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dense_ext
from dense_ext.backends.triton import launch
from dense_ext.schedule import RECOMPUTE

from ..emulator import SHARED_BYTES, emulator
from ..helpers import BackwardBuffers, eager_block, eager_transition, in_three_dimensions, small_densenet

STEPS = 2
BLOCKS = (2, 1)  # their layers: an interpreted or emulated one takes seconds


@pytest.fixture(params=SHARED_BYTES)
def architecture(
    request: pytest.FixtureRequest, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Run a test with the choices for each kind of GPU; on a GPU, only once with its own."""
    architecture = str(request.param)
    if device.type == "cuda":
        if request.param_index > 0:
            pytest.skip("a GPU has one architecture")
    elif backend == "cuda":
        emulator().settings.shared_bytes = SHARED_BYTES[architecture]
    elif architecture == "sm_86":
        pytest.skip("has sm_80's configurations")
    elif architecture == "sm_80" and not request.config.getoption("--exhaustive"):
        pytest.skip("tests/triton/test_traffic.py runs its configurations, a kernel at a time")
    else:
        monkeypatch.setattr(launch.Target, "architecture", architecture)
        launch.forget_plans()
    yield architecture
    launch.forget_plans()


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs and input gradients of some SGD steps, and the parameters and buffers at the end.

    The steps are small, since each large step would multiply a rounding error by a thousand.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (F.softplus(y) * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
        found += [y.detach(), leaf.grad]
        optimizer.step()
    state = [value.detach() for value in model.state_dict().values() if value.is_floating_point()]
    return [tensor.double() for tensor in (*found, *state)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The relative L2 distances between tensors."""
    return [((a - e).norm() / e.norm()).item() for a, e in zip(found, exact, strict=True) if e.norm() > 0]


@pytest.mark.parametrize("recompute", ["none", "bottleneck"])
def test_blocks_and_transitions_of_volumes(device: torch.device, backend: str, recompute: str) -> None:
    """Their 1x1x1 convolutions, statistics and sums run in the kernels, as images of D*H rows."""
    exact = nn.Sequential(eager_block(growth_rate=6), eager_transition(24, 8), eager_block(2, 8, 6))
    exact = in_three_dimensions(exact).to(device)
    eager = copy.deepcopy(exact).float()
    ours = dense_ext.swap(copy.deepcopy(eager), recompute=recompute, backend=backend, strict=True)
    x = torch.randn(2, 6, 5, 9, 7, device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth = train(exact, x.double())
        medians = [statistics.median(errors(train(model, x), truth)) for model in (ours, eager)]
    assert medians[0] <= 2 * medians[1]


@pytest.mark.usefixtures("architecture")
def test_trains_as_exactly_as_eager(device: torch.device, backend: str) -> None:
    """In float32 with float32 products, the median error over tensors is at most twice eager's.

    Errors are taken against float64. The ratio of two equally exact programs scatters with the rounding,
    especially in this network, whose last norms are over two values. Its mean over draws scatters less.
    """
    ratios = []
    for seed, recompute in enumerate(RECOMPUTE):  # whose bits are the same, as another test shows
        torch.manual_seed(seed)
        exact = small_densenet(growth_rate=6, blocks=BLOCKS).to(device)
        eager = copy.deepcopy(exact).float()
        ours = dense_ext.swap(copy.deepcopy(eager), recompute=recompute, backend=backend)
        x = torch.randn(2, 3, 17, 16, device=device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            truth = train(exact, x.double())
            mine, theirs = errors(train(ours, x), truth), errors(train(eager, x), truth)
        assert all(row.runs == "fused" for row in dense_ext.report(ours).rows)
        ratios.append(statistics.median(mine) / statistics.median(theirs))
        # A single tensor with a much larger error would be a mistake that the median hides.
        assert max(mine) <= 10 * max(theirs)
    assert statistics.geometric_mean(ratios) <= 2, ratios


@pytest.mark.usefixtures("architecture")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_as_exact_as_eagers(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Compares the errors of a block's and a transition's outputs and gradients against float64.

    It uses several draws and a few hundred pixels, because in a whole small network a single ReLU mask that
    flips outweighs all rounding. Equally exact programs then differ by some percent.
    """
    if reason := dense_ext.backends.unavailable_reasons(device, dtype)[backend]:
        pytest.skip(reason)
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        exact = nn.Sequential(eager_block(2, 16, 8, bn_size=4), eager_transition(32, 16)).to(device)
        exact.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in exact.state_dict().items()})
        eager = copy.deepcopy(exact).to(dtype, memory_format=torch.channels_last)
        ours = copy.deepcopy(eager)
        for module in ours:
            dense_ext.swap(module, backend=backend)
        x, weights = (
            torch.randn(2, 16, 14, 14, device=device).to(dtype),
            torch.randn(2, 16, 7, 7, device=device),
        )
        found = []
        for model, leaf in ((exact, x.double()), (eager, x), (ours, x)):
            leaf = leaf.clone(memory_format=torch.channels_last).requires_grad_()
            y = model(leaf)
            (y.double() * weights).sum().backward()
            grads = [leaf.grad, *(p.grad for p in model.parameters())]
            found.append([tensor.detach().double() for tensor in (y, *grads)])
        truth, theirs, mine = found
        means = [statistics.geometric_mean(errors(tensors, truth)) for tensors in (mine, theirs)]
        ratios.append(means[0] / means[1])
    assert statistics.geometric_mean(ratios) <= 1.15, ratios


@pytest.mark.usefixtures("architecture")
def test_every_policy_gives_the_same_bits(device: torch.device, backend: str) -> None:
    model = small_densenet(blocks=BLOCKS).float().to(device)
    x = torch.randn(2, 3, 17, 16, device=device)
    results = []
    for policy in ("none", "bottleneck", "block"):
        ours = dense_ext.swap(copy.deepcopy(model), recompute=policy, backend=backend)
        ours(x).square().sum().backward()
        results.append([p.grad for p in ours.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_that_nobody_else_holds_is_the_buffer(device: torch.device, backend: str) -> None:
    """It is found by reference counts, which on a GPU are taken in autograd's own thread."""
    block = dense_ext.swap(eager_block().float().to(device), backend=backend)
    # A block by itself returns a copy, in the memory format of its input.
    y = block(torch.randn(2, 6, 5, 4, device=device).contiguous(memory_format=torch.channels_last))
    pointers: list[int] = []
    y.register_hook(lambda g: pointers.append(g.data_ptr()))
    loss = (y * torch.randn_like(y)).sum()
    with BackwardBuffers() as buffers:
        loss.backward()
    assert buffers.pointers == pointers


@pytest.mark.usefixtures("architecture")
def test_eval_and_dropout(device: torch.device, backend: str) -> None:
    model = small_densenet(drop_rate=0.3, blocks=BLOCKS).float().to(device)
    ours = dense_ext.swap(copy.deepcopy(model), backend=backend)
    x = torch.randn(2, 3, 17, 16, device=device)
    ours(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    ours, model = dense_ext.swap(copy.deepcopy(model).eval(), backend=backend), model.eval()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)


def strided_norm_vectors(model: nn.Module) -> None:
    """Make weight, bias and running statistics columns of one table, so that they have strides."""
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        table = torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var], 1).detach()
        norm.weight, norm.bias = nn.Parameter(table[:, 0]), nn.Parameter(table[:, 1])
        norm.running_mean, norm.running_var = table[:, 2], table[:, 3]


def permuted_weights(model: nn.Module) -> None:
    for conv in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        conv.weight = nn.Parameter(conv.weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))


def unchanged(model: nn.Module) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "recompute", "training"),
    [
        (strided_norm_vectors, "bottleneck", True),
        (strided_norm_vectors, "bottleneck", False),
        (permuted_weights, "bottleneck", True),
        (unchanged, "none", True),  # X and z return in contiguous memory
        (unchanged, "bottleneck", True),
        (unchanged, "block", True),  # the block's input does
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_layouts_change_no_bits(
    device: torch.device, backend: str, change: Callable[[nn.Module], None], recompute: str, training: bool
) -> None:
    """The layouts of parameters, statistics and saved tensors; hooks return the last contiguous."""
    parts = nn.Sequential(eager_block(2, 8, 8, bn_size=2), eager_transition(24, 8)).float().to(device)
    usual = dense_ext.swap(parts.train(training), recompute=recompute, backend=backend)
    strided = copy.deepcopy(usual)
    change(strided)
    x = torch.randn(2, 8, 6, 5, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    usual(leaves[0]).square().sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        y = strided(leaves[1])
    y.square().sum().backward()
    found, expected = (
        [leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()]
        for model, leaf in zip((strided, usual), leaves[::-1], strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
