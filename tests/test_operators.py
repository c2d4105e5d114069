"""The operators' interface to PyTorch: schemas, fake kernels, compilation, autocast."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.densenet import DenseNet

import dense_ext
from dense_ext import autograd, ops
from dense_ext.arguments import Arguments, BlockOptions, TransitionOptions
from dense_ext.schedule import RECOMPUTE

from .helpers import assert_same_state, eager_block, randomize, small_densenet, twin

OPS = torch.ops.dense_ext


def test_compiled_autograd() -> None:
    """It traces the backward of a network that is not compiled itself."""
    ours, eager = twin(small_densenet(), dense_ext.swap)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    eager(x).square().mean().backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        ours(x).square().mean().backward()
    assert_same_state(ours, eager)


def arguments(channels: list[int], convs: list[Tensor], frozen: bool, backend: str) -> Arguments:
    norms = [nn.BatchNorm2d(c).double() for c in channels]
    for norm in norms:
        randomize(norm)
    return Arguments(
        [n.weight for n in norms],
        [n.bias for n in norms],
        convs,
        [],
        [n.running_mean for n in norms if frozen],
        [n.running_var for n in norms if frozen],
        [n.eps for n in norms],
        [not frozen] * len(norms),
        "relu",
        "",
        None,
        backend,
    )


def conv(out_channels: int, channels: int, size: int) -> Tensor:
    return torch.randn(out_channels, channels, size, size, dtype=torch.float64, requires_grad=True)


def channels_last(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def block_arguments(frozen: bool, backend: str) -> Arguments:
    convs = [conv(4, 3, 1), conv(2, 4, 3), conv(4, 5, 1), conv(2, 4, 3)]
    return arguments([3, 4, 5, 4], convs, frozen, backend)


@pytest.mark.each_pair
@pytest.mark.parametrize("frozen", [False, True])
class TestOpcheck:
    def test_dense_block(self, backend: str, recompute: str, frozen: bool) -> None:
        args = block_arguments(frozen, backend)
        x = channels_last(2, 3, 4, 3).requires_grad_()
        for drop_rate, seeds in ((0.0, None), (0.5, torch.arange(4))):
            options = BlockOptions(2, 1, seeds, [0.0, drop_rate], False, recompute)
            torch.library.opcheck(OPS.dense_block.default, (x, *args, *options))

    def test_dense_block_backward(self, backend: str, recompute: str, frozen: bool) -> None:
        args, options = (
            block_arguments(frozen, backend),
            BlockOptions(2, 1, None, [0.0] * 2, False, recompute),
        )
        x, grad = channels_last(2, 3, 4, 3), channels_last(2, 7, 4, 3)
        with torch.no_grad():
            out, stats, z = OPS.dense_block(x, *args, *options)
            for needed in ([True] * 4, [True, False, False, True]):
                inputs = (grad.clone(), out, stats, z, *args, *options, 3, needed)
                torch.library.opcheck(OPS.dense_block_backward.default, inputs)
                # PyTorch does not support functionalization of mutating operators that return lists
                tests = ("test_schema", "test_faketensor", "test_autograd_registration")
                torch.library.opcheck(OPS.dense_block_backward_.default, inputs, test_utils=tests)

    @pytest.mark.parametrize("name", ["transition", "stem"])
    def test_transition_and_stem(self, backend: str, name: str, frozen: bool) -> None:
        args = arguments([3], [conv(2, 3, 1)] if name == "transition" else [], frozen, backend)
        x = channels_last(2, 3, 5, 4).requires_grad_()
        forward, backward = getattr(OPS, name).default, getattr(OPS, name + "_backward").default
        options = TransitionOptions("average", [2, 2], None, 0.0, False, None) if name == "transition" else ()
        torch.library.opcheck(forward, (x, *args, *options))
        with torch.no_grad():
            y, stats = forward(x, *args, *options)
            needed = [True] * len(args.conv_weights)
            torch.library.opcheck(backward, (torch.randn_like(y), x.detach(), stats, *args, *options, needed))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_activation(self, backend: str, layout: torch.memory_format, frozen: bool) -> None:
        args = arguments([3], [], frozen, backend)
        x = channels_last(2, 3, 5, 4).contiguous(memory_format=layout).requires_grad_()
        var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
        stats = torch.stack([mean, var])
        torch.library.opcheck(OPS.activation.default, (x, *args, stats))
        with torch.no_grad():
            y, _ = OPS.activation(x, *args, stats)
            assert y.stride() == x.stride()
            inputs = (torch.randn_like(y), x.detach(), stats, *args, None, [])
            torch.library.opcheck(OPS.activation_backward.default, inputs)


@pytest.mark.usefixtures("compiled_fast")
@pytest.mark.parametrize(
    ("recompute", "compiler"),
    [("none", "aot_eager"), ("block", "aot_eager"), ("bottleneck", "inductor")],
)
def test_compiles_without_a_graph_break(recompute: str, compiler: str) -> None:
    net = randomize(DenseNet(5, (2, 1), 8, 3, num_classes=4)).double()
    ours, eager = twin(net, lambda m: dense_ext.swap(m, recompute=recompute))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=compiler)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    for _ in range(2):
        for model in (compiled, eager):
            model(x).square().sum().backward()
    assert_same_state(ours, eager)


def test_constants_are_marked_as_pytorch_marks_them() -> None:
    marked = dense_ext.ops.constant_when_compiled(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(marked[0]) == vars(marked[1]) != {}


def test_compiles_in_eval_and_with_dropout() -> None:
    torch._dynamo.reset()
    model = dense_ext.swap(small_densenet(drop_rate=0.2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    compiled(x).sum().backward()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=0)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_every_dtype_is_that_of_eager(self, backend: str, dtype: torch.dtype) -> None:
        ours, eager = twin(small_densenet().float(), dense_ext.swap)
        x = torch.randn(2, 3, 64, 64)
        seen: dict[str, dict[str, Any]] = {"ours": {}, "eager": {}}
        for label, model in (("ours", ours), ("eager", eager)):
            for name, module in model.features.named_children():
                if name not in ("norm0", "relu0", "pool0"):
                    module.register_forward_hook(
                        lambda m, i, o, n=name, d=seen[label]: d.update({n: (i[0].dtype, o.dtype)})  # type: ignore[misc]
                    )
            with torch.autocast("cpu", dtype):
                y = model(x)
            seen[label]["logits"] = y.dtype
            y.float().square().sum().backward()
            seen[label].update({n: p.grad.dtype for n, p in model.named_parameters()})
        assert seen["ours"] == seen["eager"]

    def test_float32_input_to_a_block_stays_float32(self, backend: str) -> None:
        ours, eager = twin(eager_block().float(), dense_ext.swap)
        x = torch.randn(2, 6, 5, 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == eager(x).dtype == torch.float32

    def test_every_mode_of_a_block_with_float32_input(self, backend: str) -> None:
        """The error is about eager's, compiled and with a backward that can be differentiated again."""
        eager, x = eager_block(6, 16, 8).float(), torch.randn(4, 16, 9, 9)
        exact = _train_step(copy.deepcopy(eager).double(), x.double(), None)
        of_eager = statistics.median(_error(_train_step(eager, x, torch.bfloat16), exact))
        ours = {policy: dense_ext.swap(copy.deepcopy(eager), recompute=policy) for policy in RECOMPUTE}
        compiled = torch.compile(ours["none"], backend="aot_eager", fullgraph=True)
        found = {policy: _train_step(model, x, torch.bfloat16) for policy, model in ours.items()}
        found["compiled"] = _train_step(compiled, x, torch.bfloat16)
        found["differentiable again"] = _train_step(ours["none"], x, torch.bfloat16, create_graph=True)
        for mode, tensors in found.items():
            assert statistics.median(_error(tensors, exact)) <= 1.2 * of_eager, mode

    def test_autocast_does_not_change_float64(self, backend: str) -> None:
        ours, eager = twin(small_densenet(), dense_ext.swap)
        x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == eager(x).dtype


