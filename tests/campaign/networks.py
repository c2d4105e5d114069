"""The networks and images that the campaign draws, and the options for fusing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from monai.networks.nets import DenseNet as MonaiDenseNet
from timm.models.densenet import DenseNet as TimmDenseNet
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet
from torchxrayvision.models import DenseNet as XrayDenseNet

import dense_ext
from dense_ext.modules import DenseBlock, EagerDenseBlock, FusedDenseBlock, FusedFeatures, Transition
from dense_ext.recognise import Recognised

from ..helpers import randomize
from ..recognition.forms import CONVS, NORMS, Form, block_of, transition_of

CLASSES = 3


@dataclass(frozen=True)
class Network:
    """A small DenseNet of one of the libraries."""

    library: str = "torchvision"
    growth: int = 2
    blocks: tuple[int, ...] = (1,)
    bn_size: int | None = 1
    init: int = 2
    small_inputs: bool = False
    variant: int = 0  # the form of a recognised network's layers and transitions

    def build(self) -> nn.Module:
        """The network in float64, as its library runs it, with the same weights every time."""
        torch.manual_seed(0)
        return randomize(_as_its_library_runs_it(_LIBRARIES[self.library](self))).double()

    @property
    def dimensions(self) -> int:
        """2 for images, 3 for volumes."""
        return 3 if self.library.endswith("3-D") else 2


def _torchvision(of: Network) -> nn.Module:
    return TorchvisionDenseNet(of.growth, of.blocks, of.init, of.bn_size or 1, num_classes=CLASSES)


def _timm(of: Network) -> nn.Module:
    return TimmDenseNet(of.growth, of.blocks, num_classes=CLASSES, bn_size=of.bn_size or 1)


def _xray(of: Network) -> nn.Module:
    return XrayDenseNet(of.growth, of.blocks, of.init, of.bn_size or 1, num_classes=CLASSES, in_channels=3)


def _monai(dimensions: int) -> Callable[[Network], nn.Module]:
    def build(of: Network) -> nn.Module:
        options = {"init_features": of.init, "growth_rate": of.growth, "block_config": of.blocks}
        return MonaiDenseNet(dimensions, 3, CLASSES, bn_size=of.bn_size or 1, **options)

    return build


def _own(of: Network) -> nn.Module:
    options: Any = {"num_classes": CLASSES, "small_inputs": of.small_inputs}
    return dense_ext.DenseNet(of.growth, of.blocks, of.init, of.bn_size, **options)


def _recognised(dimensions: int, encoder: bool = False) -> Callable[[Network], nn.Module]:
    def build(of: Network) -> nn.Module:
        form = replace(VARIANTS[of.variant], dims=dimensions, bottleneck=of.bn_size is not None)
        return (_Encoder if encoder else _Recognised)(form, of)

    return build


class _Recognised(nn.Module):
    """A DenseNet of classes that no library has: its blocks and transitions are recognised."""

    def __init__(self, form: Form, of: Network) -> None:
        super().__init__()
        norm, conv = NORMS[form.dims], CONVS[form.dims]
        channels = of.init
        self.features = nn.Sequential(OrderedDict(conv0=conv(3, channels, 3, padding=1)))
        if not of.small_inputs:
            self.features.add_module("norm0", norm(channels))
            self.features.add_module("relu0", nn.ReLU(inplace=True))
            self.features.add_module("pool0", (nn.MaxPool2d, nn.MaxPool3d)[form.dims - 2](3, 2, 1))
        for i, layers in enumerate(of.blocks, start=1):
            growth = tuple(of.growth + (j % 2 if form.varies else 0) for j in range(max(layers, 2)))
            form = replace(form, growth=growth, widths=tuple((of.bn_size or 1) * k for k in growth))
            block, channels = block_of(form, channels)
            self.features.add_module(f"block{i}", block)
            if i < len(of.blocks):
                self.features.add_module(f"transition{i}", transition_of(form, channels, channels - 1))
                channels -= 1
        self.features.add_module("norm", norm(channels))
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.features(x)).flatten(2).mean(2))


class _Encoder(_Recognised):
    """Calls the stem's and the transitions' modules one by one, and uses what is between."""

    def forward(self, x: Tensor) -> Tensor:
        between = []
        for name, child in self.features.named_children():
            if name.startswith("transition"):
                norm, activation, *others = child.children()
                x = activation(norm(x))
                between.append(x)
                for other in others:
                    x = other(x)
            else:
                x = child(x)
                if name == "relu0":
                    between.append(x)
        x = self.classifier(torch.relu(x).flatten(2).mean(2))
        for activation in between:
            x = x + activation.square().flatten(1).mean(1, keepdim=True)
        return x


VARIANTS = (
    Form(), Form(bias=True), Form(window=5, varies=True), Form(dilation=2, pool="max"),
    Form(activation=nn.ELU(), bias=True), Form(window=1, activation=nn.LeakyReLU(0.2, inplace=True)),
    Form(activation=nn.Identity(), pool="max", bias=True, varies=True), Form(activation=nn.GELU()),
)  # fmt: skip
_LIBRARIES: dict[str, Callable[[Network], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "xray": _xray,
    "monai": _monai(2),
    "own": _own,
    "monai 3-D": _monai(3),
    "recognised": _recognised(2),
    "recognised 3-D": _recognised(3),
    "recognised encoder": _recognised(2, encoder=True),
    "recognised encoder 3-D": _recognised(3, encoder=True),
}
_EAGER = {DenseBlock: EagerDenseBlock, Transition: nn.Sequential, FusedFeatures: nn.Sequential}


def _as_its_library_runs_it(model: nn.Module) -> nn.Module:
    """Make dense_ext's own network run layer by layer, as the other libraries' networks do."""
    for module in model.modules():
        if type(module) in _EAGER:
            module.__class__ = _EAGER[type(module)]
    return model


@dataclass(frozen=True)
class Options:
    """How the dense parts are fused: recompute policies, which the blocks take in turn, and a backend."""

    recompute: tuple[str, ...] = ("bottleneck",)
    backend: str = "auto"

    def fuse(self, model: nn.Module) -> None:
        """Fuse the dense parts in place."""
        if isinstance(model, dense_ext.DenseNet):
            for module in model.modules():
                fused = next((f for f, eager in _EAGER.items() if type(module) is eager), None)
                if fused is FusedFeatures and module is not model.features:
                    fused = Transition if type(module) is nn.Sequential else None
                if fused is not None:
                    module.__class__ = FusedFeatures if module is model.features else fused
                    module.backend, module.recompute = self.backend, self.recompute[0]
        else:
            try:
                dense_ext.swap(model, recompute=self.recompute[0], backend=self.backend)
            except ValueError as error:
                if "contains no dense block" not in str(error):  # after a change, none may be recognised
                    raise
        blocks: list[Any] = [m for m in model.modules() if isinstance(m, (FusedDenseBlock, Recognised))]
        for i, block in enumerate(blocks):
            block.recompute = self.recompute[i % len(self.recompute)]


@dataclass(frozen=True)
class Images:
    """A batch, its memory layout, and whether it requires a gradient."""

    batch: int = 2
    sizes: tuple[int, ...] = (16, 16)
    layout: str = "contiguous"
    requires_grad: bool = True

    def make(self) -> Tensor:
        """The images as a leaf tensor."""
        shape = (self.batch, 3, *self.sizes)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return LAYOUTS[self.layout](x).requires_grad_(self.requires_grad)


def _strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _offset(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(
        memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    ),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": _strided,
    "offset": _offset,
    # Equal channels, not equal images: these have no variance left where a single pixel remains.
    "expanded": lambda x: x[:, :1].expand_as(x),
    "channels first in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}

networks = st.builds(
    Network,
    library=st.sampled_from(list(_LIBRARIES)),
    # Not 1: a tensor of one channel is in both memory formats, and eager's concatenation may pick either.
    growth=st.integers(2, 5),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    bn_size=st.sampled_from([1, 2, 3, None]),
    init=st.integers(2, 6),
    small_inputs=st.booleans(),
    variant=st.integers(0, len(VARIANTS) - 1),
)
options = st.builds(
    Options,
    recompute=st.lists(st.sampled_from(["bottleneck", "none", "block"]), min_size=1, max_size=3).map(tuple),
    backend=st.sampled_from(["auto", "reference", "cpu"]),
)


def images_for(network: Network) -> st.SearchStrategy[Images]:
    """Images that are large enough for the network's pools, except a few."""
    enough = 2 ** (len(network.blocks) + 1) + 1
    sizes = st.integers(-1, 15).map(lambda more: max(1, enough + more if more >= 0 else enough // 2))
    return st.builds(
        Images,
        batch=st.sampled_from([2, 1, 3, 4]),
        sizes=st.tuples(*[sizes] * network.dimensions),
        layout=st.sampled_from(list(LAYOUTS)),
        requires_grad=st.sampled_from([True, True, True, False]),
    )
