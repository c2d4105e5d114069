"""The changes that the campaign makes to a network, before or after its dense parts are fused.

A change is a function of the model and a number that selects the module to change.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import dense_ext
from dense_ext.eligibility import Fused

CHANGES: dict[str, Callable[[nn.Module, int], nn.Module | None]] = {}
Changing = Callable[[nn.Module, int], Any]


def _change(function: Changing) -> Changing:
    CHANGES[function.__name__] = function
    return function


@dataclass(frozen=True)
class Change:
    """One change; it may replace the model by another."""

    what: str
    at: int = 0

    def apply(self, model: nn.Module) -> nn.Module:
        """The changed model; unchanged if it has no such module."""
        try:
            return CHANGES[self.what](model, self.at) or model
        except NoSuchModule:
            return model


class NoSuchModule(Exception):  # noqa: N818
    """The model has no module to which the change applies."""


changes = st.lists(
    st.deferred(lambda: st.builds(Change, what=st.sampled_from(list(CHANGES)), at=st.integers(0, 40))),
    max_size=3,
).map(tuple)

# --- selecting modules -------------------------------------------------------------------------------------

_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool2d, nn.MaxPool3d)


def _features(model: Any) -> nn.Sequential:
    return model.features


def _pick(model: nn.Module, at: int, kind: Any = nn.Module) -> Any:
    return _pick_with_parent(model, at, kind)[2]


def _pick_with_parent(model: nn.Module, at: int, kind: Any = nn.Module) -> tuple[Any, str, Any]:
    """Parent, name and module of number ``at`` of a kind inside the features, modulo their number."""
    found = [
        (parent, name, child)
        for parent in _features(model).modules()
        for name, child in parent._modules.items()
        if isinstance(child, kind)
    ]
    if not found:
        raise NoSuchModule
    return found[at % len(found)]


def _layers(model: nn.Module) -> Iterator[list[Any]]:
    """The layers of each block."""
    for name, child in _features(model).named_children():
        if "block" in name:
            yield list(child.children())


# --- hooks -----------------------------------------------------------------------------------------------

#: What the hooks have seen, in the order they ran; the code that runs a model clears it.
SEEN: list[Tensor] = []


def _see(values: Any) -> None:
    for value in values if isinstance(values, tuple) else (values,):
        if isinstance(value, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(value):
            SEEN.append(value.detach().clone())


def read_input(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that only reads."""
    _see(args)


def write_input(module: nn.Module, args: Any) -> Any:
    """A forward pre-hook that returns another input."""
    return tuple(a * 1.5 if isinstance(a, Tensor) else a for a in args)


