"""The networks compared, torchvision's and timm's of the same shape as one of ours, and their arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from .. import modules
from ..memory.network import network_of
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


def image_size(name: str, large: int = 224) -> int:
    """Height and width of the images that one of the family is made for: CIFAR's 32 pixels, or ``large``."""
    return large if network_of(name).pools else 32


def torchvision_twin(model: DenseNet, memory_efficient: bool = False, device: str = "meta") -> Any:
    """Torchvision's DenseNet of ``model``'s shape; on the meta device unless told otherwise.

    Parameter names are the same, so ``model.state_dict()`` loads. For small images the stem is cut
    down to its convolution.

    Raises:
        UnavailableError: torchvision's DenseNet has no such shape.
    """
    from torchvision.models import DenseNet as Library

    stem: Any = model.features.conv0
    library = partial(Library, num_init_features=stem.out_channels, memory_efficient=memory_efficient)
    return _twin(model, library, device, "torchvision")


def timm_twin(model: DenseNet, memory_efficient: bool = False) -> Any:
    """The same of timm's, on the meta device.

    Raises:
        UnavailableError: timm is not installed, or its DenseNet has no such shape.
    """
    try:
        from timm.models.densenet import DenseNet as Library
    except ImportError as error:
        raise UnavailableError(f"timm is not installed: {error}") from error

    stem: Any = model.features.conv0
    library = partial(Library, in_chans=stem.in_channels, memory_efficient=memory_efficient)
    return _twin(model, library, "meta", "timm")


def _twin(model: DenseNet, library: Callable[..., Any], device: str, name: str) -> Any:
    """A library's DenseNet of the model's shape; an error where it has none."""
    shapes = _shapes(model)
    if "features.denseblock1.denselayer1.conv2.weight" not in shapes:
        raise UnavailableError(f"{name} has no DenseNet without bottleneck layers")
    growth, bottleneck = shapes["features.denseblock1.denselayer1.conv2.weight"][:2]
    blocks = tuple(len(m) for m in model.features if isinstance(m, modules.DenseBlock))
    classes = model.classifier.out_features
    with torch.device(device):
        twin = library(
            growth_rate=growth, block_config=blocks, bn_size=bottleneck // growth, num_classes=classes
        )
        if not hasattr(model.features, "norm0"):
            outputs, inputs, *_ = shapes["features.conv0.weight"]
            twin.features.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            for part in {"norm0", "relu0", "pool0"} & set(dict(twin.features.named_children())):
                delattr(twin.features, part)
    if _shapes(twin) != shapes:
        raise UnavailableError(f"{name} has no DenseNet of this shape")
    return twin


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict(keep_vars=True).items()}


def checkpointed_twin(model: DenseNet) -> nn.Module:
    """Torchvision's DenseNet with torch.utils.checkpoint around each dense block."""
    from torchvision.models.densenet import _DenseBlock

    twin: nn.Module = torchvision_twin(model)
    for block in twin.modules():
        if isinstance(block, _DenseBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return twin


def small_densenet(depth: int, growth_rate: int, classes: int = 10) -> DenseNet:
    """The papers' DenseNet-BC for images of 32x32: three equal blocks, ``depth`` = 6n + 4 convolutions."""
    layers = (depth - 4) // 6
    return DenseNet(growth_rate, (layers,) * 3, 2 * growth_rate, num_classes=classes, small_inputs=True)


def with_weights(network: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A network from the meta device, given memory on ``device`` and the values of ``weights``."""
    network = network.to_empty(device=device)
    network.load_state_dict(weights)
    return network


def plain(model: nn.Module) -> nn.Module:
    """Make dense_ext's modules in ``model`` run PyTorch's own one by one, in place; returns it."""
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    return model


def flops_per_image(build: Callable[[], nn.Module], shape: Sequence[int], backward: bool) -> int:
    """Floating-point operations per image of convolutions and matrix products, 2 per multiply-add.

    They are counted on tensors without memory: nothing is allocated or computed.

    Args:
        build: makes the network; called without memory.
        shape: of an image, C, H and W.
        backward: count forward and backward rather than forward alone.
    """
    batch = 2  # batch norm refuses a single value per channel
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        output = build().train()(torch.randn(batch, *shape))
        if backward:
            output.sum().backward()
    return int(counter.get_total_flops()) // batch
