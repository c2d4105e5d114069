"""The gate: whatever can't be fused exactly runs the original's forward, from the next call on."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all_modules
from torch.utils.checkpoint import checkpoint
from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition
from torchvision.ops import FrozenBatchNorm2d

import dense_ext
from dense_ext.activations import _NAMES
from dense_ext.eligibility import _snapshots, mode_reason
from dense_ext.recognise import description

from .helpers import (
    Calls,
    assert_equal,
    assert_same_state,
    assert_trains_alike,
    eager_block,
    eager_transition,
    small_densenet,
    twin,
)
from .integrations.common import run_elsewhere

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[nn.Module], object]


def images() -> Tensor:
    return torch.randn(2, 3, 33, 32, dtype=torch.float64)


def pair(recompute: str = "bottleneck", drop_rate: float = 0.0) -> tuple[nn.Module, nn.Module]:
    return twin(small_densenet(drop_rate), lambda m: dense_ext.swap(m, recompute=recompute, strict=True))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the input's gradient after one backward."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    F.softplus(y).square().sum().backward()
    return [y.detach(), leaf.grad]


def assert_steps_alike(ours: nn.Module, eager: nn.Module, x: Tensor) -> None:
    for a, e in zip(step(ours, x), step(eager, x), strict=True):
        assert_equal(a, e, "output or input gradient")
    assert_same_state(ours, eager)


def blocks_run(model: nn.Module, x: Tensor) -> int:
    """The number of dense blocks that a forward runs fused; the model is not changed."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad():
        with Calls() as calls:
            model(x)
        for buffer, value in before:
            buffer.copy_(value)
    return calls.names.count("dense_block")


@contextmanager
def quietly() -> Iterator[None]:
    """Ignore the warnings about parts that run their original forward or are not swapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dense_ext: .* runs its original forward")
        warnings.filterwarnings("ignore", "dense_ext.swap: left as they are")
        yield


# --- changes to all modules at once --------------------------------------------------------------------


def register(kind: str, hook: Callable[..., Any]) -> Any:
    return getattr(hooks_of_all_modules, f"register_module_{kind}")(hook)


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a layer's input is a list
def test_a_global_hook_sees_every_module(kind: str) -> None:
    ours, eager = pair()
    x = images()
    seen: list[list[str]] = []
    for model in (ours, eager):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # eager's backward hooks refuse modules that work in place
        names = {module: name for name, module in model.named_modules()}
        seen.append([])
        with ExitStack() as stack:
            handle = register(kind, lambda m, *_, names=names: seen[-1].append(names[m]))
            stack.callback(handle.remove)
            model.features(x.clone().requires_grad_()).sum().backward()
    assert seen[0] == seen[1]
    assert "features.denseblock2.denselayer3.conv1" in seen[0]
    assert blocks_run(ours, x) == 4


def test_a_global_hook_may_change_modules_outputs() -> None:
    ours, eager = pair()
    handle = register(
        "forward_hook", lambda m, a, y: y.round(decimals=1) if isinstance(m, nn.Conv2d) else None
    )
    try:
        assert_steps_alike(ours, eager, images())
    finally:
        handle.remove()


def halved(function: Any) -> Any:
    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 0.5

    return replaced


REPLACED = [
    (_DenseBlock, "forward"), (nn.Sequential, "forward"), (_DenseLayer, "forward"),
    (_DenseLayer, "bn_function"), (_Transition, "forward"), (nn.ReLU, "forward"), (nn.BatchNorm2d, "forward"),
    (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.AvgPool2d, "forward"),
    (nn.MaxPool2d, "forward"), (nn.Module, "__call__"), (F, "relu"), (F, "batch_norm"),
    (F, "conv2d"), (F, "avg_pool2d"), (F, "max_pool2d"), (torch, "cat"), (torch, "relu_"),
    (torch, "batch_norm"), (torch, "max_pool2d"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        *((*what, "after the swap") for what in REPLACED),
        *((*what, "before the swap") for what in REPLACED[:5] + REPLACED[-1:]),
    ],
    ids=lambda value: getattr(value, "__name__", value).rpartition(".")[2],
)
def test_replacements_on_a_class_or_in_functional_are_called(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: str
) -> None:
    """As guided backpropagation, weight standardization and FLOP counters do; also after it is undone."""
    eager = small_densenet()
    ours = copy.deepcopy(eager)
    x = images()
    if when == "after the swap":
        dense_ext.swap(ours)
        assert_steps_alike(ours, eager, x)
    with quietly():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, halved(getattr(owner, name)))
            if when == "before the swap":
                dense_ext.swap(ours)
            assert_steps_alike(ours, eager, x)
        assert_steps_alike(ours, eager, x)


@pytest.mark.parametrize("kind", ["_DenseBlock", "_Transition"])
def test_replacements_before_the_first_swap_of_a_process_are_called(kind: str) -> None:
    run_elsewhere(_REPLACES_FIRST, kind, without_dense_ext=False)


_REPLACES_FIRST = """
import copy, sys, warnings
import torch
from torchvision.models import densenet
import dense_ext

