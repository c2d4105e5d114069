"""Forwards that call stems and transitions module by module: rewritten, and equal to the original's."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import checkpoint as recomputed
from torchvision.models.densenet import DenseNet

import dense_ext
from dense_ext.benchmark.memory import saved_bytes
from dense_ext.recognise import Rewritten

from ..helpers import (
    Calls,
    assert_equal,
    assert_trains_alike,
    in_three_dimensions,
    randomize,
    second_derivative,
    twin,
)
from .styles import CatFunctional, K, standard_transition


def conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


def stem(channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )


def block(channels: int) -> nn.Sequential:
    """A dense block that adds eight channels; no library has its class."""
    return nn.Sequential(CatFunctional(channels), CatFunctional(channels + K))


class Encoder(nn.Module):
    """Calls everything but its blocks module by module, and returns each activation before a pool."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.depth = depth
        self.conv0, self.norm0, self.relu0 = conv(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.pool0 = nn.MaxPool2d(3, 2, 1)
        self.block1, self.norm1, self.conv1 = block(6), nn.BatchNorm2d(14), conv(14, 6, 1)
        self.block2, self.norm2 = block(6), nn.BatchNorm2d(14)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.relu0(self.norm0(self.conv0(x)))
        found = [x]
        if self.depth > 1:
            x = F.relu(self.norm1(self.block1(self.pool0(x))))
            found.append(x)
        if self.depth > 2:
            x = F.avg_pool2d(self.conv1(x), 2)
            found.append(self.norm2(self.block2(x)))
        return found


class Segmenter(nn.Module):
    """Concatenates what an encoder returns, in the size of the first."""

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.LazyConv2d(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.encoder(x)
        resized = [F.interpolate(y, first.shape[2:]) for y in others]
        return self.head(torch.cat([first, *resized], 1))


class Classifier(nn.Module):
    """Calls parts one after the other and pools what they return."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).relu().mean((2, 3))


class Stem(nn.Module):
    """A stem in a module with a forward of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = conv(3, channels, 3), nn.BatchNorm2d(channels), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.bn(self.conv(x))))


class OfFixedSize(nn.Module):
    """Takes images of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Stem(6), block(6))
        self.classifier = nn.Linear(14 * 8 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Repeats(nn.Module):
    """Calls a random number of functions."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(torch.randint(1, 6, ()))):
            x = x + 0
        return x


class Caches(nn.Module):
    """Keeps a tensor of its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ramp is None:
            self.ramp = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        return x + self.ramp


class ManyHabits(nn.Module):
    """Reads attributes long before it uses them, shares a ReLU, and calls its own method by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0, self.relu = conv(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.pool0, self.repeats = nn.MaxPool2d(3, 2, 1), Repeats()
        self.block1, self.norm1, self.conv1 = block(6), nn.BatchNorm2d(14), conv(14, 6, 1)
        self.block2, self.body = block(6), self.features

    def features(self, x: Tensor) -> Tensor:
        x = self.block1(self.pool0(self.relu(self.norm0(self.conv0(x)))))
        return self.block2(F.avg_pool2d(self.conv1(self.relu(self.norm1(x))), 2))

    def forward(self, x: Tensor) -> Tensor:
        size, device, _ = x.shape, x.device, x.dtype
        y = self.repeats(self.body(x))
        resized = F.interpolate(y, size=size[2:])
        return resized.mean((2, 3)) + torch.ones(1, dtype=y.dtype, device=device)


class Wrapper(nn.Module):
    """Passes for the class of what it wraps."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    @property
    def __class__(self) -> Any:
        return self.wrapped.__class__

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x)


class FunctionalStem(nn.Module):
    """A stem of calls of functions, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.block = conv(3, 6, 3), nn.BatchNorm2d(6), block(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x)), inplace=True), 3, 2, 1)
        return self.block(x).flatten(2).mean(2)


