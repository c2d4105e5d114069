"""The memory layout of saved tensors, parameters and images does not change results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import (
    allow_mutation_on_saved_tensors,
    disable_saved_tensors_hooks,
    save_on_cpu,
    saved_tensors_hooks,
)
from torch.utils._python_dispatch import TorchDispatchMode

import dense_ext
from dense_ext.ops import is_channels_last

from .helpers import (
    assert_equal,
    assert_same_state,
    assert_trains_alike,
    eager_block,
    eager_transition,
    in_three_dimensions,
    small_densenet,
    twin,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def images(height: int = 33, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


# --- images ------------------------------------------------------------------------------------------------


class FirstConvolution(TorchDispatchMode):
    """Records whether the first convolution reads channels_last memory."""

    reads_channels_last: bool | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self.reads_channels_last is None:
            self.reads_channels_last = is_channels_last(args[0])
        return func(*args, **(kwargs or {}))


def test_images_get_their_gradient_in_their_own_layout() -> None:
    """Gradient penalties and attacks flatten it with view."""
    ours, eager = twin(small_densenet(), dense_ext.swap)
    x = images().requires_grad_()
    mine, theirs = (torch.autograd.grad(model(x).square().sum(), x)[0] for model in (ours, eager))
    assert mine.stride() == theirs.stride() == x.stride()
    assert_equal(mine.view(len(x), -1), theirs.view(len(x), -1), "gradient of the images")


def unchanged(features: nn.Module) -> nn.Module:
    return features


def with_weights_permuted(features: Any) -> nn.Module:
    weight = features.conv0.weight
    features.conv0.weight = nn.Parameter(weight.detach().transpose(0, 1).contiguous().transpose(0, 1))
    return features


def with_a_hook(features: Any) -> nn.Module:
    features.conv0.register_forward_hook(lambda module, args, output: None)
    return features


def after_an_activation(features: Any) -> nn.Module:
    return nn.Sequential(OrderedDict([("first", nn.ReLU()), *features.named_children()]))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("change", "channels", "converted"),
    [
        (unchanged, 3, True), (unchanged, 1, True), (with_weights_permuted, 3, False),
        (with_a_hook, 3, False), (after_an_activation, 3, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_contiguous_images_are_converted_in_front_of_plain_convolutions(
    change: Callable[[Any], nn.Module], channels: int, converted: bool, dims: int
) -> None:
    features: Any = small_densenet().features
    features.conv0 = nn.Conv2d(channels, 8, 7, 2, 3, bias=False).double()
    x = images()[:, :channels].contiguous()
    if dims == 3:
        features.pool0 = nn.MaxPool3d(3, 2, 1)
        features = in_three_dimensions(features)
        # Equal slices would have channels of little variance, and training would magnify rounding.
        x = torch.randn(*x.shape[:2], 33, *x.shape[2:], dtype=x.dtype)
    ours, eager = twin(change(features), dense_ext.swap)
    first = FirstConvolution()
    with first, torch.no_grad():
        y = ours.eval()(x)
    assert first.reads_channels_last is converted
    assert y.stride() == eager.eval()(x).stride()
    assert_trains_alike(ours.train(), eager.train(), x)


@pytest.mark.parametrize("place", [1, 5, 6, -1])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout], ids=lambda kind: kind.__name__)
def test_modules_in_the_features_draw_eagers_random_numbers(kind: type[nn.Module], place: int) -> None:
    """These fill memory in its order."""
    ours, eager = twin(small_densenet(), dense_ext.swap)
    x, outputs = images(), []
    for model in (ours, eager):
        children = list(model.features.named_children())
        model.features._modules.clear()
        for name, child in [*children[:place], ("drawing", kind()), *children[place:]]:
            model.features.add_module(name, child)
        torch.manual_seed(3)
        outputs.append(model(x))
    assert_equal(*outputs, "output")


# --- saved tensors that return in another layout -----------------------------------------------------


def on_cpu(folder: Path) -> AbstractContextManager[Any]:
    return save_on_cpu()


def in_pinned_memory(folder: Path) -> AbstractContextManager[Any]:
    return save_on_cpu(pin_memory=True)


def as_contiguous_copies(folder: Path) -> AbstractContextManager[Any]:
    return saved_tensors_hooks(lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t)


def as_strided_views(folder: Path) -> AbstractContextManager[Any]:
    return saved_tensors_hooks(lambda t: torch.stack([t.detach()] * 2, -1), lambda t: t[..., 1])


def as_numpy_arrays(folder: Path) -> AbstractContextManager[Any]:
    return saved_tensors_hooks(lambda t: t.detach().contiguous().numpy().copy(), torch.from_numpy)


def on_disk(folder: Path) -> AbstractContextManager[Any]:
    def pack(tensor: Tensor) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.pt"
        torch.save(tensor.detach(), path)
        return path

    return saved_tensors_hooks(pack, torch.load)


@pytest.mark.parametrize(
    "keep",
    [on_cpu, in_pinned_memory, as_contiguous_copies, as_strided_views, as_numpy_arrays, on_disk],
    ids=lambda f: f.__name__,
)
def test_saved_tensors_may_return_in_another_layout(
    backend: str, recompute: str, keep: Callable[[Path], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    ours, eager = twin(small_densenet(), lambda m: dense_ext.swap(m, recompute=recompute))
    x = images()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with keep(tmp_path):
        y = ours(leaves[0])
    y.square().sum().backward()
    eager(leaves[1]).square().sum().backward()
    assert_equal(leaves[0].grad, leaves[1].grad, "input gradient")
    assert_same_state(ours, eager)


def test_saved_tensors_without_hooks(recompute: str) -> None:
    ours, eager = twin(small_densenet(), lambda m: dense_ext.swap(m, recompute=recompute))
    with disable_saved_tensors_hooks("not here"):
        assert_trains_alike(ours, eager, images(), steps=1)


def test_parameters_may_change_where_saved_tensors_are_cloned(recompute: str) -> None:
    ours, eager = twin(small_densenet(), lambda m: dense_ext.swap(m, recompute=recompute))
    x = images()
    for model in (ours, eager):
        with allow_mutation_on_saved_tensors(), torch.no_grad():
            with torch.enable_grad():
                loss = model(x).square().sum()
            for parameter in model.parameters():
                parameter.mul_(1.1)
            loss.backward()
    assert_same_state(ours, eager)


def test_hooks_get_the_parameters_of_a_transition(recompute: str) -> None:
    ours: Any = dense_ext.swap(small_densenet(), recompute=recompute)
    seen: list[int] = []
    with saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        ours(images()).sum().backward()
    assert ours.features.transition1.conv.weight.data_ptr() in seen


def test_saved_tensors_of_volumes_in_another_layout(recompute: str, tmp_path: Path) -> None:
    network = in_three_dimensions(nn.Sequential(eager_block(2), eager_transition(16, 4)))
    ours, eager = twin(network, lambda m: dense_ext.swap(m, recompute=recompute))
    x = torch.randn(2, 6, 2, 5, 4, dtype=torch.float64)
    with as_contiguous_copies(tmp_path):
        y = ours(x)
    y.square().sum().backward()
    eager(x).square().sum().backward()
    assert_same_state(ours, eager)


# --- parameters and statistics in other layouts -----------------------------------------------------------


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """All norms but the last, which stays PyTorch's own; there strided vectors give other bits."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][:-1]


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def norm_vectors_as_columns(model: nn.Module) -> None:
    for norm in norms(model):
        table = torch.stack([norm.weight.detach(), norm.bias.detach()], 1)
        norm.weight, norm.bias = nn.Parameter(table[:, 0]), nn.Parameter(table[:, 1])


