"""Weights packed once for inference: same bits, every change noticed, nothing kept alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import densenet121
from torchvision.ops.misc import FrozenBatchNorm2d

import dense_ext
from dense_ext import ops, packing
from dense_ext.backends import CPU

from .helpers import Calls, assert_equal, randomize, small_densenet
from .integrations.common import in_graph

pytestmark = pytest.mark.skipif(CPU.library.path is None, reason="the C++ backend is not built")
PACKED, UNPACKED = "packed_dense_block", "dense_block"


@pytest.fixture
def model() -> Any:
    return dense_ext.pack_weights(dense_ext.swap(small_densenet().eval(), strict=True))


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of channels of each block whose weights are packed."""
    found: list[int] = []
    keep = packing.keep

    def counted(norms: Sequence[Any], *rest: Any) -> None:
        if len(norms) > 1:
            found.append(norms[0].num_features)
        keep(norms, *rest)

    monkeypatch.setattr(packing, "keep", counted)
    return found


def images(size: int = 40) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    """The output, and the operators of blocks that ran."""
    with Calls() as calls:
        y = model(x)
    return y, [name for name in calls.names if name in (PACKED, UNPACKED)]


def test_packed_once_with_the_same_bits(model: nn.Module, packings: list[int]) -> None:
    x = images()
    expected, names = run(dense_ext.swap(small_densenet_of(model)), x)
    assert names == [UNPACKED] * 4
    for size in (40, 40, 33):
        y, names = run(model, images(size))
        assert names == [PACKED] * 4
        assert size != 40 or torch.equal(y, expected)
    assert len(packings) == 4


def small_densenet_of(model: nn.Module) -> nn.Module:
    other = small_densenet().eval()
    other.load_state_dict(model.state_dict())
    return other


def second_layer(model: Any) -> Any:
    return model.features.denseblock2.denselayer2


def step(model: Any) -> None:
    with torch.no_grad():
        second_layer(model).conv1.weight.mul_(1.5)


def load(model: Any) -> None:
    model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def train(model: Any) -> None:
    model.train()(images(33))
    model.eval()


def other_parameter(model: Any) -> None:
    conv = second_layer(model).conv2
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def attribute(model: Any) -> None:
    """Python finds it before the parameter of its name."""
    conv = second_layer(model).conv2
    conv.__dict__["weight"] = conv.weight.detach() * 2


def other_memory(model: Any) -> None:
    conv = second_layer(model).conv2
    conv.weight.data = conv.weight.data * 2


def other_strides(model: Any) -> None:
    conv = second_layer(model).conv2
    conv.weight.data = conv.weight.data.transpose(2, 3)


def other_module(model: Any) -> None:
    layer, norm = second_layer(model), copy.deepcopy(second_layer(model).norm2)
    nn.init.constant_(norm.weight, 3.0)
    layer.norm2 = norm


def other_layer(model: Any) -> None:
    layer = copy.deepcopy(second_layer(model))
    nn.init.normal_(layer.conv1.weight, generator=torch.Generator().manual_seed(3))
    model.features.denseblock2.denselayer2 = layer


def fused_step(model: Any) -> None:
    """A fused optimizer does not count its writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(images()).square().sum().backward()
    version = second_layer(model).conv1.weight._version
    optimizer.step()
    assert second_layer(model).conv1.weight._version == version


def eager_training(model: Any) -> None:
    """PyTorch's batch norm does not count its writes to running statistics."""
    norm, x = second_layer(model).norm1, images()
    version = norm.running_mean._version
    with dense_ext.restored(model):
        model.train()(x)
    assert norm.running_mean._version == version
    model.eval()


def statistics(model: Any) -> None:
    second_layer(model).norm1.running_var.add_(1.0)


def other_statistics(model: Any) -> None:
    norm = second_layer(model).norm1
    norm.running_mean = norm.running_mean + 1.0


def eps(model: Any) -> None:
    second_layer(model).norm1.eps = 0.5


def no_weight(model: Any) -> None:
    second_layer(model).norm1.weight = None