warnings.simplefilter("ignore")
kind = getattr(densenet, sys.argv[1])
forward = kind.forward
kind.forward = lambda self, x: forward(self, x).cos()
eager = densenet.DenseNet(4, (2, 2), 8, 2, 0.0, 3).double()
ours = dense_ext.swap(copy.deepcopy(eager))
x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
torch.testing.assert_close(ours(x), eager(x), rtol=1e-9, atol=1e-9)
"""


def accepted() -> set[tuple[Any, str]]:
    """All names of the functions that a recognised forward may call, and those behind its modules."""
    functions, methods = description._FUNCTIONS, description._METHODS
    owners = (torch, F)
    found = {(o, name) for o in owners for name, f in vars(o).items() if callable(f) and f in functions}
    found |= {(Tensor, name) for name in methods}
    kinds = (*description.NORMS, *description.CONVS, *description.AVERAGES, *description.MAXIMA)
    for kind in (*kinds, *description._DROPOUTS, *_NAMES):
        for method in (kind.forward, getattr(kind, "_conv_forward", kind.forward)):
            names = [n for n in method.__code__.co_names if not n.startswith("_") and n != "pad"]
            found |= {(F, n) for n in names if callable(getattr(F, n, None))}  # no accepted module pads
    return found


@pytest.mark.parametrize(("owner", "name"), sorted(accepted(), key=str))
def test_every_function_that_recognition_accepts_is_watched(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    assert mode_reason() is None
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, halved(getattr(owner, name)))
        assert f"{name} has been replaced" in str(mode_reason())
    assert mode_reason() is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("features.denseblock2", "forward"),
        ("features.denseblock2.denselayer1", "forward"),
        ("features.denseblock2.denselayer1", "bn_function"),
        ("features.denseblock2.denselayer1.relu1", "forward"),
        ("features.denseblock2.denselayer1.conv2", "_conv_forward"),
        ("features.denseblock2.denselayer1.conv2", "_call_impl"),
        ("features.transition1", "forward"),
        ("features.transition1.pool", "forward"),
        ("features.pool0", "forward"),
        ("features", "forward"),
    ],
)
def test_replacements_on_an_instance_are_called(path: str, name: str) -> None:
    ours, eager = pair()
    for model in (ours, eager):
        module = model.get_submodule(path)
        setattr(module, name, halved(getattr(module, name)))
    with quietly():
        assert_steps_alike(ours, eager, images())


# --- changes after the swap ----------------------------------------------------------------------------


def layer(model: nn.Module) -> Any:
    return model.features.denseblock2.denselayer1


def circular(model: nn.Module) -> None:
    conv = layer(model).conv2
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def padded_by_name(model: nn.Module) -> None:
    conv = layer(model).conv2
    conv.padding, conv._reversed_padding_repeated_twice = "same", [1, 1, 1, 1]


def dilated(model: nn.Module) -> None:
    layer(model).conv2.dilation = layer(model).conv2.padding = (2, 2)


def biased(model: nn.Module) -> None:
    bias = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    layer(model).conv2.bias = bias.requires_grad_(False)  # in training its gradient is only rounding


def with_a_bias_as_plain_tensor(model: nn.Module) -> None:
    del layer(model).conv1._parameters["bias"]
    layer(model).conv1.bias = torch.linspace(-1, 1, 15, dtype=torch.float64)


def with_a_bias_as_buffer(model: nn.Module) -> None:
    del layer(model).conv2._parameters["bias"]
    layer(model).conv2.register_buffer("bias", torch.linspace(-1, 1, 5, dtype=torch.float64))


def with_a_weight_as_plain_tensor(model: nn.Module) -> None:
    weight = layer(model).conv2._parameters.pop("weight")
    layer(model).conv2.weight = weight.detach() * 2


def with_a_weight_as_buffer(model: nn.Module) -> None:
    weight = layer(model).conv1._parameters.pop("weight")
    layer(model).conv1.register_buffer("weight", weight.detach() * 2)


def with_norm_vectors_as_buffers(model: nn.Module) -> None:
    norm = layer(model).norm1
    for name in ("weight", "bias"):
        norm.register_buffer(name, norm._parameters.pop(name).detach() * 1.5)


class DoubledByNorms(Tensor):
    """A tensor that counts twice in batch norm."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return super().__torch_function__(func, types, args, kwargs)
        plain = [value.as_subclass(Tensor) * 2 if isinstance(value, cls) else value for value in args]
        return func(*plain, **kwargs)