def statistics_as_columns(model: nn.Module) -> None:
    for norm in norms(model):
        table = torch.stack([norm.running_mean, norm.running_var], 1)
        norm.running_mean, norm.running_var = table.unbind(1)


def one_number_for_all_channels(model: nn.Module) -> None:
    for norm in norms(model):
        number = torch.full((1,), 0.7, dtype=torch.float64)
        norm.weight = nn.Parameter(number.expand(norm.num_features), requires_grad=False)


def weights_permuted(model: nn.Module) -> None:
    """Store weights as other frameworks do: height, width, in, out."""
    for conv in convolutions(model):
        kernel = conv.weight.detach().permute(2, 3, 1, 0).contiguous()
        conv.weight = nn.Parameter(kernel.permute(3, 2, 0, 1))


def assigned_from_a_state_dict(model: nn.Module) -> None:
    state = {
        k: v.clone().T.contiguous().T if v.dim() == 2 else v.clone() for k, v in model.state_dict().items()
    }
    for name, value in state.items():
        if value.dim() == 4:
            state[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
    model.load_state_dict(state, assign=True)


def weights_expanded(model: nn.Module) -> None:
    conv = model.features.denseblock1.denselayer1.conv1
    conv.weight = nn.Parameter(conv.weight.detach().mean(1, keepdim=True).expand_as(conv.weight))
    conv = model.features.denseblock2.denselayer2.conv2
    conv.weight = nn.Parameter(conv.weight.detach().mean((2, 3), keepdim=True).expand_as(conv.weight))


def weights_in_channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def all_in_one_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())