class InLists(nn.Module):
    """Blocks and transitions in lists, called in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3, 6, 3)
        self.blocks = nn.ModuleList([block(6), block(8)])
        self.transitions = nn.ModuleList([standard_transition(14, 8), standard_transition(16, 7)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for inner, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(inner(x))
        return x.mean((2, 3))


class TorchvisionEncoder(DenseNet):
    """As encoders of segmentation libraries are written."""

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.features
        half = features.relu0(features.norm0(features.conv0(x)))
        block1 = features.denseblock1(features.pool0(half))
        quarter = features.transition1.relu(features.transition1.norm(block1))
        rest = features.transition1.pool(features.transition1.conv(quarter))
        return [half, quarter, features.norm5(features.denseblock2(rest))]


def segmenter(encoder: nn.Module) -> nn.Module:
    model = Segmenter(encoder, 2)
    with torch.no_grad():
        model(torch.zeros(2, 3, 16, 16))
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: segmenter(Encoder()),
    "shallow encoder": lambda: segmenter(Encoder(2)),
    "torchvision's blocks": lambda: segmenter(TorchvisionEncoder(3, (2, 2), 6, 2)),
    "functional stem": FunctionalStem,
    "stem in a Sequential": lambda: Classifier(nn.Sequential(stem(6), block(6))),
    "one Sequential": lambda: Classifier(
        nn.Sequential(*stem(6), block(6), standard_transition(14, 6), block(6))
    ),
    "lists": InLists,
    "stem in a module": lambda: Classifier(nn.Sequential(Stem(6), block(6))),
    "fixed size": OfFixedSize,
    "in a wrapper": lambda: Wrapper(Classifier(nn.Sequential(Stem(6), block(6)))),
    "many habits": ManyHabits,
}
# The stems and transitions that are called module by module.
PIECES = {"encoder": 2, "shallow encoder": 1, "torchvision's blocks": 2, "functional stem": 1}
PIECES |= {"stem in a Sequential": 1, "one Sequential": 1, "lists": 0}
PIECES |= {"stem in a module": 1, "fixed size": 1, "in a wrapper": 1, "many habits": 2}


def images(*size: int) -> Tensor:
    return torch.randn(*(size or (2, 3, 16, 18)), dtype=torch.float64)


@functools.cache
def recognised(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return twin(randomize(NETWORKS[name]()).double(), lambda m: dense_ext.swap(m, strict=True))


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A swapped network and its original, in float64; to recognise takes long, so tests copy them."""
    pair = copy.deepcopy(recognised(name))
    torch.manual_seed(1)
    return pair


def rewritten(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Rewritten)]


def operators(model: nn.Module, x: Tensor) -> list[str]:
    """The names of the fused operators that a call runs, in their order."""
    with Calls() as calls:
        model(x)
    return calls.names


@pytest.mark.each_value
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_trains_alike(name: str, layout: torch.memory_format) -> None:
    ours, eager = pair(name)
    pieces = [pieces for module in rewritten(ours) for pieces in module.plan.pieces]
    assert len(pieces) == PIECES[name]
    assert rewritten(ours)
    assert {row.runs for row in dense_ext.report(ours).rows} == {"fused"}
    assert_trains_alike(ours, eager, images().contiguous(memory_format=layout))
    for model in (ours, eager):
        model.eval()
    assert_trains_alike(ours, eager, images().contiguous(memory_format=layout), steps=1)


@pytest.mark.parametrize("recompute", ["none", "bottleneck", "block"])
def test_keeps_as_little_as_a_classifier(recompute: str) -> None:
    """An encoder's activations before the pools are not kept, and "block" keeps no block's output."""
    x = torch.randn(2, 3, 64, 64)
    encoder = dense_ext.swap(TorchvisionEncoder(3, (2, 2), 6, 2), recompute=recompute)
    whole = dense_ext.swap(DenseNet(3, (2, 2), 6, 2), recompute=recompute)
    kept = [
        saved_bytes(encoder, lambda: sum(y.sum() for y in encoder(x))),
        saved_bytes(whole, lambda: whole.features(x).sum()),
    ]
    # Each activation keeps its statistics too.
    assert kept[0] == pytest.approx(kept[1], rel=0.01)


def test_block_policy_with_transitions_of_their_own() -> None:
    """A transition after its block does not keep the block's output, wherever the two are called."""
    kept = {}
    for recompute in ("bottleneck", "block"):
        model = dense_ext.swap(InLists(), recompute=recompute)
        kept[recompute] = saved_bytes(model, lambda model=model: model(images().float()).sum())  # type: ignore[misc]
    assert kept["block"] < 0.8 * kept["bottleneck"]