def with_norm_tensors_of_a_subclass(model: nn.Module) -> None:
    for norm in (layer(model).norm2, model.features.transition1.norm, model.features.norm0):
        norm.running_mean = norm.running_mean.as_subclass(DoubledByNorms)


def with_another_parameter(model: nn.Module) -> None:
    layer(model).conv1.weight = nn.Parameter(layer(model).conv1.weight.detach() * 2)


def with_other_norm_settings(model: nn.Module) -> None:
    layer(model).norm1.eps, layer(model).norm2.momentum = 0.1, 0.7
    model.features.transition1.norm.eps, model.features.norm0.eps = 0.2, 0.3


def of_a_subclass(model: nn.Module) -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    layer(model).relu2 = Doubled()


def _subclassed(module: nn.Module) -> None:
    kind: Any = type(module)
    module.__class__ = type("Own", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 0.5})


def block_of_a_subclass(model: nn.Module) -> None:
    _subclassed(model.features.denseblock2)


def transition_of_a_subclass(model: nn.Module) -> None:
    _subclassed(model.features.transition1)


def pooled_otherwise(model: nn.Module) -> None:
    model.features.transition1.pool.stride = model.features.pool0.stride = 1


def pooled_by_maxima(model: nn.Module) -> None:
    model.features.transition1.pool = nn.MaxPool2d(2)


def with_more_in_a_layer(model: nn.Module) -> None:
    layer(model).more = nn.Identity()


def one_layer_shorter(model: nn.Module) -> None:
    del model.features.denseblock2.denselayer3
    model.features.transition2.norm = nn.BatchNorm2d(19).double()
    model.features.transition2.conv = nn.Conv2d(19, 12, 1, bias=False).double()
    for parameter in model.features.transition2.parameters():
        nn.init.constant_(parameter, 0.1)