def each_an_element_off(model: nn.Module) -> None:
    for parameter in model.parameters():
        storage = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)
        parameter.data = storage[1:].view_as(parameter).copy_(parameter.data)


PARAMETERS = [
    norm_vectors_as_columns, statistics_as_columns, one_number_for_all_channels, weights_permuted,
    assigned_from_a_state_dict, weights_expanded, weights_in_channels_last, all_in_one_vector,
    each_an_element_off,
]  # fmt: skip


@pytest.mark.parametrize("change", PARAMETERS, ids=lambda f: f.__name__)
def test_parameters_may_have_any_layout(backend: str, change: Callable[[nn.Module], None]) -> None:
    """The results are those of the usual layout."""
    ours, eager = small_densenet(), small_densenet()
    change(ours)
    eager.load_state_dict(ours.state_dict())
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        theirs.requires_grad_(mine.requires_grad)
    dense_ext.swap(ours, strict=True)
    x = images()
    results = []
    for model in (ours, eager):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        results.append(leaf.grad)
        model.eval()
    assert_equal(*results, "input gradient")
    assert_same_state(ours, eager)
    assert_equal(ours(x), eager(x), "output in eval mode")
    assert all(row.runs == "fused" for row in dense_ext.report(ours).rows)


@pytest.mark.parametrize(
    "change", [norm_vectors_as_columns, statistics_as_columns, weights_permuted], ids=lambda f: f.__name__
)
def test_gradients_of_parameters_in_other_layouts_in_float32(
    backend: str, change: Callable[[nn.Module], None]
) -> None:
    """The bits are those of the usual layout."""
    if backend == "reference" and change is weights_permuted:
        pytest.skip("on some processors, PyTorch multiplies a few rows with other bits for other strides")
    usual = dense_ext.swap(small_densenet().float())
    strided, _ = twin(usual, change)
    x = images().float()
    for model in (usual, strided):
        model(x).square().sum().backward()
    for (name, one), other in zip(usual.named_parameters(), strided.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def as_columns(norm: nn.BatchNorm2d) -> None:
    table = torch.stack([norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var], 1)
    norm.weight, norm.bias = nn.Parameter(table[:, 0]), nn.Parameter(table[:, 1])
    norm.running_mean, norm.running_var = table[:, 2], table[:, 3]


@pytest.mark.filterwarnings("ignore:.*runs its original forward")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "part",
    ["norm0", "denseblock2.denselayer1.norm1", "denseblock1.denselayer2.norm2", "transition1.norm", "norm5"],
)
def test_strided_vectors_where_pytorchs_own_norm_runs(part: str, training: bool) -> None:
    """PyTorch's batch norm is wrong for strided vectors if the images are in channels_last memory."""
    ours, eager = twin(small_densenet().train(training), lambda m: dense_ext.swap(m, strict=True))
    as_columns(ours.features.get_submodule(part))
    x, results = images(), []
    for model in (ours, eager):
        if part != "norm5":  # the last norm is not fused anyway
            model.features.get_submodule(part).register_forward_hook(lambda *_: None)
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        results.append(leaf.grad)
    assert_equal(*results, "input gradient")
    assert_same_state(ours, eager)


# --- images and features ---------------------------------------------------------------------------------


def own(growth_rate: int = 5) -> nn.Module:
    return dense_ext.DenseNet(growth_rate, (2, 3), 8, 3, num_classes=4).double()


def swapped() -> nn.Module:
    return dense_ext.swap(small_densenet())


def with_blocks_only() -> nn.Module:
    """Remove the stem's max pool from the features."""
    model = small_densenet()
    del model.features.pool0
    return dense_ext.swap(model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [own, swapped, with_blocks_only], ids=lambda f: f.__name__)
def test_features_have_the_layout_of_the_images(
    backend: str, make: Callable[[], nn.Module], training: bool
) -> None:
    features = make().train(training).features
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = features(images(64, 64).contiguous(memory_format=memory_format))
        assert found.is_contiguous(memory_format=memory_format)
        assert min(found.shape[1:]) > 1, "so that the two layouts differ"
        if memory_format is torch.contiguous_format:
            found.view(found.shape[0], -1)


def test_features_up_to_any_child_have_the_layout_of_the_images() -> None:
    features = swapped().features
    for end in range(1, len(features) + 1):
        assert features[:end](images()).is_contiguous(), f"up to {end}"


