"""The networks compared: torchvision's DenseNet of the same shape as one of ``dense_ext.MODELS``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet

from .. import modules
from ..models import MODELS, DenseNet
from .errors import UsageError

# What dense_ext's own modules are without fusion.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    modules.DenseBlock: modules.EagerDenseBlock,
    modules.Transition: nn.Sequential,
    modules.StemNorm: nn.BatchNorm2d,
    modules.StemReLU: nn.ReLU,
    modules.StemMaxPool: nn.MaxPool2d,
}


def check_model_name(name: str) -> None:
    """Raise UsageError unless ``name`` is one of ``dense_ext.MODELS``."""
    if name not in MODELS:
        raise UsageError(f"model must be one of {', '.join(MODELS)}; got {name!r}")


def takes_small_images(model: DenseNet) -> bool:
    """Whether the network has the stem for images of about 32x32."""
    return not hasattr(model.features, "norm0")


def torchvision_twin(model: DenseNet, memory_efficient: bool = False) -> TorchvisionDenseNet:
    """torchvision's DenseNet of ``model``'s shape, without values: on the meta device.

    Parameter names are the same, so ``model.state_dict()`` loads. For small images the stem is cut
    down to its convolution.

    Raises:
        UsageError: torchvision's DenseNet has no such shape.
    """
    features = model.features
    blocks = [m for m in features if isinstance(m, modules.DenseBlock)]
    conv0, first = features.conv0, blocks[0]["denselayer1"]
    bottleneck = first._modules.get("conv2")
    if not isinstance(bottleneck, nn.Conv2d):
        raise UsageError("torchvision has no DenseNet without bottleneck layers")
    growth = bottleneck.out_channels
    with torch.device("meta"):
        twin = TorchvisionDenseNet(
            growth_rate=growth,
            block_config=tuple(len(block) for block in blocks),  # type: ignore[arg-type]
            num_init_features=conv0.out_channels,
            bn_size=bottleneck.in_channels // growth,
            num_classes=model.classifier.out_features,
            memory_efficient=memory_efficient,
        )
        if takes_small_images(model):
            twin.features.conv0 = nn.Conv2d(
                conv0.in_channels, conv0.out_channels, kernel_size=3, padding=1, bias=False
            )
            del twin.features.norm0, twin.features.relu0, twin.features.pool0
    shapes = {name: t.shape for name, t in twin.state_dict().items()}
    if shapes != {name: t.shape for name, t in model.state_dict().items()}:
        raise UsageError("torchvision has no DenseNet of this shape")
    return twin


def with_weights(network: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A network from the meta device, given memory on ``device`` and the values of ``weights``."""
    network = network.to_empty(device=device)
    network.load_state_dict(weights)
    return network


def plain(model: DenseNet) -> DenseNet:
    """Make ``model`` run PyTorch's own modules one by one, in place; returns it."""
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    return model