CHANGES = [
    circular, padded_by_name, dilated, biased, with_a_bias_as_plain_tensor, with_a_bias_as_buffer,
    with_a_weight_as_plain_tensor, with_a_weight_as_buffer,
    with_norm_vectors_as_buffers, with_norm_tensors_of_a_subclass, with_another_parameter,
    with_other_norm_settings, of_a_subclass,
    block_of_a_subclass, transition_of_a_subclass, pooled_otherwise,
    pooled_by_maxima, with_more_in_a_layer, one_layer_shorter,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_after_the_swap_take_effect(change: Change) -> None:
    ours, eager = pair()
    x = images()
    assert blocks_run(ours, x) == 4
    for model in (ours, eager):
        change(model)
    with quietly():
        assert_steps_alike(ours, eager, x)
        for model in (ours, eager):
            model.eval()  # in training the next norm would cancel a bias
        assert_steps_alike(ours, eager, x)


# Everything that a snapshot of the modules compares: the place, and the value that is set there.
ATTRIBUTES: dict[str, tuple[str, str, Any]] = {
    "kernel_size": ("denseblock2.denselayer1.conv1", "kernel_size", (3, 3)),
    "stride": ("denseblock2.denselayer1.conv2", "stride", (2, 2)),
    "padding": ("denseblock2.denselayer3.conv2", "padding", (0, 0)),
    "dilation": ("denseblock2.denselayer1.conv2", "dilation", (2, 2)),
    "groups": ("denseblock2.denselayer2.conv1", "groups", 2),
    "padding_mode": ("denseblock2.denselayer1.conv2", "padding_mode", "reflect"),
    "the weight's shape": ("denseblock2.denselayer1.conv2", "weight", nn.Parameter(torch.ones(5, 15, 1, 1))),
    "a bias": ("denseblock2.denselayer1.conv2", "bias", nn.Parameter(torch.ones(5))),
    "a transition's bias": ("transition1.conv", "bias", nn.Parameter(torch.ones(9))),
    "one drop rate": ("denseblock2.denselayer2", "drop_rate", 0.5),
    "one layer's mode": ("denseblock2.denselayer2", "training", False),
    "a layer's forward": ("denseblock2.denselayer2", "forward", lambda x: x),
    "a norm's forward": ("denseblock2.denselayer2.norm2", "forward", lambda x: x),
    "a norm's check": ("denseblock2.denselayer2.norm1", "_check_input_dim", lambda x: None),
    "a convolution's forward": ("transition1.conv", "_conv_forward", lambda *args: args[0]),
    "a norm's class": ("denseblock2.denselayer1.norm1", "__class__", nn.BatchNorm1d),
    "an activation": ("denseblock2.denselayer1.relu2", "__class__", nn.ReLU6),
    "a layer's class": ("denseblock2.denselayer1", "__class__", type("Other", (_DenseLayer,), {})),
    "average: kernel_size": ("transition1.pool", "kernel_size", 3),
    "average: stride": ("transition1.pool", "stride", 1),
    "average: padding": ("transition1.pool", "padding", 1),
    "average: ceil_mode": ("transition1.pool", "ceil_mode", True),
    "average: divisor_override": ("transition1.pool", "divisor_override", 3),
    "maximum: kernel_size": ("pool0", "kernel_size", 2),
    "maximum: stride": ("pool0", "stride", 1),
    "maximum: padding": ("pool0", "padding", 0),
    "maximum: dilation": ("pool0", "dilation", 2),
    "maximum: ceil_mode": ("pool0", "ceil_mode", True),
    "maximum: return_indices": ("pool0", "return_indices", True),
}


def attribute_set(path: str, name: str, value: Any) -> Callable[[nn.Module], Callable[[], object]]:
    def change(features: nn.Module) -> Callable[[], object]:
        module = features.get_submodule(path)
        replaces = name in (*module.__dict__, *module._parameters, "__class__")
        before = getattr(module, name)
        setattr(module, name, value)
        return (lambda: setattr(module, name, before)) if replaces else (lambda: delattr(module, name))

    return change


def hook_added(path: str, kind: str) -> Callable[[nn.Module], Callable[[], object]]:
    def change(features: nn.Module) -> Callable[[], object]:
        return getattr(features.get_submodule(path), f"register_{kind}")(lambda *_: None).remove

    return change


def child_exchanged(path: str, child: Callable[[], nn.Module] | None) -> Callable[[nn.Module], Any]:
    """A child is replaced by another module or removed."""

    def change(features: nn.Module) -> Callable[[], object]:
        parent, _, name = path.rpartition(".")
        children = features.get_submodule(parent)._modules
        before = dict(children)
        if child is None:
            del children[name]
        else:
            children[name] = child()
        return lambda: (children.clear(), children.update(before))

    return change


def weight_taken_away(features: nn.Module) -> Callable[[], object]:
    parameters = features.denseblock2.denselayer1.conv1._parameters
    before = dict(parameters)
    parameters["weight"] = None
    return lambda: parameters.update(before)


def bias_buffer_added(features: nn.Module) -> Callable[[], object]:
    conv = features.denseblock2.denselayer1.conv1
    del conv._parameters["bias"]
    conv.register_buffer("bias", torch.ones(15))

    def undo() -> None:
        del conv.bias
        conv.register_parameter("bias", None)

    return undo


def method_replaced(owner: Any, name: str) -> Callable[[nn.Module], Callable[[], object]]:
    def change(features: nn.Module) -> Callable[[], object]:
        patch = pytest.MonkeyPatch()
        patch.setattr(owner, name, halved(getattr(owner, name)))
        return patch.undo

    return change


def compiled(features: nn.Module) -> Callable[[], object]:
    """What ``Module.compile`` with a backend of the user's does."""
    conv = features.denseblock2.denselayer1.conv2
    conv._compiled_call_impl = halved(conv._call_impl)
    return lambda: delattr(conv, "_compiled_call_impl")


def attribute_exchanged(features: nn.Module) -> Callable[[], object]:
    """For a forward: there are as many attributes as before."""
    conv = features.denseblock2.denselayer1.conv2
    mode = conv.__dict__.pop("transposed")
    conv.forward = halved(conv.forward)

    def undo() -> None:
        del conv.forward
        conv.transposed = mode

    return undo


NOTICED: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    **{what: attribute_set(*where) for what, where in ATTRIBUTES.items()},
    **{
        f"{kind} on {path}": hook_added(path, kind)
        for kind in (
            "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"
        )
        for path in ("denseblock2.denselayer1.conv1", "denseblock2.denselayer2")
    },
    "hook in a transition": hook_added("transition1.norm", "forward_hook"),
    "hook in the stem": hook_added("relu0", "forward_pre_hook"),
    "another child": child_exchanged("denseblock2.denselayer1.relu1", nn.Identity),
    "no child": child_exchanged("denseblock2.denselayer1.relu1", None),
    "one more child": child_exchanged("denseblock2.denselayer1.more", nn.Identity),
    "another layer": child_exchanged("denseblock2.denselayer2", nn.Identity),
    "one more layer": child_exchanged("denseblock2.more", nn.Identity),
    "another pool": child_exchanged("transition1.pool", nn.Identity),
    "another stem": child_exchanged("norm0", lambda: nn.GroupNorm(1, 8)),
    "no weight": weight_taken_away,
    "a compiled call": compiled,
    "an attribute for a forward": attribute_exchanged,
    "a class's call": method_replaced(nn.Conv2d, "__call__"),
    "a buffer": bias_buffer_added,
    "a class's forward": method_replaced(_DenseLayer, "forward"),
    "a class's bn_function": method_replaced(_DenseLayer, "bn_function"),
    "a norm class's forward": method_replaced(nn.BatchNorm2d, "forward"),
    "a pool class's forward": method_replaced(nn.MaxPool2d, "forward"),
}  # fmt: skip


