"""DenseNets for ImageNet and CIFAR, built from fused modules, with torchvision's parameter names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_options
from .modules import DenseBlock, FusedFeatures, Transition

# torchvision's first DenseNet weights have keys such as "norm.1.weight" for the module "norm1".
_OLD_KEY = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


class DenseNet(nn.Module):
    """DenseNet-BC and its relatives.

    Args:
        growth_rate: K, the number of channels each layer adds; a sequence gives one for each block.
        block_config: the number of layers of each block.
        num_init_features: the number of output channels of the first convolution.
        bn_size: the bottleneck's channels as a multiple of K; None for layers without a bottleneck.
        drop_rate: the dropout probability after each dense layer in training.
        num_classes: the number of outputs of the classifier.
        compression: the fraction of its channels that a transition keeps, in (0, 1].
        small_inputs: whether to start with a 3x3 convolution and no pool, for images of about 32x32.
        in_channels: the number of channels of the images.
        recompute, backend: see :class:`dense_ext.DenseBlock`.

    Shapes: [N, in_channels, H, W] -> logits [N, num_classes]. H and W must be large enough for every pool:
    at least 29 with four blocks, or 8 with three blocks and ``small_inputs``.

    Raises:
        ValueError: block_config and growth_rate have different lengths, a size is not positive,
            compression is outside (0, 1], or recompute or backend is unknown.

    Source: arXiv 1608.06993; initialisation as in torchvision. State dicts of torchvision's DenseNets load,
    including those with the old key names.
    """

    def __init__(
        self,
        growth_rate: int | Sequence[int] = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        compression: float = 0.5,
        small_inputs: bool = False,
        in_channels: int = 3,
        *,
        recompute: str = "bottleneck",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(recompute, backend)
        growth = [growth_rate] * len(block_config) if isinstance(growth_rate, int) else list(growth_rate)
        if len(growth) != len(block_config):
            raise ValueError(
                f"growth_rate has {len(growth)} entries, expected {len(block_config)}, one per block"
            )
        sizes = [*growth, *block_config, num_init_features, num_classes, in_channels, bn_size or 1]
        if not block_config or min(sizes) < 1:
            raise ValueError(
                "growth_rate, block_config, num_init_features, num_classes, in_channels and bn_size "
                "must be positive"
            )
        if not 0 < compression <= 1:
            raise ValueError(f"compression must be in (0, 1], got {compression}")

        self.features = FusedFeatures()
        self.features.backend = backend
        if small_inputs:
            self.features.conv0 = nn.Conv2d(in_channels, num_init_features, 3, padding=1, bias=False)
        else:
            self.features.conv0 = nn.Conv2d(
                in_channels, num_init_features, 7, stride=2, padding=3, bias=False
            )
            self.features.norm0 = nn.BatchNorm2d(num_init_features)
            self.features.relu0 = nn.ReLU(inplace=True)
            self.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
        channels = num_init_features
        for i, (layers, k) in enumerate(zip(block_config, growth, strict=True), start=1):
            block = DenseBlock(layers, channels, k, bn_size, drop_rate, recompute=recompute, backend=backend)
            self.features.add_module(f"denseblock{i}", block)
            channels += layers * k
            if i < len(block_config):
                kept = int(channels * compression)
                self.features.add_module(f"transition{i}", Transition(channels, kept, backend=backend))
                channels = kept
        self.features.norm5 = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()
        self.register_load_state_dict_pre_hook(_rename_old_keys)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x), inplace=True)
        pooled = F.adaptive_avg_pool2d(features, (1, 1))
        return self.classifier(torch.flatten(pooled, 1))


def _rename_old_keys(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    for key in list(state_dict):
        if match := _OLD_KEY.match(key):
            state_dict[match.group(1) + match.group(2)] = state_dict.pop(key)


def densenet121(**kwargs: Any) -> DenseNet:
    """DenseNet-121: growth 32, blocks of 6, 12, 24, 16. Arguments as :class:`DenseNet`."""
    return DenseNet(**{"growth_rate": 32, "block_config": (6, 12, 24, 16), **kwargs})


def densenet161(**kwargs: Any) -> DenseNet:
    """DenseNet-161: growth 48, blocks of 6, 12, 36, 24. Arguments as :class:`DenseNet`."""
    return DenseNet(**{"growth_rate": 48, "block_config": (6, 12, 36, 24), "num_init_features": 96, **kwargs})


def densenet169(**kwargs: Any) -> DenseNet:
    """DenseNet-169: growth 32, blocks of 6, 12, 32, 32. Arguments as :class:`DenseNet`."""
    return DenseNet(**{"growth_rate": 32, "block_config": (6, 12, 32, 32), **kwargs})


def densenet201(**kwargs: Any) -> DenseNet:
    """DenseNet-201: growth 32, blocks of 6, 12, 48, 32. Arguments as :class:`DenseNet`."""
    return DenseNet(**{"growth_rate": 32, "block_config": (6, 12, 48, 32), **kwargs})


def densenet264(**kwargs: Any) -> DenseNet:
    """DenseNet-264: growth 32, blocks of 6, 12, 64, 48. Arguments as :class:`DenseNet`."""
    return DenseNet(**{"growth_rate": 32, "block_config": (6, 12, 64, 48), **kwargs})


def _cifar(depth: int, growth_rate: int, bottleneck: bool, **kwargs: Any) -> DenseNet:
    """A three-block network for 32x32 images as in the paper.

    ``depth`` is the number of convolutions, including the transitions', plus one for the classifier.
    """
    layers = (depth - 4) // (6 if bottleneck else 3)
    defaults = {
        "growth_rate": growth_rate,
        "block_config": (layers, layers, layers),
        "num_init_features": 2 * growth_rate if bottleneck else 16,
        "bn_size": 4 if bottleneck else None,
        "compression": 0.5 if bottleneck else 1.0,
        "num_classes": 10,
        "small_inputs": True,
    }
    return DenseNet(**{**defaults, **kwargs})


def densenet_bc_100_12(**kwargs: Any) -> DenseNet:
    """CIFAR DenseNet-BC of depth 100, growth 12: three blocks of 16. Arguments as :class:`DenseNet`."""
    return _cifar(100, 12, bottleneck=True, **kwargs)


def densenet_bc_250_24(**kwargs: Any) -> DenseNet:
    """CIFAR DenseNet-BC of depth 250, growth 24: three blocks of 41. Arguments as :class:`DenseNet`."""
    return _cifar(250, 24, bottleneck=True, **kwargs)


def densenet_bc_190_40(**kwargs: Any) -> DenseNet:
    """CIFAR DenseNet-BC of depth 190, growth 40: three blocks of 31. Arguments as :class:`DenseNet`."""
    return _cifar(190, 40, bottleneck=True, **kwargs)


def densenet_bc_40_12(**kwargs: Any) -> DenseNet:
    """CIFAR-style DenseNet-BC of depth 40, growth 12: three blocks of 6. Arguments as :class:`DenseNet`."""
    return _cifar(40, 12, bottleneck=True, **kwargs)


def densenet_40_12(**kwargs: Any) -> DenseNet:
    """CIFAR DenseNet of depth 40, growth 12, no bottleneck. Arguments as :class:`DenseNet`."""
    return _cifar(40, 12, bottleneck=False, **kwargs)


MODELS = {
    f.__name__: f
    for f in (
        densenet121,
        densenet161,
        densenet169,
        densenet201,
        densenet264,
        densenet_bc_40_12,
        densenet_bc_100_12,
        densenet_bc_250_24,
        densenet_bc_190_40,
        densenet_40_12,
    )
}