@pytest.mark.parametrize("name", ["encoder", "one Sequential"])
def test_memory_format_is_eagers(name: str) -> None:
    ours, eager = pair(name)
    for x in (images(), images().contiguous(memory_format=torch.channels_last)):
        parts = (m.encoder if name == "encoder" else m.features for m in (ours, eager))
        results = [part(x) for part in parts]
        for a, b in zip(*(y if isinstance(y, list) else [y] for y in results), strict=True):
            assert a.is_contiguous() == b.is_contiguous()


@pytest.mark.filterwarnings("ignore:.*runs its original forward")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
def test_hooks_inside_a_block_see_eagers_memory_format(layout: torch.memory_format) -> None:
    seen: list[list[tuple[int, ...]]] = []
    for model in pair("torchvision's blocks"):
        strides: list[tuple[int, ...]] = []
        hooked: Any = model.get_submodule("encoder.features.denseblock2.denselayer1.conv1")
        with hooked.register_forward_hook(lambda _, x, y, s=strides: s.extend((x[0].stride(), y.stride()))):
            model(images().contiguous(memory_format=layout))
        seen.append(strides)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]


def test_hooks_see_nothing_of_the_swap() -> None:
    seen: list[Any] = []
    model = Encoder()
    for part in (model, model.conv0, model.block1, model.norm2):
        part.register_forward_hook(lambda *args: seen.append(args))
        part.register_full_backward_hook(lambda *args: seen.append(args))
    dense_ext.swap(model)
    assert not seen
    assert rewritten(model)


def test_order_of_the_operators() -> None:
    ours, _ = pair("encoder")
    expected = ["stem", "activation", "dense_block", "transition", "activation", "dense_block"]
    assert operators(ours, images()) == expected


def test_volumes() -> None:
    torch.manual_seed(0)
    net = in_three_dimensions(Classifier3d())
    ours, eager = twin(net, lambda m: dense_ext.swap(m, strict=True))
    assert [p.kind for m in rewritten(ours) for p in m.plan.pieces] == ["stem", "transition"]
    assert_trains_alike(ours, eager, images(2, 3, 8, 9, 8), steps=2)