NOTICED = [
    step, fused_step, load, train, eager_training, other_parameter, attribute, other_memory, other_strides,
    other_module, other_layer, statistics, other_statistics, eps, no_weight,
]  # fmt: skip


@pytest.mark.parametrize("change", NOTICED, ids=lambda f: f.__name__)
def test_a_change_is_noticed(change: Callable[[Any], None], model: nn.Module, packings: list[int]) -> None:
    before, _ = run(model, images())
    change(model)
    y, names = run(model, images())
    with dense_ext.restored(model):
        eager, _ = run(model, images())
    torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-12)
    assert not torch.equal(y, before)
    assert names == [PACKED] * 4
    assert packings.count(model.features.denseblock2.denselayer1.norm1.num_features) == 2
    assert torch.equal(run(model, images())[0], y)
    assert len(packings) < 9  # the blocks are not packed at every call


def bias(model: Any) -> None:
    second_layer(model).conv2.bias = nn.Parameter(torch.ones(5, dtype=torch.float64))


def hook(model: Any) -> None:
    second_layer(model).conv2.register_forward_hook(lambda module, args, y: y * 2)


def parametrization(model: Any) -> None:
    parametrize.register_parametrization(second_layer(model).conv2, "weight", nn.Softplus())


def batch_statistics(model: Any) -> None:
    second_layer(model).norm2.train()


def dropout(model: Any) -> None:
    second_layer(model).train()
    second_layer(model).drop_rate = 1.0


@pytest.mark.filterwarnings("ignore:.*runs its original forward")
@pytest.mark.parametrize(
    "change", [bias, hook, parametrization, batch_statistics, dropout], ids=lambda f: f.__name__
)
def test_what_packed_weights_cannot_serve_runs_without_them(
    change: Callable[[Any], None], model: nn.Module
) -> None:
    run(model, images())
    change(model)
    y, names = run(model, images())
    with dense_ext.restored(model):
        eager, _ = run(model, images())
    torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-12)
    assert names.count(PACKED) == 3


