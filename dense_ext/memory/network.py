"""The shape of a DenseNet, which is all that the planner uses of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import MODELS


@dataclass(frozen=True)
class BlockShape:
    """A dense block: L layers, each of which adds K channels, on an input of c0 channels."""

    name: str
    layers: int  # L
    in_channels: int  # c0
    growth_rate: int  # K
    bottleneck: int  # B, or 0 without a bottleneck
    taps: int  # of a layer's last convolution: 9, or 27 for volumes
    drops: bool  # whether any layer has dropout

    @property
    def out_channels(self) -> int:
        return self.in_channels + self.layers * self.growth_rate

    @property
    def read_channels(self) -> list[int]:
        """C, the number of channels read, for each layer."""
        return [self.in_channels + i * self.growth_rate for i in range(self.layers)]

    @property
    def conv_weights(self) -> int:
        """The number of elements of all convolution weights."""
        if self.bottleneck:
            return self.bottleneck * (sum(self.read_channels) + self.layers * self.taps * self.growth_rate)
        return self.taps * self.growth_rate * sum(self.read_channels)

    @property
    def norm_channels(self) -> int:
        """The total number of channels of all norms."""
        return sum(self.read_channels) + self.layers * self.bottleneck


@dataclass(frozen=True)
class TransitionShape:
    """A transition: norm, ReLU, 1x1 convolution, average pool of windows 2 wide."""

    name: str
    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class Network:
    """A DenseNet: stem, blocks and transitions; then norm, ReLU, average pool and classifier.

    If a larger model contains it, parameters, buffers and linear layers are those of the whole model.
    """

    name: str  # the dotted name in the model; "" for the model itself
    in_channels: int  # of the images
    dimensions: int  # 2 for images, 3 for volumes
    channels: int  # of the first convolution's output
    kernel_size: int  # of the first convolution; so are stride and padding
    stride: int
    padding: int
    pools: bool  # whether norm, ReLU and max pool follow the first convolution
    parts: tuple[BlockShape | TransitionShape, ...]
    head: tuple[tuple[int, int], ...]  # in and out features of the classifier's linear layers
    parameter_dtype: torch.dtype
    parameter_bytes: int
    trainable_bytes: int
    largest_bytes: int  # of the largest trainable parameter
    buffer_bytes: int

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        return tuple(part for part in self.parts if isinstance(part, BlockShape))


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _block(name: str, module: Any) -> BlockShape:
    layers = list(module.children())
    convs = [conv for conv in layers[0].modules() if isinstance(conv, (nn.Conv2d, nn.Conv3d))]
    if not convs:
        raise ValueError(f"{name} has no convolutions of images or volumes")
    return BlockShape(
        name,
        len(layers),
        convs[0].in_channels,
        convs[-1].out_channels,
        convs[0].out_channels if len(convs) == 2 else 0,
        math.prod(convs[-1].kernel_size),
        any(getattr(layer, "drop_rate", 0) for layer in layers),
    )


def _parts(features: Any) -> Iterable[BlockShape | TransitionShape]:
    for name, module in features.named_children():
        if name.startswith("denseblock"):
            yield _block(name, module)
        elif name.startswith("transition"):
            yield TransitionShape(name, module.conv.in_channels, module.conv.out_channels)


def _is_densenet(module: nn.Module) -> bool:
    features = module._modules.get("features")
    return features is not None and any(name.startswith("denseblock") for name in features._modules)


def _shape_of(model: Any) -> Network:
    found: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if _is_densenet(m)]
    if len(found) != 1:
        how = f"contains {len(found)} DenseNets" if found else "is not and does not contain a DenseNet"
        raise ValueError(f"{type(model).__name__} {how} with dense blocks in its features, expected one")
    ((name, densenet),) = found
    features = densenet.features
    if hasattr(features, "conv1"):
        raise ValueError("the planner does not follow a stem of several convolutions")
    conv0 = features.conv0
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    return Network(
        name,
        conv0.in_channels,
        len(conv0.kernel_size),
        conv0.out_channels,
        conv0.kernel_size[0],
        conv0.stride[0],
        conv0.padding[0],
        hasattr(features, "pool0"),
        tuple(_parts(features)),
        tuple((m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)),
        conv0.weight.dtype,
        _nbytes(parameters),
        _nbytes(trainable),
        max((_nbytes([p]) for p in trainable), default=0),
        _nbytes(model.buffers()),
    )


def network_of(model: nn.Module | str) -> Network:
    """The shape of a model.

    Args:
        model: a :class:`dense_ext.DenseNet`, a DenseNet that :func:`dense_ext.swap` supports (swapped or
            not), a model that contains one of these, or a name from ``dense_ext.models.MODELS``.

    Raises:
        TypeError: model is neither a module nor a name.
        ValueError: the name is unknown, or the module is not one DenseNet and does not contain one.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}")
        with torch.device("meta"):
            model = MODELS[model]()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a name, got {type(model).__name__}")
    try:
        return _shape_of(model)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} is not a DenseNet: {error}") from error