class Classifier3d(nn.Module):
    """A stem and a transition for volumes, called module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0, self.pool0 = conv(3, 6, 3), nn.BatchNorm2d(6), nn.MaxPool3d(3, 2, 1)
        self.block1, self.norm1, self.conv1 = block(6), nn.BatchNorm2d(14), conv(14, 6, 1)
        self.pool1 = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.pool0(F.relu(self.norm0(self.conv0(x)))))
        return self.pool1(self.conv1(F.relu(self.norm1(x)))).flatten(2).mean(2)


class TestModes:
    @pytest.mark.parametrize("name", ["encoder", "torchvision's blocks", "lists"])
    def test_compiles_without_a_graph_break(self, name: str) -> None:
        ours, eager = pair(name)
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        x = images()
        for model in (compiled, eager):
            model(x).square().sum().backward()
        for (key, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
            assert_equal(a.grad, b.grad, key)

    def test_exports_scripts_and_traces_its_original(self) -> None:
        ours, eager = (model.eval() for model in pair("encoder"))
        x = images()
        program = torch.export.export(ours, (x,))
        assert "dense_ext" not in str(program.graph)
        assert_equal(program.module()(x), eager(x).detach(), "exported")
        assert_equal(torch.jit.trace(ours, x)(x), eager(x), "traced")
        assert_equal(torch.fx.symbolic_trace(ours)(x), eager(x), "symbolically traced")
        scripted = torch.jit.script(ours.encoder)
        assert_equal(scripted(x)[-1], eager.encoder(x)[-1], "scripted")

    def test_second_derivatives_and_torch_func(self) -> None:
        ours, eager = (model.eval() for model in pair("encoder"))
        x = images()
        assert_equal(second_derivative(ours, x), second_derivative(eager, x), "second derivative")
        tangents = [torch.func.jvp(model, (x,), (x,))[1] for model in (ours, eager)]
        assert_equal(*tangents, "jvp")

    @pytest.mark.parametrize("name", ["encoder", "one Sequential"])
    def test_copies_and_pickles(self, name: str) -> None:
        ours, eager = pair(name)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        x = images()
        for copied in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
            assert len(rewritten(copied)) == len(rewritten(ours))
            assert operators(copied, x) == operators(ours, x)
            eager.zero_grad()
            assert_equal(copied(x), eager(x), "output")
            eager.load_state_dict(ours.state_dict())

    def test_restore_and_swap_again(self) -> None:
        ours, eager = pair("torchvision's blocks")
        x = images()
        with dense_ext.restored(ours):
            assert not rewritten(ours)
            assert operators(ours, x) == []
        assert len(rewritten(ours)) == 1
        dense_ext.swap(ours, recompute="block", backend="reference")
        assert {row.detail for row in dense_ext.report(ours).rows} == {"reference"}
        assert {m.recompute for m in ours.modules() if hasattr(m, "recompute")} == {"block"}
        dense_ext.restore(ours)
        assert [type(m) for m in ours.modules()] == [type(m) for m in eager.modules()]
        assert ours.encoder.__dict__.keys() == eager.encoder.__dict__.keys()

    def test_known_classes_only(self) -> None:
        model = NETWORKS["torchvision's blocks"]()
        with pytest.warns(UserWarning, match="forward calls its modules one by one"):
            dense_ext.swap(model, recognise=False)
        assert not rewritten(model)

    def test_swap_in_inference_mode(self) -> None:
        torch.manual_seed(0)
        eager = randomize(Encoder()).double().eval()
        ours, x = copy.deepcopy(eager), images()
        with torch.inference_mode():
            dense_ext.swap(ours, strict=True)
            assert rewritten(ours)
            for a, b in zip(ours(x), eager(x), strict=True):
                assert_equal(a, b, "feature")

    def test_autocast(self) -> None:
        ours, eager = (model.float() for model in pair("encoder"))
        x = images().float()
        with torch.autocast("cpu", torch.bfloat16):
            results = [model.encoder(x) for model in (ours, eager)]
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            assert_equal(a.float(), b.float(), "feature", relative=0.05)


# --- changes after the swap --------------------------------------------------------------------------------


def hook_on_the_norm(model: Any) -> None:
    model.norm0.register_forward_hook(lambda module, args, y: y * 2)


def hook_on_the_activation(model: Any) -> None:
    model.relu0.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_on_a_block(model: Any) -> None:
    model.block1.register_forward_hook(lambda module, args, y: y.mul(2))


def hook_that_writes(model: Any) -> None:
    model.block1.register_forward_hook(lambda module, args, y: y.mul_(2))


def another_pool(model: Any) -> None:
    model.pool0.stride = 1


def another_activation(model: Any) -> None:
    model.relu0 = nn.ELU()


def another_norm(model: Any) -> None:
    model.norm1 = nn.GroupNorm(7, 14).double()


def another_depth(model: Any) -> None:
    model.depth = 2


def patched_convolution(model: Any) -> None:
    forward = model.conv1.forward
    model.conv1.forward = lambda x: forward(x) * 2


def strided(model: Any) -> None:
    model.conv1.stride = (2, 2)


def other_settings(model: Any) -> None:
    model.norm0.eps, model.norm1.momentum = 0.1, 0.7
    model.norm1.weight = nn.Parameter(model.norm1.weight.detach() * 2)


def frozen_norm(model: Any) -> None:
    model.norm1.eval()


CHANGES = [
    hook_on_the_norm, hook_on_the_activation, hook_on_a_block, hook_that_writes, another_pool,
    another_activation, another_norm, another_depth, patched_convolution, strided, other_settings,
    frozen_norm,
]  # fmt: skip
# Those after which the operators still compute the same as the modules.
HARMLESS = (hook_on_a_block, hook_that_writes, other_settings, frozen_norm)


@functools.cache
def recognised_encoder() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return twin(randomize(Encoder()).double(), dense_ext.swap)


@pytest.mark.filterwarnings("ignore:dense_ext. .* runs its original forward")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_after_the_swap_take_effect(change: Callable[[Any], None]) -> None:
    ours, eager = copy.deepcopy(recognised_encoder())
    x = images()
    assert "stem" in operators(ours, x)
    eager(x)
    for model in (ours, eager):
        change(model)
    assert ("stem" in operators(ours, x)) == (change in HARMLESS)
    eager(x)
    results = [model(x) for model in (ours, eager)]
    for a, b in zip(*results, strict=True):
        assert_equal(a, b, "feature")
    for model, features in ((ours, results[0]), (eager, results[1])):
        model.zero_grad()
        sum(y.square().sum() for y in features).backward()  # type: ignore[union-attr]
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert_equal(a.grad, b.grad, name)
    for (name, a), b in zip(ours.named_buffers(), eager.buffers(), strict=True):
        assert_equal(a, b, name)


def test_a_child_put_into_a_sequential_runs() -> None:
    ours, eager = pair("one Sequential")
    for model in (ours, eager):
        model.features.insert(4, nn.Softplus())
    x = images()
    with pytest.warns(UserWarning, match="runs its original forward: its modules have changed"):
        assert_equal(ours(x), eager(x), "output")


class Iterates(Encoder):
    """Calls its children in turn, whatever they are."""

    def forward(self, x: Tensor) -> Tensor:
        for name, child in self.named_children():
            if name != "norm1":
                x = child(x)
            if name == "block1":
                return x.mean((2, 3))
        return x


@pytest.mark.filterwarnings("ignore:dense_ext. .* runs its original forward")
def test_a_child_of_a_module_that_iterates_over_its_children_runs() -> None:
    torch.manual_seed(0)
    ours, eager = twin(randomize(Iterates()).double(), dense_ext.swap)
    assert rewritten(ours)
    x = images()
    assert_equal(ours(x), eager(x), "output")
    for model in (ours, eager):
        model.pool0 = model._modules.pop("pool0")  # after the blocks
        model.conv0 = nn.Sequential(model.conv0, nn.Softplus())
    assert_equal(ours(x), eager(x), "output")


class Dropping(nn.Module):
    """Dropout that depends on its own mode, with a rate that a module of torch.nn has."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop.p, self.training)