def _error(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The relative L2 distance of each tensor from its float64 twin."""
    return [
        ((a.double() - e).norm() / e.norm()).item()
        for a, e in zip(actual, exact, strict=True)
        if e.norm() > 0
    ]


def _train_step(
    model: nn.Module, x: Tensor, dtype: torch.dtype | None, create_graph: bool = False
) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters; with a dtype, under autocast to it."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(leaf)
    loss = (y.to(torch.float64) ** 2).mean()
    gradients = torch.autograd.grad(loss, [leaf, *model.parameters()], create_graph=create_graph)
    return [tensor.detach() for tensor in (y, *gradients)]


@pytest.mark.parametrize(
    ("storage", "autocast"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, None),
    ],
    ids=["float32", "autocast bfloat16", "autocast float16", "bfloat16"],
)
def test_error_is_no_larger_than_eagers(
    backend: str, storage: torch.dtype, autocast: torch.dtype | None
) -> None:
    """Both errors are against float64; eager runs in channels_last, like a swapped model.

    Single errors are random, since a ReLU mask that flips outweighs all rounding. So the median over a
    model's tensors is averaged over eight models. The averages of equally exact programs then differ by
    about 5 %, and 15 % are allowed.
    """
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        exact = randomize(DenseNet(8, (3, 4), 16, 4, 0.0, num_classes=16)).double()
        # Start from values that the storage type represents, so that only the computation differs.
        exact.load_state_dict({k: v.to(storage).to(v.dtype) for k, v in exact.state_dict().items()})
        x = torch.randn(4, 3, 48, 48).to(storage)
        eager = copy.deepcopy(exact).to(storage, memory_format=torch.channels_last)
        ours = dense_ext.swap(copy.deepcopy(eager))
        truth = _train_step(exact, x.double(), None)
        x = x.contiguous(memory_format=torch.channels_last)
        errors = [statistics.median(_error(_train_step(m, x, autocast), truth)) for m in (ours, eager)]
        ratios.append(errors[0] / errors[1])
    assert statistics.geometric_mean(ratios) <= 1.15, ratios


def test_backends_agree_across_dtypes() -> None:
    names = dense_ext.available_backends("cpu")
    for first, second in itertools.pairwise(names):
        x = torch.randn(2, 6, 9, 7)
        outputs = []
        for name in (first, second):
            with dense_ext.use_backend(name):
                torch.manual_seed(0)
                outputs.append(dense_ext.DenseBlock(3, 6, 5)(x))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


# --- eager calls without the dispatcher --------------------------------------------------------------------


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of an operator, whether it goes without the dispatcher."""
    found: list[bool] = []
    is_eager = autograd._is_eager

    def record(arguments: Sequence[Any]) -> bool:
        found.append(is_eager(arguments))
        return found[-1]

    monkeypatch.setattr(autograd, "_is_eager", record)
    return found


def step(network: nn.Module) -> None:
    network(torch.randn(2, 3, 40, 40, dtype=torch.float64)).square().mean().backward()


def test_eager_calls_go_without_the_dispatcher(directly: list[bool], recompute: str) -> None:
    network = dense_ext.swap(small_densenet(), recompute=recompute)
    step(network)
    network.eval()
    step(network)
    with torch.no_grad():
        network(torch.randn(2, 3, 40, 40, dtype=torch.float64))
    assert len(directly) > 10
    assert all(directly)


@pytest.mark.parametrize("mode", [Passes, profile])
def test_what_observes_calls_sees_the_operators(directly: list[bool], mode: Callable[[], Any]) -> None:
    network = dense_ext.swap(small_densenet())
    with mode():
        step(network)
    assert len(directly) > 10
    assert not any(directly)


def test_a_mode_for_functions_sees_the_operators(directly: list[bool]) -> None:
    network = dense_ext.swap(small_densenet())
    with BaseTorchFunctionMode():
        network(torch.randn(2, 3, 40, 40, dtype=torch.float64))
    assert len(directly) > 5
    assert not any(directly)


class Subclass(Tensor):
    pass


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, device="meta"),
        lambda: torch._to_functional_tensor(torch.ones(3)),
        lambda: torch._neg_view(torch.ones(3)),
        lambda: torch.ones(3).as_subclass(Subclass),
        lambda: torch.ones(3).to_sparse(),
        lambda: torch._efficientzerotensor(3),
        fake,
    ],
    ids=["meta", "functional", "negative", "subclass", "sparse", "zero", "fake"],
)
def test_other_tensors_than_plain_ones_are_found(make: Callable[[], Tensor]) -> None:
    plain = torch.ones(3)
    assert autograd._is_eager((plain, [nn.Parameter(plain)], None, [1.0], [True], "relu"))
    assert not autograd._is_eager((make(), [plain]))