def test_images_may_have_any_layout(backend: str) -> None:
    ours, eager = twin(small_densenet(), dense_ext.swap)
    x = images()
    for other in (x.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([x, x], -1)[..., 1], x.flip(3)):
        assert_trains_alike(ours, eager, other, steps=1)
    # Large enough for several pixels in the last block: equal images of one pixel have no variance there, and
    # normalising would enlarge every rounding error.
    expanded = images(66, 64)[:1].expand(3, -1, -1, -1)
    assert_equal(ours(expanded), eager(expanded), "expanded images")


@pytest.mark.parametrize(
    "layout",
    [
        lambda g: g.contiguous(),
        lambda g: g.contiguous(memory_format=torch.channels_last),
        lambda g: g[:1, :, :1, :1].expand_as(g),
        lambda g: torch.stack([g, g], -1)[..., 0],
        lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=["contiguous", "channels_last", "expanded", "strided", "transposed"],
)
def test_gradients_may_have_any_layout(
    backend: str, recompute: str, layout: Callable[[Tensor], Tensor]
) -> None:
    """The caller's gradient is not modified."""
    network = nn.Sequential(eager_block(2), eager_transition(16, 4), eager_block(1, 4))
    ours, eager = twin(network, lambda m: dense_ext.swap(m, recompute=recompute))
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    grad = layout(torch.randn(2, 9, 2, 2, dtype=torch.float64))
    before = grad.clone()
    for model in (ours, eager):
        model(x).backward(grad)
    assert_same_state(ours, eager)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_image_after_a_backward_hook(memory_format: torch.memory_format) -> None:
    """The hook passes a view, for whose strides PyTorch's batch norm on a CPU computes wrong gradients."""
    ours, eager = twin(small_densenet(), dense_ext.swap)
    for model in (ours, eager):
        model.features.denseblock4.register_full_backward_hook(lambda *_: None)
    x = torch.randn(1, 3, 70, 70, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert_trains_alike(ours, eager, x, steps=1)


def test_one_image_with_a_backward_hook_on_a_norm() -> None:
    """The norm sees such a view, which for contiguous images is contiguous in eager."""
    ours, eager = twin(small_densenet().features, dense_ext.swap)
    for model in (ours, eager):
        model.norm5.register_full_backward_hook(lambda *_: None)
    assert_trains_alike(ours, eager, torch.randn(1, 3, 70, 70, dtype=torch.float64), steps=1)


@pytest.mark.filterwarnings("ignore:.*runs its original forward")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "hooked",
    ["norm0", "denseblock2.denselayer1.conv1", "denseblock2.denselayer3.norm2", "transition2.norm", "norm5"],
)
def test_hooks_see_eagers_layout(hooked: str, memory_format: torch.memory_format) -> None:
    """Tools that compute gradients per sample read what convolutions read by its strides."""
    ours, eager = twin(small_densenet(), dense_ext.swap)
    x = images(70, 70).contiguous(memory_format=memory_format)
    assert layouts_seen(ours, f"features.{hooked}", x) == layouts_seen(eager, f"features.{hooked}", x)


def layouts_seen(model: nn.Module, hooked: str, x: Tensor) -> list[tuple[int, ...]]:
    """The strides of what a module of the model reads and returns."""
    seen: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((inputs[0].stride(), output.stride()))

    with model.get_submodule(hooked).register_forward_hook(note):
        model(x)
    assert len(seen) == 2
    return seen


def layouts_of_gradients(model: nn.Module, hooked: str, x: Tensor) -> list[tuple[int, ...]]:
    """The strides that hooks of a part see: of its input, its output and the gradients of both."""
    seen, part = [], model.get_submodule(hooked)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].stride())
        inputs[0].register_hook(lambda grad: seen.append(grad.stride()))

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda grad: seen.append(grad.stride()))

    def backward(module: nn.Module, *grads: tuple[Tensor, ...]) -> None:
        seen.extend(grad.stride() for (grad,) in grads)

    for register, hook in (
        (part.register_forward_pre_hook, before), (part.register_forward_hook, after),
        (part.register_full_backward_hook, backward), (part.register_full_backward_pre_hook, backward),
    ):  # fmt: skip
        with register(hook):
            model(x).square().sum().backward()
    return seen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("hooked", ["denseblock1", "transition2", "denseblock4"])
def test_hooks_see_gradients_in_eagers_layout(hooked: str, memory_format: torch.memory_format) -> None:
    """A hook that flattens a gradient with view works on both."""
    ours, eager = twin(small_densenet(), dense_ext.swap)
    x = images(70, 70).contiguous(memory_format=memory_format)
    seen, expected = (layouts_of_gradients(model, f"features.{hooked}", x) for model in (ours, eager))
    assert seen == expected
    assert len(seen) == 6
