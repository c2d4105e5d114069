"""Densely connected networks as people write them: one function per style returns a small network.

``C`` is the number of channels that the first block reads, and ``K`` the growth rate. Comments explain what
is uncommon about a style.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C, K, B = 6, 4, 8

STYLES: dict[str, Callable[[], nn.Module]] = {}


def style(function: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Register a style under the function's name."""
    STYLES[function.__name__] = function
    return function


def conv1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)


class Classifier(nn.Module):
    """A convolution, a body from ``C`` to ``channels`` channels, a norm, a pool and a linear layer."""

    def __init__(self, body: nn.Module, channels: int, dims: int = 2) -> None:
        super().__init__()
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.stem = convolution(3, C, 3, padding=1, bias=False)
        self.body = body
        self.last = norm(channels)
        self.linear = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.last(self.body(self.stem(x))))
        return self.linear(out.flatten(2).mean(2))


class TwoConvolutions(nn.Module):
    """The modules of a layer with a bottleneck, under common names; subclasses define forward."""

    def __init__(self, inputs: int, inplace: bool = True) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv1(inputs, B)
        self.bn2, self.conv2 = nn.BatchNorm2d(B), conv3(B, K)
        self.relu = nn.ReLU(inplace=inplace)

    def new(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


def layers(kind: Any, count: int = 3, **options: Any) -> list[nn.Module]:
    return [kind(C + i * K, **options) for i in range(count)]


# --- Sequentials of layers that concatenate -----------------------------------------------------------


class CatFunctional(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.new(x)), 1)


@style
def sequential_of_layers() -> nn.Module:
    return Classifier(nn.Sequential(*layers(CatFunctional)), C + 3 * K)


class NewestFirst(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.new(x), x], 1)  # the new features come first


@style
def newest_first() -> nn.Module:
    return Classifier(nn.Sequential(*layers(NewestFirst)), C + 3 * K)


class PlainLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), conv3(inputs, K)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], dim=1)


@style
def plain_layers() -> nn.Module:
    return Classifier(nn.Sequential(*layers(PlainLayer)), C + 3 * K)


class OneReluTwice(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        return torch.cat([x, out], 1)


@style
def one_relu_used_twice() -> nn.Module:
    return Classifier(nn.Sequential(*layers(OneReluTwice)), C + 3 * K)


class Nested(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv1(inputs, B),
            nn.BatchNorm2d(B), nn.ReLU(inplace=True), conv3(B, K),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.bottleneck(x)], 1)


@style
def nested_sequentials() -> nn.Module:
    return Classifier(nn.Sequential(nn.Sequential(*layers(Nested, 2)), nn.Identity()), C + 2 * K)


class SequentialItself(nn.Sequential):
    """A layer that is a Sequential and calls its own forward."""

    def __init__(self, inputs: int, drop_rate: float = 0.0) -> None:
        super().__init__(
            OrderedDict([
                ("norm_1", nn.BatchNorm2d(inputs)), ("relu_1", nn.ReLU(inplace=True)),
                ("conv_1", conv1(inputs, B)),
                ("norm_2", nn.BatchNorm2d(B)), ("relu_2", nn.ReLU(inplace=True)), ("conv_2", conv3(B, K)),
            ])
        )  # fmt: skip
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return torch.cat([x, new], 1)


@style
def layer_is_a_sequential() -> nn.Module:
    return Classifier(nn.Sequential(*layers(SequentialItself)), C + 3 * K)


@style
def functional_dropout() -> nn.Module:
    return Classifier(nn.Sequential(*layers(SequentialItself, drop_rate=0.3)), C + 3 * K)


class DropoutModule(TwoConvolutions):
    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.drop(self.new(x))], 1)


@style
def dropout_module() -> nn.Module:
    return Classifier(nn.Sequential(*layers(DropoutModule)), C + 3 * K)


# --- blocks with a list of features -------------------------------------------------------------------


class DropoutTwice(nn.Sequential):
    """Holds its dropout as an attribute of a Sequential, which thus applies it, and applies it once more."""

    def __init__(self, inputs: int) -> None:
        super().__init__(
            nn.BatchNorm2d(inputs), nn.ReLU(), conv1(inputs, 8), nn.BatchNorm2d(8), nn.ReLU(), conv3(8, K)
        )
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.drop(super().forward(x))], 1)


@style
def dropout_twice() -> nn.Module:
    return Classifier(nn.Sequential(*layers(DropoutTwice)), C + 3 * K)