def test_subclasses_among_parameters_are_found() -> None:
    plain = torch.ones(3)
    assert not autograd._is_eager((plain, [plain, plain.as_subclass(Subclass)]))


def test_transforms_are_found() -> None:
    found = []

    def observe(x: Tensor) -> Tensor:
        found.append(autograd._is_eager((x,)))
        return x.sum()

    torch.func.vmap(observe)(torch.ones(2, 3))
    torch.func.grad(observe)(torch.ones(3))
    assert found == [False, False]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_bits_are_those_of_the_operators(
    monkeypatch: pytest.MonkeyPatch, recompute: str, frozen: bool
) -> None:
    args, x = block_arguments(frozen, "auto"), channels_last(2, 3, 4, 3).requires_grad_()
    args = args._replace(norm_weights=[args.norm_weights[0].detach(), *args.norm_weights[1:]])
    learned = [t for t in (x, *itertools.chain.from_iterable(args.tensors)) if t.requires_grad]
    found = []
    for eager in (True, False):
        if not eager:
            monkeypatch.setattr(autograd, "_is_eager", lambda arguments: False)
        out, *_ = ops.CALLS["dense_block"](x, *args, *BlockOptions(2, 1, None, [0.0] * 2, False, recompute))
        gradients = torch.autograd.grad(out.square().sum(), learned)
        found.append([out, *gradients])
    assert all(map(torch.equal, *found))


def test_no_graph_is_recorded_below_autograd() -> None:
    args, x = block_arguments(False, "auto"), channels_last(2, 3, 4, 3).requires_grad_()
    options = BlockOptions(2, 1, None, [0.0] * 2, False, "none")
    with torch._C._AutoDispatchBelowAutograd():
        out, *_ = ops.CALLS["dense_block"](x, *args, *options)
    assert not out.requires_grad