@pytest.fixture(scope="module")
def swapped() -> nn.Module:
    """A swapped network; tests copy it, which takes a tenth of the time."""
    return dense_ext.swap(small_densenet(0.2), strict=True)


@pytest.mark.parametrize("what", NOTICED)
def test_a_snapshot_notices(what: str, swapped: nn.Module) -> None:
    """Each change, one at a time, and that it was undone."""
    features: Any = copy.deepcopy(swapped).features
    parts = [module for module in features.modules() if isinstance(module, dense_ext.eligibility.Fused)]

    def reasons() -> list[str]:
        return [reason for part in parts if (reason := part.unfusable()) is not None]

    assert reasons() == []
    assert all(part in _snapshots for part in parts)
    undo = NOTICED[what](features)
    try:
        assert reasons()
        assert reasons(), "also the next time"
    finally:
        undo()
    assert reasons() == []


def test_sync_norms_are_fused_while_all_take_statistics_over_the_same_processes() -> None:
    """A change of a norm's mode or process group is noticed."""
    eager = small_densenet()
    ours = dense_ext.swap(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(eager)).eval(), strict=True)
    eager.eval()
    x = images()
    assert_steps_alike(ours, eager, x)
    assert blocks_run(ours, x) == 4
    block = ours.features.denseblock1
    block.denselayer1.norm1.process_group = object()
    block.denselayer1.norm1.train()
    assert block.unfusable() is None, "the other norms use running statistics"
    block.denselayer2.norm1.train()
    assert block.unfusable() == "its norms take statistics over different processes"
    block.eval()
    assert block.unfusable() is None


def test_frozen_norms_are_fused(backend: str, recompute: str) -> None:
    eager = small_densenet()
    for parent in list(eager.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, eps=1e-3).double()
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)
    ours, _ = twin(eager, lambda m: dense_ext.swap(m, recompute=recompute, strict=True))
    assert blocks_run(ours, images()) == 4
    assert_trains_alike(ours, eager, images(), steps=1)