class ListBlock(nn.Module):
    """Layers take the list of all features, and the children are not in the order in which they run."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.final = nn.Identity()
        self.units = nn.ModuleList(layers(TwoConvolutions, count))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for unit in self.units:
            features.append(unit.new(torch.cat(features, 1)))
        return self.final(torch.cat(features, 1))


@style
def module_list() -> nn.Module:
    return Classifier(ListBlock(), C + 3 * K)


class ListItself(nn.ModuleList):
    """A list of layers that has a forward."""

    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(layers(TwoConvolutions)):
            self.add_module(f"layer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer.new(x)], 1)  # type: ignore[operator]
        return x


@style
def block_is_a_module_list() -> nn.Module:
    return Classifier(ListItself(), C + 3 * K)


class StarredLayer(TwoConvolutions):
    efficient = False

    def forward(self, *features: Tensor) -> Tensor:
        def bottleneck(*inputs: Tensor) -> Tensor:
            return self.conv1(self.relu(self.bn1(torch.cat(inputs, 1))))

        if self.efficient and any(feature.requires_grad for feature in features):
            z = cp.checkpoint(bottleneck, *features, use_reentrant=False)
        else:
            z = bottleneck(*features)
        return self.conv2(self.relu(self.bn2(z)))


class StarredBlock(nn.Module):
    def __init__(self, efficient: bool) -> None:
        super().__init__()
        for i, layer in enumerate(layers(StarredLayer)):
            layer.efficient = efficient  # type: ignore[assignment]
            self.add_module(f"denselayer{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, dim=1)


@style
def starred_features() -> nn.Module:
    return Classifier(StarredBlock(False), C + 3 * K)


class CheckpointedBlock(nn.Module):
    """Whole layers are checkpointed if gradients are enabled; eager updates their statistics twice."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(layers(CatFunctional))
        self.with_checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            if self.with_checkpoints and x.requires_grad:
                x = checkpoint(unit, x, use_reentrant=False)
            else:
                x = unit(x)
        return x


@style
def optional_checkpoints() -> nn.Module:
    return Classifier(CheckpointedBlock(), C + 3 * K)


class OnlyNew(nn.Module):
    """Returns only the new features, as in the upsampling path of a fully convolutional DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(layers(TwoConvolutions))

    def forward(self, x: Tensor) -> Tensor:
        new = []
        for unit in self.units:
            y = unit.new(x)
            x = torch.cat([x, y], 1)
            new.append(y)
        return torch.cat(new, 1)


@style
def only_the_new_features() -> nn.Module:
    return Classifier(OnlyNew(), 3 * K)


class EmptyAtFirst(nn.Module):
    """Joins an empty tensor to the input before the first layer, and its blocks are in a plain Module."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(layers(TwoConvolutions))

    def forward(self, x: Tensor) -> Tensor:
        new, features = x.new_empty(0), [x]
        for unit in self.units:
            x = torch.cat([x, new], 1)
            new = unit.new(x)
            features.append(new)
        return torch.cat(features, 1)


class PlainHolder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Module()
        self.path.block = EmptyAtFirst()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.path.children():
            x = block(x)
        return x


@style
def empty_tensor_and_plain_holder() -> nn.Module:
    return Classifier(PlainHolder(), C + 3 * K)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class OwnFunction(Classifier):
    """Applies an autograd function of its own, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(super().forward(x))  # type: ignore[no-any-return,no-untyped-call]


@style
def own_autograd_function() -> nn.Module:
    return OwnFunction(ListBlock(), C + 3 * K)


class SharedActivation(nn.Module):
    """All layers share one activation, which is defined last; names are set with setattr."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            setattr(self, f"n{i}", nn.BatchNorm2d(C + i * K))
            setattr(self, f"c{i}", conv3(C + i * K, K))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = torch.cat([x, getattr(self, f"c{i}")(self.act(getattr(self, f"n{i}")(x)))], 1)
        return x


@style
def shared_activation() -> nn.Module:
    return Classifier(SharedActivation(), C + 3 * K)


# --- transitions --------------------------------------------------------------------------------------


