"""The DenseNets of KernelBench's level 3 (arXiv 2502.10517), and a DenseNet-BC as many repositories write it.

The classes are those of a user whom dense_ext does not know: no adapter is for them, and ``dense_ext.swap``
recognises them by what their forward computes. Layers are *plain*: one 3x3 convolution without a bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Layers of each dense block.
DENSENET_121, DENSENET_201 = (6, 12, 24, 16), (6, 12, 48, 32)
_STEM = 64  # channels


def _convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


class PlainLayer(nn.Sequential):
    """Norm, ReLU, 3x3 convolution, and a dropout that drops nothing."""

    def __init__(self, channels: int, growth: int) -> None:
        convolution = _convolution(channels, growth, 3)
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), convolution, nn.Dropout(0.0))


class ListedBlock(nn.Module):
    """A dense block of plain layers that keeps the features so far in a list."""

    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(channels + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features, dim=1)


class Shrink(nn.Sequential):
    """A transition: norm, ReLU, 1x1 convolution and 2x2 average pool."""

    def __init__(self, inputs: int, outputs: int) -> None:
        convolution = _convolution(inputs, outputs, 1)
        super().__init__(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), convolution, nn.AvgPool2d(2))


class PlainDenseNet(nn.Module):
    """A DenseNet for ImageNet's images whose layers are plain."""

    def __init__(self, blocks: Sequence[int], growth: int = 32, classes: int = 10) -> None:
        super().__init__()
        stem = nn.Conv2d(3, _STEM, 7, stride=2, padding=3, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(_STEM), nn.ReLU(inplace=True), pool)
        # Each block's input has half of the channels that the block before it returns.
        inputs = list(accumulate(blocks, lambda width, n: (width + n * growth) // 2, initial=_STEM))
        pairs = list(zip(blocks, inputs, strict=False))
        outputs = [width + layers * growth for layers, width in pairs]
        self.blocks = nn.ModuleList(ListedBlock(layers, width, growth) for layers, width in pairs)
        self.shrinks = nn.ModuleList(Shrink(width, width // 2) for width in outputs[:-1])
        self.norm = nn.BatchNorm2d(outputs[-1])
        self.classifier = nn.Linear(outputs[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        for shrink, block in zip(self.shrinks, self.blocks[1:], strict=True):
            x = block(shrink(x))
        x = F.adaptive_avg_pool2d(F.relu(self.norm(x), inplace=True), 1)
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


class JoinedLayer(nn.Module):
    """A layer with a bottleneck, which returns its input with the new features behind it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.reduce = _convolution(channels, 4 * growth, 1)
        self.grow = _convolution(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        new = self.reduce(F.relu(self.norm1(x)))
        return torch.cat((x, self.grow(F.relu(self.norm2(new)))), dim=1)


class JoinedDenseNet(nn.Module):
    """A DenseNet-BC for images of 32x32, with three blocks of ``layers`` layers."""

    def __init__(self, layers: int, growth: int = 12, classes: int = 10) -> None:
        super().__init__()
        width = 2 * growth
        steps: list[nn.Module] = []
        for block in range(3):
            if block:
                steps.append(Shrink(width, width // 2))
                width //= 2
            steps += [JoinedLayer(width + i * growth, growth) for i in range(layers)]
            width += layers * growth
        self.stem = _convolution(3, 2 * growth, 3)
        self.features = nn.Sequential(*steps)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.features(self.stem(x))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