@pytest.mark.parametrize("momentum", [0.2, None])
def test_a_norm_that_two_layers_share(backend: str, momentum: float | None) -> None:
    """Its statistics are updated once per layer, in the layers' order."""
    eager = eager_block(3, 6, 5)
    shared = eager.denselayer1.norm2
    shared.momentum = momentum
    eager.denselayer2.norm2 = eager.denselayer3.norm2 = shared
    ours, _ = twin(eager, lambda m: dense_ext.swap(m, strict=True))
    assert_trains_alike(ours, eager, torch.randn(2, 6, 5, 4, dtype=torch.float64))


# --- writing into a block's output --------------------------------------------------------------------------


def by_data(module: nn.Module, args: Any, output: Tensor) -> None:
    output.data[:, ::2] = 0


def by_new_data(module: nn.Module, args: Any, output: Tensor) -> None:
    output.data = output.data * 0.5


def by_numpy(module: nn.Module, args: Any, output: Tensor) -> None:
    output.detach().numpy()[:, ::2] *= 0.5


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output[:, ::2] = 0


@torch.no_grad()
def without_a_graph(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(0.5)


def by_returning(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def hooked(hook: Any) -> Change:
    return lambda model: model.features.denseblock2.register_forward_hook(hook)


def partial_hook(model: nn.Module) -> None:
    model.features.denseblock2.register_forward_hook(functools.partial(by_data))


def hook_before_the_transition(model: nn.Module) -> None:
    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        args[0].data[:, ::2] = 0

    model.features.transition2.register_forward_pre_hook(hook)


def hook_on_the_last_norm(model: nn.Module) -> None:
    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        args[0].data[:, ::2] = 0

    model.features.norm5.register_forward_pre_hook(hook)


def relu_behind(model: nn.Module) -> None:
    model.features.transition1 = nn.Sequential(nn.ReLU(inplace=True), model.features.transition1)


def relu_behind_as_a_child(model: nn.Module) -> None:
    children = dict(model.features._modules)
    model.features._modules.clear()
    for name, child in children.items():
        model.features.add_module(name, child)
        if name == "denseblock2":
            model.features.add_module("relu_behind", nn.ReLU(inplace=True))


def no_last_norm(model: nn.Module) -> None:
    """Remove the last norm, so that the network's own in-place ReLU directly follows the last block."""
    model.features.norm5 = nn.Identity()


WRITES = {
    **{
        hook.__name__: hooked(hook)
        for hook in (by_data, by_new_data, by_numpy, in_place, without_a_graph, by_returning)
    },
    **{
        change.__name__: change
        for change in (
            partial_hook,
            hook_before_the_transition,
            hook_on_the_last_norm,
            relu_behind,
            relu_behind_as_a_child,
            no_last_norm,
        )
    },
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("recompute", ["bottleneck", "block"])
def test_a_blocks_output_may_be_written_into(recompute: str, write: str) -> None:
    """The block's backward reads the original output, and statistics are taken from the modified one."""
    ours, eager = pair(recompute)
    x = images()
    for model in (ours, eager):
        WRITES[write](model)
    assert_steps_alike(ours, eager, x)
    with torch.no_grad():
        assert_equal(ours(x), eager(x), "output without a graph")
    for model in (ours, eager):
        model.eval()
    assert_steps_alike(ours, eager, x)
    assert blocks_run(ours, x) == 4


def test_statistics_are_not_used_after_a_write(backend: str, recompute: str) -> None:
    """A block and a transition are called directly, with a write through .data between them."""
    network = nn.Sequential(eager_block(), eager_transition(21, 4))
    pair = twin(network, lambda m: dense_ext.swap(m, recompute=recompute, strict=True))
    x = torch.randn(2, 6, 6, 4, dtype=torch.float64)
    outputs = []
    for block, transition in pair:
        with torch.no_grad():
            features = block(x)
            features.data.mul_(2)
            outputs.append(transition(features))
    assert_equal(*outputs, "output")
    assert_same_state(*pair)


# --- warnings and reasons --------------------------------------------------------------------------------


def test_reasons_distinguish_classes_of_the_same_name() -> None:
    other = type("BatchNorm2d", (nn.BatchNorm2d,), {"__module__": "elsewhere"})
    model = small_densenet()
    model.features.denseblock1.denselayer1.norm1.__class__ = other
    name = "torch.nn.modules.batchnorm.BatchNorm2d"
    with pytest.raises(ValueError, match=f"norm1 is elsewhere.BatchNorm2d, not {name}"):
        dense_ext.swap(model, strict=True)
    model = small_densenet()
    model.features.denseblock1.denselayer1.__class__ = type("_DenseLayer", (_DenseLayer,), {})
    with pytest.raises(ValueError, match=r"is tests\.test_gate\._DenseLayer, not torchvision.*_DenseLayer"):
        dense_ext.swap(model, strict=True, recognise=False)


def test_a_part_warns_once_per_reason() -> None:
    model = dense_ext.swap(small_densenet())
    x = images()
    conv = model.features.denseblock2.denselayer1.conv1

    def messages() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(x)
        return [str(w.message) for w in caught]

    assert messages() == []
    handle = conv.register_forward_hook(lambda *_: None)
    part = "dense_ext: features.denseblock2 runs its original forward: denselayer1: conv1 "
    assert messages() == [part + "carries a hook, which a fused call would skip"]
    assert messages() == []
    conv.forward = types.MethodType(nn.Conv2d.forward, conv)
    handle.remove()
    assert messages() == [part + "carries a forward of its own"]
    assert messages() == []
    del conv.forward
    assert messages() == []
    assert blocks_run(model, x) == 4


def test_pytorchs_modes_do_not_warn() -> None:
    model = dense_ext.swap(small_densenet().eval())
    handle = register("forward_hook", lambda *_: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(images())
    finally:
        handle.remove()


# --- cases that stay fused --------------------------------------------------------------------------------


def test_features_without_their_last_child_keep_the_stem_fused() -> None:
    model = dense_ext.swap(small_densenet())
    del model.features[-1]
    rows = {row.name: row.runs for row in dense_ext.report(model).rows}
    assert rows["features"] == "fused"
    with torch.no_grad(), Calls() as calls:
        model.features(images())
    assert "stem" in calls.names


@pytest.mark.parametrize("before", [True, False], ids=["before the swap", "after it"])
def test_a_checkpointed_forward_stays_fused(recompute: str, before: bool) -> None:
    """In eval mode, since in training mode eager counts a checkpointed step twice."""
    plain = small_densenet().eval()
    ours = copy.deepcopy(plain)

    def patch(model: nn.Module) -> None:
        for block in (model.features.denseblock1, model.features.denseblock2):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    if before:
        patch(ours)
    dense_ext.swap(ours, recompute=recompute, strict=True)
    if not before:
        patch(ours)
    x = images()
    assert_steps_alike(ours, plain, x)
    assert blocks_run(ours, x) == 4
    if before:
        dense_ext.restore(ours)
        ours.zero_grad(), plain.zero_grad()
        assert_steps_alike(ours, plain, x)
        assert blocks_run(ours, x) == 0


def test_restored_gives_the_original_inside_the_context() -> None:
    ours, eager = pair("block")
    ours.features.denseblock1.recompute = "none"
    classes, x = [type(m) for m in ours.modules()], images()
    attributes = [dict(m.__dict__) for m in ours.modules() if isinstance(m, dense_ext.eligibility.Fused)]

    def fail_inside() -> None:
        with dense_ext.restored(ours) as original:
            assert original is ours
            assert [type(m) for m in ours.modules()] == [type(m) for m in eager.modules()]
            assert blocks_run(ours, x) == 0
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [type(m) for m in ours.modules()] == classes
    found = [m for m in ours.modules() if isinstance(m, dense_ext.eligibility.Fused)]
    assert [sorted(m.__dict__) for m in found] == [sorted(a) for a in attributes]
    assert [getattr(m, "recompute", None) for m in found] == [a.get("recompute") for a in attributes]
    assert_steps_alike(ours, eager, x)
    assert blocks_run(ours, x) == 4


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_checked_again(how: Callable[[nn.Module], nn.Module]) -> None:
    """A network's snapshots are not used for its copy."""
    ours, eager = pair()
    x = images()
    blocks_run(ours, x)
    other = how(ours)
    assert not any(module in _snapshots for module in other.modules())
    for model in (other, eager):
        biased(model)
    with pytest.warns(UserWarning, match="denselayer1: conv2 has a bias"):
        assert_steps_alike(other, eager, x)
    assert blocks_run(ours, x) == 4