class FunctionalTransition(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), conv1(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


@style
def functional_transition() -> nn.Module:
    first, second = layers(CatFunctional, 2), [CatFunctional(K), CatFunctional(2 * K)]
    between = FunctionalTransition(C + 2 * K, K)
    return Classifier(nn.Sequential(nn.Sequential(*first), between, nn.Sequential(*second)), 3 * K)


def standard_transition(inputs: int, outputs: int) -> nn.Sequential:
    norm, pool = nn.BatchNorm2d(inputs), nn.AvgPool2d(kernel_size=2, stride=2)
    return nn.Sequential(norm, nn.ReLU(inplace=True), conv1(inputs, outputs), pool)


@style
def stage_begins_with_its_transition() -> nn.Module:
    stage = nn.Sequential(standard_transition(C + 2 * K, K), CatFunctional(K), CatFunctional(2 * K))
    return Classifier(nn.Sequential(nn.Sequential(*layers(CatFunctional, 2)), stage), 3 * K)


@style
def stage_ends_with_its_transition() -> nn.Module:
    stage = nn.Sequential(*layers(CatFunctional, 2), standard_transition(C + 2 * K, K))
    return Classifier(stage, K)


class NoActivation(nn.Module):
    """A transition without ReLU is not fused."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.BatchNorm2d(inputs), conv1(inputs, outputs), nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.down(x))


@style
def transition_without_activation() -> nn.Module:
    body = nn.Sequential(nn.Sequential(*layers(CatFunctional, 2)), NoActivation(C + 2 * K, K))
    return Classifier(body, K)


class MaxPooled(nn.Module):
    """A transition with a max pool after its convolution is not fused."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), conv1(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv(F.relu(self.norm(x))), 2)


@style
def transition_with_max_pool() -> nn.Module:
    return Classifier(nn.Sequential(ListBlock(), MaxPooled(C + 3 * K, K)), K)


# --- whole networks -----------------------------------------------------------------------------------


class OneForward(nn.Module):
    """Everything is in one module; only parts of its forward are dense, so no module can be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3(3, C)
        self.dense1, self.trans1 = self._block(C, 2), FunctionalTransition(C + 2 * K, K)
        self.dense2 = self._block(K, 3)
        self.bn, self.linear = nn.BatchNorm2d(4 * K), nn.Linear(4 * K, 5)

    @staticmethod
    def _block(channels: int, count: int) -> nn.Sequential:
        return nn.Sequential(*[NewestFirst(channels + i * K) for i in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.trans1(self.dense1(self.conv(x)))
        out = self.dense2(out)
        out = F.avg_pool2d(F.relu(self.bn(out)), 4)
        return self.linear(out.view(out.size(0), -1))  # a view of features with one pixel


@style
def one_forward_for_all() -> nn.Module:
    return OneForward()


class ViewedFeatures(nn.Module):
    """Makes a view of the features themselves, for which they must be contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = conv3(3, C), ListBlock(2)
        self.linear = nn.Linear(C + 2 * K, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(self.stem(x))
        return self.linear(out.view(out.size(0), out.size(1), -1).mean(2))


@style
def view_of_the_features() -> nn.Module:
    return ViewedFeatures()


class WrittenFeatures(ViewedFeatures):
    """Writes into the block's output."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.block(self.stem(x)), inplace=True)
        return self.linear(out.flatten(2).mean(2))


@style
def in_place_on_the_features() -> nn.Module:
    return WrittenFeatures()


class Unet(nn.Module):
    """Two dense blocks with a skip connection and an upsampling path."""

    def __init__(self) -> None:
        super().__init__()
        width = C + 2 * K
        self.stem, self.down_block = conv3(3, C), nn.Sequential(*layers(CatFunctional, 2))
        self.down, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(width, C, 2, stride=2)
        self.up_block = nn.Sequential(*[CatFunctional(C + width + i * K) for i in range(2)])
        self.head = nn.Conv2d(C + width + 2 * K, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down_block(self.stem(x))
        return self.head(self.up_block(torch.cat([self.up(self.down(skip)), skip], 1)))


@style
def segmentation() -> nn.Module:
    return Unet()


class Volumetric(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm3d(inputs), nn.Conv3d(inputs, B, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm3d(B), nn.Conv3d(B, K, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat((x, new), 1)


@style
def volumes() -> nn.Module:
    width = C + 2 * K
    down = nn.Sequential(
        nn.BatchNorm3d(width), nn.ReLU(), nn.Conv3d(width, K, 1, bias=False), nn.AvgPool3d(2, 2)
    )
    return Classifier(nn.Sequential(nn.Sequential(*layers(Volumetric, 2)), down), K, dims=3)


class Configured(nn.Module):
    """Reads its settings in every forward, so they are guarded."""

    def __init__(self, widths: Sequence[int] = (C, C + K)) -> None:
        super().__init__()
        self.depth, self.reverse = len(widths), False
        self.units = nn.ModuleDict({f"unit{i}": CatFunctional(width) for i, width in enumerate(widths)})

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.units[f"unit{i}"](x)
        return -x if self.reverse else x


@style
def settings_read_in_forward() -> nn.Module:
    return Classifier(Configured(), C + 2 * K)


class Join(Enum):
    OLD_FIRST = 0
    NEW_FIRST = 1


class Joined(NamedTuple):
    features: Tensor
    added: Tensor | None = None


def join(old: Tensor, new: Tensor, how: Join = Join.OLD_FIRST) -> Joined:
    return Joined(torch.cat([old, new] if how is Join.OLD_FIRST else [new, old], 1), new)


class New(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        return self.new(x)


class Named(nn.Module):
    """Finds its layers by their names; an enumeration and a named tuple are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0, self.layer1 = New(C), New(C + K)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = join(x, getattr(self, f"layer{i}")(x)).features
        return x


@style
def constants_of_classes() -> nn.Module:
    return Classifier(Named(), C + 2 * K)