def test_a_change_while_weights_are_packed_is_noticed(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread may make it."""
    keep = packing.keep

    def change_and_keep(norms: Any, *rest: Any) -> None:
        monkeypatch.setattr(packing, "keep", keep)
        with torch.no_grad():
            norms[0].weight.mul_(2.0)
        keep(norms, *rest)

    monkeypatch.setattr(packing, "keep", change_and_keep)
    run(model, images())
    y, _ = run(model, images())
    with dense_ext.restored(model):
        eager, _ = run(model, images())
    torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-12)


def test_uncounted_changes_of_statistics_are_seen(model: nn.Module, packings: list[int]) -> None:
    second_layer(model).norm1.num_batches_tracked = None
    for _ in range(2):
        run(model, images())
    assert packings.count(model.features.denseblock2.denselayer1.norm1.num_features) == 2


def test_a_transition_with_fewer_channels(model: Any) -> None:
    """Pruned in place, as some tools do."""
    transition = model.features.transition1
    x = torch.rand(1, transition.norm.num_features, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        transition(x)
        transition.conv.weight.data = transition.conv.weight.data[:3]
        y = transition(x)
        with dense_ext.restored(model):
            torch.testing.assert_close(y, model.features.transition1(x), rtol=1e-9, atol=1e-12)


def test_an_image_too_small_for_a_transition_is_refused() -> None:
    """Also by the operator itself, which is all that a compiled program has."""
    transition = dense_ext.pack_weights(dense_ext.Transition(8, 4).eval())
    norm, state = transition.norm, transition.state_dict()
    vectors = [[state[f"norm.{name}"]] for name in ("weight", "bias", "running_mean", "running_var")]
    convs = [[state["conv.weight"]], []]
    rest = (*vectors[:2], *convs, *vectors[2:], [norm.eps], [False], "relu", "", None, "auto")
    with torch.no_grad():
        packed = torch.ops.dense_ext.pack_transition(*rest)
        with pytest.raises(RuntimeError, match="at least 2 pixels per side, got 1"):
            torch.ops.dense_ext.packed_transition(torch.rand(1, 8, 1, 5), packed, 4)


def test_a_write_through_data_needs_another_call(model: nn.Module) -> None:
    """PyTorch does not count it, as the docstring says."""
    before, _ = run(model, images())
    second_layer(model).conv1.weight.data.mul_(2.0)
    dense_ext.pack_weights(model)
    y, _ = run(model, images())
    expected, _ = run(dense_ext.swap(small_densenet_of(model)), images())
    assert torch.equal(y, expected)
    assert not torch.equal(y, before)


def test_replaced_memory_is_kept_until_the_next_call(model: nn.Module) -> None:
    """An address is how a new `.data` is noticed, and a freed one might be used again."""
    run(model, images())
    weight = second_layer(model).conv1.weight
    memory = weight.untyped_storage()._weak_ref()
    weight.data = weight.data * 2
    assert not torch.UntypedStorage._expired(memory)
    run(model, images())
    assert torch.UntypedStorage._expired(memory)


@pytest.mark.parametrize("how", ["training", "with gradients", "another backend"])
def test_calls_that_use_no_packed_weights(how: str, model: nn.Module) -> None:
    run(model, images())
    x = images()
    expected = dense_ext.swap(small_densenet_of(model))
    found = []
    for each in (model, expected):
        with Calls() as calls:
            if how == "training":
                each.train()
                with torch.no_grad():
                    found.append(each(x))
            elif how == "with gradients":
                found.append(each(x))
            else:
                with torch.no_grad(), dense_ext.use_backend("reference"):
                    found.append(each(x))
        assert PACKED not in calls.names
    assert torch.equal(*found)


def test_autocast_has_packed_weights_of_its_own(model: nn.Module, packings: list[int]) -> None:
    """In its dtype, and with the bits of a network that casts its weights at every call."""
    model, x = model.float(), images().float()
    unpacked = dense_ext.swap(small_densenet_of(model).float())
    for enabled, count in ((True, 4), (True, 4), (False, 8), (True, 12)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (y, names), (expected, _) = run(model, x), run(unpacked, x)
        assert torch.equal(y, expected)
        assert names == [PACKED] * 4
        assert len(packings) == count
    step(model)
    with torch.autocast("cpu", torch.bfloat16):
        changed, _ = run(model, x)
    assert not torch.equal(changed, y)


def test_compiled_graphs_hold_the_unpacked_operator(model: nn.Module) -> None:
    """It takes the weights themselves as inputs, so it cannot be stale."""
    expected, _ = run(model, images())
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        y = torch.compile(model, backend=record, fullgraph=True)(images())
    assert torch.equal(y, expected)
    assert sum("dense_block" in target for target in targets) == 4
    assert not any(PACKED in target for target in targets)


@pytest.mark.usefixtures("compiled_fast")
class TestFreezing:
    """Graphs that the compiler freezes: it computes once what depends on parameters alone."""

    @pytest.fixture(autouse=True)
    def _freezing(self) -> Iterator[None]:
        with torch._inductor.config.patch(freezing=True):
            yield

    @staticmethod
    def exported(model: nn.Module, x: Tensor) -> tuple[Any, Counter[str]]:
        """The program of a call, and how often it has each operator of blocks and transitions."""
        with dense_ext.fused_export():
            program = torch.export.export(model, (x,))
        names = in_graph(program.graph.nodes)
        del names["stem"]
        return program.module(), names

    @torch.no_grad()
    def test_a_program_packs_its_own_weights(self) -> None:
        model = dense_ext.swap(small_densenet().eval(), strict=True)
        program, names = self.exported(model, images())
        assert names == {PACKED: 4, "pack_dense_block": 4, "packed_transition": 3, "pack_transition": 3}
        assert_equal(program(images()), model(images()), "output")
        for part in (model, program):
            part.get_parameter("features.denseblock2.denselayer2.conv1.weight").mul_(1.5)
            part.get_parameter("features.transition1.conv.weight").mul_(0.5)
        assert_equal(program(images()), model(images()), "output with other weights")

    @pytest.mark.parametrize("what", ["gradients", "batch statistics", "reference backend"])
    def test_what_packed_weights_cannot_serve(self, what: str) -> None:
        model: Any = dense_ext.swap(small_densenet().eval(), strict=True)
        packed, unpacked = {PACKED: 3, "pack_dense_block": 3}, {UNPACKED: 1}
        transitions = {"packed_transition": 3, "pack_transition": 3}
        with torch.set_grad_enabled(what == "gradients"):
            if what == "gradients":
                packed, unpacked, transitions = {}, {UNPACKED: 4}, {"transition": 3}
            elif what == "batch statistics":
                model.features.denseblock2.denselayer1.norm1.train()
            else:
                model.features.denseblock2.backend = "reference"
            program, names = self.exported(model, images())
            assert names == {**packed, **unpacked, **transitions}
            assert_equal(program(images()), model(images()), "output")

    def test_autocast(self) -> None:
        model = dense_ext.swap(small_densenet().float().eval(), strict=True)
        x = images().float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            program, names = self.exported(model, x)
            assert names[PACKED] == 4
            assert torch.equal(program(x), dense_ext.pack_weights(model)(x))

    def test_weights_are_packed_once(self) -> None:
        eager = small_densenet().eval()
        model, x = dense_ext.swap(copy.deepcopy(eager).float(), strict=True), images()
        with torch.no_grad():  # in float32, since Inductor's freezing has no float64 convolutions
            expected, compiled = eager(x), torch.compile(model, fullgraph=True)
            assert_equal(compiled(x.float()).double(), expected, "first call", 1e-5)
            with profile() as profiled:
                assert_equal(compiled(x.float()).double(), expected, "second call", 1e-5)
        ran = [event.name for event in profiled.events()]
        assert ran.count("dense_ext::packed_dense_block") == 4
        assert ran.count("dense_ext::packed_transition") == 3
        assert not any("::pack_" in name or name.endswith("::dense_block") for name in ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, model: nn.Module) -> None:
    run(model, images())
    y, names = run(model.to(dtype), images().to(dtype))
    expected, _ = run(dense_ext.swap(small_densenet_of(model).to(dtype)), images().to(dtype))
    assert torch.equal(y, expected)
    assert names == [PACKED] * 4


def test_inference_mode(packings: list[int]) -> None:
    """Parameters that are made in it have no versions, so they are packed at every call."""
    with torch.inference_mode():
        model = dense_ext.pack_weights(dense_ext.swap(small_densenet().eval()))
        before, names = run(model, images())
        assert names == [PACKED] * 4
        second_layer(model).conv1.weight.mul_(2.0)
        y, _ = run(model, images())
        with dense_ext.restored(model):
            eager = model(images())
    torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-12)
    assert not torch.equal(y, before)
    assert len(packings) == 8


def test_nothing_is_kept_alive(model: nn.Module) -> None:
    run(model, images())
    module = weakref.ref(second_layer(model).conv1)
    weight = weakref.ref(second_layer(model).conv1.weight)
    first = weakref.ref(model.features.denseblock2.denselayer1.norm1)
    del model.features
    gc.collect()
    assert (module(), weight(), first()) == (None, None, None)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_carry_no_packed_weights(copied: Callable[[nn.Module], nn.Module], model: nn.Module) -> None:
    y, _ = run(model, images())
    other, names = run(copied(model), images())
    assert torch.equal(y, other)
    assert names == [UNPACKED] * 4
    assert run(model, images())[1] == [PACKED] * 4


def test_functional_call_uses_its_own_weights(model: nn.Module) -> None:
    run(model, images())
    other = {name: tensor.detach() * 1.1 for name, tensor in model.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(model, other, (images(),))
    twin = dense_ext.swap(small_densenet_of(model))
    twin.load_state_dict({**twin.state_dict(), **other})
    assert torch.equal(y, run(twin, images())[0])


def test_norms_with_fixed_statistics() -> None:
    network = randomize(densenet121()).features.denseblock1.double().eval()
    for layer in network.values():
        norm = FrozenBatchNorm2d(layer.norm1.num_features).double()
        norm.load_state_dict(layer.norm1.state_dict())
        layer.norm1 = norm.eval()
    model = nn.Sequential(network)
    x = torch.randn(1, 64, 6, 5, dtype=torch.float64)
    expected, _ = run(model, x)
    y, names = run(dense_ext.pack_weights(dense_ext.swap(model)), x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    assert names == [PACKED]


def test_dense_exts_own_networks() -> None:
    model = randomize(dense_ext.DenseNet(4, (2, 2), 6, 2, num_classes=3)).double().eval()
    expected, names = run(model, images(33))
    assert names == [UNPACKED] * 2
    y, names = run(dense_ext.pack_weights(model), images(33))
    assert names == [PACKED] * 2
    assert torch.equal(y, expected)


def test_layers_without_a_bottleneck_run_as_before() -> None:
    model = dense_ext.DenseNet(4, (2, 2), 6, None, num_classes=3).double().eval()
    _, names = run(dense_ext.pack_weights(model), images(33))
    assert names == [UNPACKED] * 2


def test_flops(model: nn.Module) -> None:
    counts = []
    for each in (dense_ext.swap(small_densenet_of(model)), model):
        x = torch.randn(1, 8, 6, 5, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            # Called inside, a module runs its original forward, because the counter hooks it.
            each.features.denseblock1.run(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class TestTransitions:
    """The same of transitions, whose norm and convolution are packed too."""

    @staticmethod
    def names(model: nn.Module) -> list[str]:
        with Calls() as calls, torch.no_grad():
            model(images())
        return [name for name in calls.names if name in ("packed_transition", "transition")]

    def test_packed_once(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.names(model) == ["packed_transition"] * 3
        monkeypatch.setattr(packing, "keep", lambda *_, **__: pytest.fail("packed again"))
        assert self.names(model) == ["packed_transition"] * 3

    @pytest.mark.parametrize("change", ["weight", "memory", "parameter", "statistics", "eps", "module"])
    def test_a_change_is_noticed(self, change: str, model: Any) -> None:
        before, _ = run(model, images())
        part = model.features.transition2
        if change == "weight":
            nn.init.normal_(part.conv.weight, generator=torch.Generator().manual_seed(3))
        elif change == "memory":
            part.conv.weight.data = part.conv.weight.data * 2
        elif change == "parameter":
            part.norm.bias = nn.Parameter(part.norm.bias.detach() + 1)
        elif change == "statistics":
            part.norm.running_mean.add_(1.0)
        elif change == "eps":
            part.norm.eps = 0.5
        else:
            part.conv = copy.deepcopy(part.conv)
            nn.init.constant_(part.conv.weight, 3.0)
        y, _ = run(model, images())
        assert self.names(model) == ["packed_transition"] * 3
        with dense_ext.restored(model):
            eager, _ = run(model, images())
        torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-12)
        assert not torch.equal(y, before)

    @pytest.mark.parametrize("what", ["batch statistics", "reference backend"])
    def test_what_packed_weights_cannot_serve(self, what: str, model: Any) -> None:
        run(model, images())
        part = model.features.transition2
        if what == "batch statistics":
            part.norm.running_mean = part.norm.running_var = None
        else:
            part.backend = "reference"
        y, _ = run(model, images())
        assert self.names(model) == ["packed_transition", "transition", "packed_transition"]
        with dense_ext.restored(model):
            eager, _ = run(model, images())
        torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-12)

    def test_flops(self, model: Any) -> None:
        counts = []
        for each in (dense_ext.swap(small_densenet_of(model)), model):
            part = each.features.transition1
            x = torch.randn(1, part.norm.num_features, 7, 6, dtype=torch.float64)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                part.run(x, ops.NOTHING_CARRIED)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_a_model_without_fused_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="swap it first"):
        dense_ext.pack_weights(small_densenet())