class DropsAfterTheStem(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.dropping = nn.Sequential(Dropping(), self.block1, nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropping(self.pool0(self.relu0(self.norm0(self.conv0(x))))).mean((2, 3))


@pytest.mark.filterwarnings("ignore:dense_ext. .* runs its original forward")
def test_modes_of_inner_modules_and_settings_that_a_forward_reads() -> None:
    torch.manual_seed(0)
    ours, eager = twin(randomize(DropsAfterTheStem()).double(), dense_ext.swap)
    assert any(inner is ours for inner in rewritten(ours))
    x = images()
    for model in (ours, eager):
        model.dropping[0].eval()
    assert_equal(ours(x), eager(x), "without dropout, by mode")
    for model in (ours, eager):
        model.train()
        model.dropping[0].drop.p = 0.0
    assert_equal(ours(x), eager(x), "without dropout, by rate")


class Head(Encoder):
    """Reads the mode of a dropout that it does not call, and the class of its last module."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.last = nn.Dropout(0.5), conv(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.pool0(self.relu0(self.norm0(self.conv0(x)))))
        x = F.dropout(x, self.drop.p, self.drop.training)
        return x if isinstance(self.last, nn.Identity) else self.last(-x)


def only_dropout_in_eval_mode(model: Any) -> None:
    model.drop.eval()


def only_dropout_in_training_mode(model: Any) -> None:
    model.eval()
    model.drop.train()


def without_a_last_module(model: Any) -> None:
    model.eval()
    model.last = nn.Identity()


@pytest.mark.filterwarnings("ignore:dense_ext. .* runs its original forward")
@pytest.mark.parametrize(
    "change", [only_dropout_in_eval_mode, only_dropout_in_training_mode, without_a_last_module]
)
def test_the_mode_and_the_class_of_a_child_that_a_forward_reads(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    ours, eager = twin(randomize(Head()).double(), dense_ext.swap)
    assert any(inner is ours for inner in rewritten(ours))
    x, found = images(), []
    for model in (ours, eager):
        change(model)
        torch.manual_seed(0)
        found.append(model(x))
    assert_equal(*found, "output")


def test_a_slice_is_not_rewritten() -> None:
    ours, eager = pair("one Sequential")
    x = images()
    assert_equal(ours.features[:4](x), eager.features[:4](x), "slice")
    assert type(ours.features[:4]) is nn.Sequential


def test_tracing_leaves_nothing_in_the_modules() -> None:
    model = Classifier(nn.Sequential(stem(6), block(6), Caches())).double()
    dense_ext.swap(model)
    assert model.features[2].ramp is None
    model(images()).sum().backward()


# --- forwards that are left as they are ---------------------------------------------------------------------


class WrittenInto(Encoder):
    """Writes into the activation before the pool reads it."""

    def forward(self, x: Tensor) -> Tensor:
        half = F.relu(self.norm0(self.conv0(x)))
        half.add_(1)
        return self.block1(self.pool0(half)).mean((2, 3))


class WrittenThroughAView(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        half = F.relu(self.norm0(self.conv0(x)))
        half[:, 0].mul_(2)
        return self.block1(self.pool0(half)).mean((2, 3))


class WrittenThroughAnAlias(Encoder):
    """A module of torch.nn returns the activation itself, which is then written into."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        half = F.relu(self.norm0(self.conv0(x)))
        self.same(half).add_(1)
        return self.block1(self.pool0(half)).mean((2, 3))


class ReadsTheNorm(Encoder):
    """Uses the norm's output elsewhere too."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm0(self.conv0(x))
        return self.block1(self.pool0(F.relu(normed))).mean((2, 3)) + normed.mean()


class UsesTheNormTwice(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        y = self.pool0(F.relu(self.norm0(self.conv0(x))))
        y = self.pool0(F.relu(self.norm0(y)))
        return self.block1(y).mean((2, 3))


class CeilingPool(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        return self.block1(F.max_pool2d(F.relu(self.norm0(self.conv0(x))), 3, 2, 1, ceil_mode=True)).mean(
            (2, 3)
        )


class OtherPool(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        return self.block1(F.max_pool2d(F.relu(self.norm0(self.conv0(x))), 2)).mean((2, 3))


class BranchesOnTheInput(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu0(self.norm0(self.conv0(x)))
        return self.block1(self.pool0(y) if y.sum() > 0 else y).mean((2, 3))


class KeepsAGlobal(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        global FEATURES
        y = self.block1(self.pool0(self.relu0(self.norm0(self.conv0(x)))))
        FEATURES = y
        return y.mean((2, 3))


FEATURES: Any = None


class CountsCalls(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        self.depth += 1
        return self.block1(self.pool0(self.relu0(self.norm0(self.conv0(x))))).mean((2, 3))


class TakesTwoImages(Encoder):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x if y is None else x + y
        return self.block1(self.pool0(self.relu0(self.norm0(self.conv0(x))))).mean((2, 3))


class OtherInEval(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.conv0(x))
        x = F.relu(x) if self.training else F.elu(x)
        return self.block1(self.pool0(x)).mean((2, 3))


class Checkpoints(Encoder):
    """Eager recomputes what follows the block."""

    def last(self, x: Tensor) -> Tensor:
        return F.elu(self.norm1(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.pool0(self.relu0(self.norm0(self.conv0(x)))))
        return checkpoint(self.last, x, use_reentrant=False).mean((2, 3))


class CheckpointsByAnotherName(Checkpoints):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.pool0(self.relu0(self.norm0(self.conv0(x)))))
        return recomputed(self.last, x, use_reentrant=False).mean((2, 3))


class SavesOnCpu(Checkpoints):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.pool0(self.relu0(self.norm0(self.conv0(x)))))
        with save_on_cpu():
            return self.last(x).mean((2, 3))


LEFT = [
    WrittenInto, WrittenThroughAView, WrittenThroughAnAlias, ReadsTheNorm, UsesTheNormTwice, CeilingPool,
    OtherPool, BranchesOnTheInput, KeepsAGlobal, CountsCalls, TakesTwoImages, OtherInEval, Checkpoints,
    CheckpointsByAnotherName, SavesOnCpu,
]  # fmt: skip


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_is_left_as_it_is(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    ours, eager = twin(randomize(kind()).double(), dense_ext.swap)
    assert not rewritten(ours)
    x = images()
    for training in (True, False):
        with torch.no_grad():  # eager's backward refuses some of the writes
            results = [model.train(training)(x) for model in (ours, eager)]
        assert_equal(*results, "output")
