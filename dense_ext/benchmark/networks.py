"""The networks compared: torchvision's DenseNet of the same shape as one of ``dense_ext.models.MODELS``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet
from torchvision.models.densenet import _DenseBlock

from .. import modules
from ..models import MODELS, DenseNet
from .errors import UnavailableError, UsageError

# What dense_ext's own modules are without fusion.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    modules.DenseBlock: modules.EagerDenseBlock,
    modules.Transition: nn.Sequential,
    modules.FusedFeatures: nn.Sequential,
}


def check_model_name(name: str) -> None:
    """Raise UsageError unless ``name`` is one of ``dense_ext.models.MODELS``."""
    if name not in MODELS:
        raise UsageError(f"model must be one of {', '.join(MODELS)}; got {name!r}")


def takes_small_images(model: DenseNet) -> bool:
    """Whether the network has the stem for images of about 32x32."""
    return not hasattr(model.features, "norm0")


def torchvision_twin(
    model: DenseNet, memory_efficient: bool = False, device: str = "meta"
) -> TorchvisionDenseNet:
    """Torchvision's DenseNet of ``model``'s shape; on the meta device unless told otherwise.

    Parameter names are the same, so ``model.state_dict()`` loads. For small images the stem is cut
    down to its convolution.

    Raises:
        UsageError: torchvision's DenseNet has no such shape.
    """
    shapes = _shapes(model)
    init_features, in_channels = shapes["features.conv0.weight"][:2]
    if "features.denseblock1.denselayer1.conv2.weight" not in shapes:
        raise UsageError("torchvision has no DenseNet without bottleneck layers")
    growth, bottleneck = shapes["features.denseblock1.denselayer1.conv2.weight"][:2]
    blocks = [m for m in model.features if isinstance(m, modules.DenseBlock)]
    with torch.device(device):
        twin = TorchvisionDenseNet(
            growth_rate=growth,
            block_config=tuple(len(block) for block in blocks),
            num_init_features=init_features,
            bn_size=bottleneck // growth,
            num_classes=model.classifier.out_features,
            memory_efficient=memory_efficient,
        )
        if takes_small_images(model):
            twin.features.conv0 = nn.Conv2d(in_channels, init_features, 3, padding=1, bias=False)
            del twin.features.norm0, twin.features.relu0, twin.features.pool0
    if _shapes(twin) != shapes:
        raise UsageError("torchvision has no DenseNet of this shape")
    return twin


def timm_twin(model: DenseNet) -> nn.Module:
    """DenseNet of timm, of ``model``'s shape, on the meta device; its parameters have the same names.

    Raises:
        UnavailableError: timm is not installed, or its DenseNet has no such shape.
    """
    try:
        from timm.models.densenet import DenseNet as TimmDenseNet
    except ImportError as error:
        raise UnavailableError(f"timm is not installed: {error}") from error
    shapes = _shapes(model)
    if "features.denseblock1.denselayer1.conv2.weight" not in shapes:
        raise UnavailableError("timm has no DenseNet without bottleneck layers")
    growth, bottleneck = shapes["features.denseblock1.denselayer1.conv2.weight"][:2]
    init_features, in_channels = shapes["features.conv0.weight"][:2]
    with torch.device("meta"):
        twin = TimmDenseNet(
            growth_rate=growth,
            block_config=tuple(len(m) for m in model.features if isinstance(m, modules.DenseBlock)),
            bn_size=bottleneck // growth,
            num_classes=model.classifier.out_features,
            in_chans=in_channels,
        )
        if takes_small_images(model):
            twin.features.conv0 = nn.Conv2d(in_channels, init_features, 3, padding=1, bias=False)
            del twin.features.norm0, twin.features.pool0
    if _shapes(twin) != shapes:
        raise UnavailableError("timm has no DenseNet of this shape")
    return twin


def checkpoint_blocks(network: nn.Module) -> None:
    """Put torch.utils.checkpoint around each of torchvision's dense blocks, in place."""
    for block in network.modules():
        if isinstance(block, _DenseBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def small_densenet(depth: int, growth_rate: int) -> DenseNet:
    """The papers' DenseNet-BC for images of 32x32: three equal blocks, ``depth`` = 6n + 4 convolutions."""
    layers = (depth - 4) // 6
    return DenseNet(growth_rate, (layers,) * 3, 2 * growth_rate, num_classes=10, small_inputs=True)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict(keep_vars=True).items()}


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