def write_into_input(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that writes in place."""
    if isinstance(args[0], Tensor):
        args[0].mul_(1.5)


def read_output(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that only reads."""
    _see(output)


def write_output(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that returns another output."""
    return output * 0.5


def write_into_output(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that writes in place."""
    output.mul_(0.5)


def read_gradients(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """A full backward hook that only reads."""
    _see(inputs)
    _see(outputs)


def write_gradients(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A full backward hook that returns other gradients."""
    return tuple(g if g is None else g * 1.5 for g in inputs)


def read_output_gradient(module: nn.Module, outputs: Any) -> None:
    """A full backward pre-hook that only reads."""
    _see(outputs)


def write_output_gradient(module: nn.Module, outputs: Any) -> Any:
    """A full backward pre-hook that returns another gradient."""
    return tuple(g if g is None else g * 1.5 for g in outputs)


_HOOKS = {
    read_input: "register_forward_pre_hook",
    write_input: "register_forward_pre_hook",
    write_into_input: "register_forward_pre_hook",
    read_output: "register_forward_hook",
    write_output: "register_forward_hook",
    write_into_output: "register_forward_hook",
    read_gradients: "register_full_backward_hook",
    write_gradients: "register_full_backward_hook",
    read_output_gradient: "register_full_backward_pre_hook",
    write_output_gradient: "register_full_backward_pre_hook",
}


def _hook_changes() -> None:
    def on_any(register: str, hook: Any, model: nn.Module, at: int) -> None:
        getattr(_pick(model, at), register)(hook)

    def on_child(register: str, hook: Any, model: nn.Module, at: int) -> None:
        """A hook on the features or one of its children, where fused parts are called."""
        children = [*_features(model).children(), _features(model)]
        getattr(children[at % len(children)], register)(hook)

    for hook, register in _HOOKS.items():
        CHANGES[f"{hook.__name__} of any"] = functools.partial(on_any, register, hook)
        CHANGES[f"{hook.__name__} of a child"] = functools.partial(on_child, register, hook)


_hook_changes()


@_change
def hook_of_tensor(model: nn.Module, at: int) -> None:
    """A hook on a parameter's gradient."""
    parameters = list(model.parameters())
    parameters[at % len(parameters)].register_hook(_doubled)


def _doubled(grad: Tensor) -> Tensor:
    return grad * 2


# --- modules exchanged --------------------------------------------------------------------------------


def _exchange(kind: Any, make: Callable[[Any], nn.Module]) -> Changing:
    def change(model: nn.Module, at: int) -> None:
        parent, name, module = _pick_with_parent(model, at, kind)
        new = make(module).double().train(module.training)
        setattr(parent, name, new)

    return change


def _norm_like(**options: Any) -> Callable[[Any], nn.Module]:
    return lambda old: type(old)(old.num_features, **options)


def _as_other_norm(old: Any) -> nn.Module:
    return nn.GroupNorm(1, old.num_features)


def _as_frozen_norm(old: Any) -> nn.Module:
    new = FrozenBatchNorm2d(old.num_features)
    new.load_state_dict({k: v for k, v in old.state_dict().items() if k in new.state_dict()})
    return new


def _as_instance_norm(old: Any) -> nn.Module:
    kind = nn.InstanceNorm3d if isinstance(old, nn.BatchNorm3d) else nn.InstanceNorm2d
    return kind(old.num_features, affine=True)


def _as_sync_norm(old: Any) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(old).eval()


def _conv_like(**options: Any) -> Callable[[Any], nn.Module]:
    def make(old: Any) -> nn.Module:
        torch.manual_seed(2)
        size, stride, padding = old.kernel_size, old.stride, old.padding
        return type(old)(
            old.in_channels, old.out_channels, size,
            **{"stride": stride, "padding": padding, "bias": False, **options},
        )  # fmt: skip

    return make


def _pool_like(kind: str, **options: Any) -> Callable[[Any], nn.Module]:
    def make(old: Any) -> nn.Module:
        return getattr(nn, f"{kind}Pool{type(old).__name__[-2:]}")(**options)

    return make


CHANGES.update({
    "norm by a new one": _exchange(_NORMS, _norm_like()),
    "norm by one of another eps": _exchange(_NORMS, _norm_like(eps=0.1)),
    "norm by one without parameters": _exchange(_NORMS, _norm_like(affine=False)),
    "norm by one without running statistics": _exchange(_NORMS, _norm_like(track_running_stats=False)),
    "norm by one without anything": _exchange(_NORMS, _norm_like(affine=False, track_running_stats=False)),
    "norm by one of cumulative momentum": _exchange(_NORMS, _norm_like(momentum=None)),
    "norm by GroupNorm": _exchange(_NORMS, _as_other_norm),
    "norm by InstanceNorm": _exchange(_NORMS, _as_instance_norm),
    "norm by FrozenBatchNorm2d": _exchange(nn.BatchNorm2d, _as_frozen_norm),
    "norm by SyncBatchNorm in eval": _exchange(_NORMS, _as_sync_norm),
    "norm by Identity": _exchange(_NORMS, lambda old: nn.Identity()),
    "ReLU by SiLU": _exchange(nn.ReLU, lambda old: nn.SiLU()),
    "ReLU by another": _exchange(nn.ReLU, lambda old: nn.ReLU(inplace=not old.inplace)),
    "ReLU by Identity": _exchange(nn.ReLU, lambda old: nn.Identity()),
    "convolution by a new one": _exchange(_CONVS, _conv_like()),
    "convolution by one with bias": _exchange(_CONVS, _conv_like(bias=True)),
    "convolution by one that reflects": _exchange(_CONVS, _conv_like(padding_mode="reflect")),
    "pool by one of 3": _exchange(_POOLS, _pool_like("Avg", kernel_size=3, stride=2, padding=1)),
    "pool by a maximum": _exchange(_POOLS, _pool_like("Max", kernel_size=2)),
    "pool by an average": _exchange(_POOLS, _pool_like("Avg", kernel_size=2)),
    "pool by an equal one": _exchange(_POOLS, copy.deepcopy),
})  # fmt: skip


@_change
def add_a_module(model: nn.Module, at: int) -> None:
    """Append a module to a Sequential of the features."""
    _pick(model, at, nn.Sequential).add_module("more", nn.Tanh())


@_change
def insert_a_module(model: nn.Module, at: int) -> None:
    """Insert a module between the children of the features."""
    features = _features(model)
    children = list(features.named_children())
    children.insert(at % (len(children) + 1), ("more", nn.Softplus()))
    features._modules.clear()
    features._modules.update(children)


@_change
def take_out_a_module(model: nn.Module, at: int) -> None:
    """Remove a module."""
    parent, name, _ = _pick_with_parent(model, at)
    delattr(parent, name)


@_change
def share_a_norm(model: nn.Module, at: int) -> None:
    """Two layers of a block share norm2."""
    _share(model, at, "norm2")


@_change
def share_a_convolution(model: nn.Module, at: int) -> None:
    """Two layers of a block share conv2."""
    _share(model, at, "conv2")


def _share(model: nn.Module, at: int, name: str) -> None:
    if blocks := [layers for layers in _layers(model) if len(layers) > 1]:
        first, second, *_ = (getattr(layer, "layers", layer) for layer in blocks[at % len(blocks)])
        if name in first._modules:
            setattr(second, name, getattr(first, name))


@_change
def share_a_weight(model: nn.Module, at: int) -> None:
    """Two convolutions share a Parameter."""
    convs = [m for m in _features(model).modules() if isinstance(m, _CONVS)]
    one = convs[at % len(convs)]
    for other in convs:
        if other.weight.shape == one.weight.shape:
            other.weight = one.weight


@_change
def exchange_layers(model: nn.Module, at: int) -> None:
    """Exchange the first and the last layer of a block; it works if their widths are equal."""
    blocks = list(_layers(model))
    for child in _features(model).children():
        if blocks and list(child.children()) == blocks[at % len(blocks)]:
            items = list(child._modules.items())
            child._modules.clear()
            child._modules.update(reversed(items))


# --- attributes ------------------------------------------------------------------------------------------


def _set(kind: Any, **attributes: Any) -> Changing:
    def change(model: nn.Module, at: int) -> None:
        module = _pick(model, at, kind)
        for name, value in attributes.items():
            setattr(module, name, value)

    return change


CHANGES.update({
    "eps": _set(_NORMS, eps=0.5),
    "momentum": _set(_NORMS, momentum=0.7),
    "momentum 0": _set(_NORMS, momentum=0.0),
    "momentum 1": _set(_NORMS, momentum=1),
    "momentum None": _set(_NORMS, momentum=None),
    "no tracking": _set(_NORMS, track_running_stats=False),
    "no running statistics": _set(_NORMS, running_mean=None, running_var=None),
    "no counter": _set(_NORMS, num_batches_tracked=None),
    "no norm weight": _set(_NORMS, weight=None),
    "no norm bias": _set(_NORMS, bias=None),
    "not in place": _set(nn.ReLU, inplace=False),
    "padding circular": _set(_CONVS, padding_mode="circular"),
    "padding 'same'": _set(_CONVS, padding="same"),
    "padding (0, 0)": _set(nn.Conv2d, padding=(0, 0)),
    "dilated": _set(nn.Conv2d, padding=(2, 2), dilation=(2, 2)),
    "stride 2": _set(nn.Conv2d, stride=(2, 2)),
    "pool in a tuple": _set((nn.AvgPool2d, nn.MaxPool2d), stride=(2, 2)),
    "pool rounds up": _set(_POOLS, ceil_mode=True),
    "pool's divisor": _set((nn.AvgPool2d, nn.AvgPool3d), divisor_override=3),
    "pool does not count": _set((nn.AvgPool2d, nn.AvgPool3d), count_include_pad=False),
    "pool of stride 1": _set(_POOLS, stride=1),
    "an attribute of one's own": _set(nn.Module, note="mine"),
})  # fmt: skip


@_change
def drop_everything(model: nn.Module, at: int) -> None:
    """Layers drop all their outputs, which makes dropout deterministic."""
    blocks = list(_layers(model))
    for layer in blocks[at % len(blocks)] if blocks else ():
        if hasattr(layer, "drop_rate"):
            layer.drop_rate = 1.0


@_change
def weight_as_a_plain_tensor(model: nn.Module, at: int) -> None:
    """A weight is a plain tensor and not a Parameter, as in functional code."""
    conv = _pick(model, at, _CONVS)
    weight = conv.weight.detach().clone().requires_grad_()
    del conv.weight
    conv.weight = weight * 1


@_change
def norm_weight_as_a_buffer(model: nn.Module, at: int) -> None:
    """A norm's weight is a buffer, which is not trained."""
    norm = _pick(model, at, _NORMS)
    weight = norm.weight.detach().clone()
    del norm.weight
    norm.register_buffer("weight", weight)


class OwnParameter(nn.Parameter):
    """A user-defined subclass of Parameter."""


@_change
def weight_of_another_class(model: nn.Module, at: int) -> None:
    """A weight is of a subclass of Parameter."""
    conv = _pick(model, at, (*_CONVS, *_NORMS))
    conv.weight = OwnParameter(conv.weight.detach().clone())


# --- modes, partly ---------------------------------------------------------------------------------------


@_change
def part_in_eval(model: nn.Module, at: int) -> None:
    """One module and its children are in eval mode."""
    _pick(model, at).eval()


@_change
def part_in_train(model: nn.Module, at: int) -> None:
    """One module and its children are in training mode."""
    _pick(model, at).train()


@_change
def all_norms_in_eval(model: nn.Module, at: int) -> None:
    """All norms are in eval mode, as for fine-tuning."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.eval()


@_change
def part_frozen(model: nn.Module, at: int) -> None:
    """One module's parameters require no gradients."""
    _pick(model, at).requires_grad_(False)


@_change
def all_frozen_but_one(model: nn.Module, at: int) -> None:
    """Only one module's parameters require gradients."""
    model.requires_grad_(False)
    _pick(model, at, (*_NORMS, *_CONVS)).requires_grad_(True)


# --- parameters' memory ------------------------------------------------------------------------------


def _strided(t: Tensor) -> Tensor:
    return t.detach().repeat_interleave(2, -1)[..., ::2]


def _offset(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 3)[3:].view(t.shape).copy_(t.detach())


def _permuted(t: Tensor) -> Tensor:
    return t.detach().transpose(0, 1).contiguous().transpose(0, 1)


def _reversed_memory(t: Tensor) -> Tensor:
    order = list(reversed(range(t.dim())))
    return t.detach().permute(order).contiguous().permute(order)


def _expanded(t: Tensor) -> Tensor:
    return t.detach().reshape(-1)[:1].reshape([1] * t.dim()).expand_as(t)


@_change
def norm_vectors_strided(model: nn.Module, at: int) -> None:
    """Every vector of a norm in a block or transition, with the running statistics, is a strided slice.

    Where a network itself runs a norm after a fused part, PyTorch's own fault shows, as in eager with
    channels_last images: see :func:`norm_vectors_dense`.
    """
    parent, _, norm = _pick_with_parent(model, at, _NORMS)
    if parent is _features(model):
        raise NoSuchModule
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None:
            tensor.data = _strided(tensor)


@_change
def norm_vectors_offset(model: nn.Module, at: int) -> None:
    """Every vector of a norm begins at an offset in its storage."""
    norm = _pick(model, at, _NORMS)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None:
            tensor.data = _offset(tensor)


@_change
def norm_weight_expanded(model: nn.Module, at: int) -> None:
    """A norm's weight is one number expanded over all channels."""
    norm = _pick(model, at, _NORMS)
    for tensor in (norm.weight, norm.bias):
        if tensor is not None:
            tensor.data = _expanded(tensor)
            tensor.requires_grad_(False)


@_change
def weights_channels_last(model: nn.Module, at: int) -> nn.Module:
    """Weights are in channels_last memory, as after `model.to(memory_format=torch.channels_last)`."""
    volumes = any(isinstance(m, nn.Conv3d) for m in model.modules())
    return model.to(memory_format=torch.channels_last_3d if volumes else torch.channels_last)


def _weights_in(layout: Callable[[Tensor], Tensor]) -> Changing:
    def change(model: nn.Module, at: int) -> None:
        conv = _pick(model, at, _CONVS)
        conv.weight.data = layout(conv.weight)

    return change


CHANGES.update({
    "weight strided": _weights_in(_strided),
    "weight offset": _weights_in(_offset),
    "weight permuted": _weights_in(_permuted),
    "weight reversed in memory": _weights_in(_reversed_memory),
    "weight expanded": _weights_in(_expanded),
})  # fmt: skip


def norm_vectors_dense(model: nn.Module) -> None:
    """Make every vector of a norm dense.

    In the backward of channels_last images, eager PyTorch 2.11 on a CPU assumes that they are, and reads
    the wrong memory if they are not.
    """
    for norm in model.modules():
        if isinstance(norm, _NORMS):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                if tensor is not None and not tensor.is_contiguous():
                    tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


# --- parametrizations and patches ------------------------------------------------------------------------


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


@_change
def parametrized(model: nn.Module, at: int) -> None:
    """A weight is computed by a parametrization."""
    parametrize.register_parametrization(_pick(model, at, (*_CONVS, *_NORMS)), "weight", Scaled())


@_change
def weight_normalized(model: nn.Module, at: int) -> None:
    """A weight has weight norm as a parametrization."""
    parametrizations.weight_norm(_pick(model, at, _CONVS))


@_change
def weight_normalized_by_a_hook(model: nn.Module, at: int) -> None:
    """A weight has the older weight norm, which uses a hook."""
    nn.utils.weight_norm(_pick(model, at, _CONVS))


@_change
def spectrally_normalized(model: nn.Module, at: int) -> None:
    """A weight has spectral norm, which has buffers."""
    torch.manual_seed(3)
    parametrizations.spectral_norm(_pick(model, at, _CONVS))


@_change
def pruned(model: nn.Module, at: int) -> None:
    """Pruning sets half of a weight to zero at each call."""
    prune.l1_unstructured(_pick(model, at, _CONVS), "weight", amount=0.5)


@_change
def patched(model: nn.Module, at: int) -> None:
    """An instance gets its own forward, which wraps the previous one."""
    module = _pick(model, at)
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 0.5


@_change
def patched_child(model: nn.Module, at: int) -> None:
    """The same for the features or one of their children."""
    children = [*_features(model).children(), _features(model)]
    module = children[at % len(children)]
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 0.5


@_change
def checkpointed(model: nn.Module, at: int) -> None:
    """A child of the features is recomputed in backward; in eval mode, so that it counts no step."""
    children = list(_features(model).children())
    module = children[at % len(children)].eval()
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


@_change
def of_a_subclass(model: nn.Module, at: int) -> None:
    """A module's class is a user-defined subclass of its previous class."""
    module = _pick(model, at)
    kind: Any = type(module)
    module.__class__ = type("Own", (kind,), {"forward": lambda self, *a: kind.forward(self, *a) * 0.5})


@_change
def inner_method_patched(model: nn.Module, at: int) -> None:
    """A convolution instance gets its own ``_conv_forward``."""
    conv = _pick(model, at, _CONVS)
    inner = conv._conv_forward
    conv._conv_forward = lambda *args: inner(*args) * 0.5


# --- round trips ----------------------------------------------------------------------------------------


@_change
def deepcopied(model: nn.Module, at: int) -> nn.Module:
    """Continue with a deep copy."""
    return copy.deepcopy(model)


@_change
def pickled(model: nn.Module, at: int) -> nn.Module:
    """Continue with the unpickled model."""
    return pickle.loads(pickle.dumps(model))


@_change
def state_loaded(model: nn.Module, at: int) -> None:
    """Load a changed state dict."""
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


@_change
def state_assigned(model: nn.Module, at: int) -> None:
    """Load the state dict with assign=True, which replaces the Parameters."""
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


@_change
def there_and_back(model: nn.Module, at: int) -> None:
    """Convert to float32, which rounds the weights, and back to float64."""
    model.float().double()


@_change
def restored(model: nn.Module, at: int) -> None:
    """Restore the model if it was swapped, and call it."""
    dense_ext.restore(model)


@_change
def swapped_again(model: nn.Module, at: int) -> None:
    """Swap again with another policy if it was swapped."""
    if any(isinstance(m, Fused) for m in model.modules()) and not isinstance(model, dense_ext.DenseNet):
        dense_ext.swap(model, recompute=("none", "block", "bottleneck")[at % 3])


@_change
def restored_for_a_while(model: nn.Module, at: int) -> None:
    """Restore the original temporarily, as for a tool."""
    with dense_ext.restored(model):
        pass


@_change
def called_once(model: nn.Module, at: int) -> None:
    """Call the model once, so that later changes come after snapshots have been taken."""
    dimensions = 3 if any(isinstance(m, nn.Conv3d) for m in model.modules()) else 2
    with torch.no_grad():
        model(torch.linspace(-1, 1, 2 * 3 * 16**dimensions).double().view(2, 3, *[16] * dimensions))
