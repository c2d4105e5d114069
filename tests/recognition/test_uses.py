"""Networks that write into a part's result, or into a view of it: they get what eager gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet, _DenseBlock

import dense_ext
from dense_ext.eligibility import Fused
from dense_ext.recognise.tracing import graph_of
from dense_ext.swap.adapter import ADDED

from ..helpers import assert_equal, randomize
from .styles import CatFunctional, K

C = 6


def block(channels: int = C) -> nn.Sequential:
    """A dense block that adds eight channels; no library has its class."""
    return nn.Sequential(CatFunctional(channels), CatFunctional(channels + K))


def known_block(channels: int = C) -> nn.Module:
    return _DenseBlock(2, channels, 2, K, 0.0)


class Scale(nn.Module):
    """Writes into the memory of what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return x


class Network(nn.Module):
    """Uses a block's result, and then reads it."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.block, self.last = of, nn.Conv2d(C + 2 * K, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(self.block(x))).flatten(2).mean(2)

    def used(self, y: Tensor) -> Tensor:
        raise NotImplementedError


NETWORKS: dict[str, type[Network]] = {}


def network(made: type[Network]) -> type[Network]:
    NETWORKS[made.__name__] = made
    return made


# --- views in one memory layout, and copies in another ------------------------------------------------


@network
class WritesContiguous(Network):
    def used(self, y: Tensor) -> Tensor:
        y.contiguous().mul_(2)
        return y


@network
class WritesReshaped(Network):
    def used(self, y: Tensor) -> Tensor:
        y.reshape(-1).mul_(2)
        return y


@network
class WritesFlattened(Network):
    def used(self, y: Tensor) -> Tensor:
        torch.flatten(y, 0, 1)[:3].mul_(2)
        return y


@network
class WritesAnotherFormat(Network):
    def used(self, y: Tensor) -> Tensor:
        y.to(memory_format=torch.channels_last).mul_(2)
        return y


@network
class WritesANormsResult(Network):
    """The norm's result is in memory of its own, but in the layout of the block's."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__(of)
        self.norm = nn.BatchNorm2d(C + 2 * K)

    def used(self, y: Tensor) -> Tensor:
        z = self.norm(y)
        z.reshape(-1).mul_(2)
        return z


@network
class ReadsWhatMayBeAView(WritesANormsResult):
    def used(self, y: Tensor) -> Tensor:
        z = self.norm(y)
        flat = z.flatten(1)
        F.relu(z, True)
        return y + flat.sum()


# --- views in every layout ----------------------------------------------------------------------------


@network
class WritesData(Network):
    def used(self, y: Tensor) -> Tensor:
        y.data.copy_(y.data.clamp(max=0.1))
        return y


@network
class AddsToData(Network):
    def used(self, y: Tensor) -> Tensor:
        y.data += 1
        return y


@network
class AddsToDetached(Network):
    def used(self, y: Tensor) -> Tensor:
        z = y.detach()
        z -= 1
        return y


@network
class Adds(Network):
    def used(self, y: Tensor) -> Tensor:
        y += 1
        return y


@network
class Assigns(Network):
    def used(self, y: Tensor) -> Tensor:
        y[:, 1] = 0.5
        return y


@network
class WritesASlice(Network):
    def used(self, y: Tensor) -> Tensor:
        y[:, :4].mul_(2)
        return y


@network
class WritesAChunk(Network):
    def used(self, y: Tensor) -> Tensor:
        _, last = torch.chunk(y.transpose(0, 1), 2)[0], y.narrow(1, 0, 2).unsqueeze(0)
        last.neg_()
        return y


@network
class WritesByPosition(Network):
    def used(self, y: Tensor) -> Tensor:
        F.leaky_relu(y, 0.3, True)
        return y


@network
class WritesOut(Network):
    def used(self, y: Tensor) -> Tensor:
        torch.mul(y.data, 2, out=y.data)
        return y


@network
class WritesThroughDropout(Network):
    """In eval mode, dropout returns its input."""

    def used(self, y: Tensor) -> Tensor:
        z = F.dropout(y, 0.0, self.training)
        z.data.mul_(2)
        return y


@network
class WritesInAModule(Network):
    def __init__(self, of: nn.Module) -> None:
        super().__init__(of)
        self.scale = Scale()

    def used(self, y: Tensor) -> Tensor:
        return self.scale(y)


@network
class CallsAnUnknownModule(Network):
    """A module of torch.nn whose hook writes into its input; a graph does not show what hooks do."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__(of)
        self.last.register_forward_pre_hook(double_input)

    def used(self, y: Tensor) -> Tensor:
        return y


def double_input(module: nn.Module, args: Any) -> None:
    args[0].data.mul_(2)


# --- in one mode only, or behind another part ---------------------------------------------------------


@network
class WritesInEvalOnly(Network):
    def used(self, y: Tensor) -> Tensor:
        if not self.training:
            y.data.mul_(2)
        return y


@network
class ViewsInEvalOnly(Network):
    def used(self, y: Tensor) -> Tensor:
        return y if self.training else y.view(2, -1).view(2, -1, 6, 8)


@network
class ViewsWithoutGradientsOnly(Network):
    def used(self, y: Tensor) -> Tensor:
        return y if torch.is_grad_enabled() else y.view(2, -1).view(2, -1, 6, 8)


class TwoBlocks(Network):
    """The second block takes images in the memory layout of the first one's result."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__(of)
        self.between, self.second = nn.Conv2d(C + 2 * K, C, 1), copy.deepcopy(of)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(self.second(self.between(self.block(x))))).flatten(2).mean(2)


@network
class ViewsTheSecondBlock(TwoBlocks):
    def used(self, y: Tensor) -> Tensor:
        return y.view(2, -1).view(2, -1, 6, 8)


@network
class WritesTheSecondBlock(TwoBlocks):
    def used(self, y: Tensor) -> Tensor:
        y.contiguous().mul_(2)
        return y


@network
class SlicesTheInput(Network):
    """Half the channels of contiguous images are not contiguous, but eager's result is."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(torch.cat([x, x], 1)[:, :C])
        return self.last(y.view(2, -1).view(2, -1, 6, 8)).flatten(2).mean(2)


class AfterAStem(Network):
    """Its stem and block run as one chain."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__(of)
        self.stem = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(self.block(self.stem(x)))).flatten(2).mean(2)


@network
class WritesAChainsResult(AfterAStem):
    def used(self, y: Tensor) -> Tensor:
        y.contiguous().data.mul_(2)
        z = y.data
        z -= 1
        return y


@network
class WritesAViewOfAChainsResult(AfterAStem):
    def used(self, y: Tensor) -> Tensor:
        z = y.unflatten(1, (2, -1)).squeeze(0)
        z.data.div_(2)
        return y


@network
class ReturnsAChainsResult(AfterAStem):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


@network
class ReturnsAViewOfNewMemory(AfterAStem):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x)).relu().flatten(2)


@network
class ReturnsAStack(AfterAStem):
    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x))
        return torch.stack([y.relu(), y.neg()])


@network
class ReturnsAnImageOfTheSecondBlock(TwoBlocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.block(x))).relu()[0]


# --- random numbers, which fill memory in its own order -----------------------------------------------


@network
class AddsNoise(Network):
    def used(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y)


@network
class Masks(AfterAStem):
    def used(self, y: Tensor) -> Tensor:
        return y * torch.empty_like(y).bernoulli_(0.5)


@network
class Drops(AfterAStem):
    def used(self, y: Tensor) -> Tensor:
        return F.dropout(y.relu(), 0.3, self.training)


@network
class DropsByAModule(TwoBlocks):
    def __init__(self, of: nn.Module) -> None:
        super().__init__(of)
        self.drop = nn.Dropout(0.3)

    def used(self, y: Tensor) -> Tensor:
        return self.drop(y)


# --- where the network's forward cannot be traced -----------------------------------------------------


@network
class Untraceable(Network):
    def used(self, y: Tensor) -> Tensor:
        if y.sum() != 0:
            y.contiguous().mul_(2)
        return y


@network
class CallsByAMethod(Network):
    """The network's own forward does not call the block; another method does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([x, x, x], 1)[:, : C + 2 * K]).mean((2, 3))

    def features(self, x: Tensor) -> Tensor:
        y = self.block(x)
        y.contiguous().mul_(2)
        return self.last(y).mean((2, 3))


@network
class KeepsItsFeatures(Network):
    def used(self, y: Tensor) -> Tensor:
        self.kept = y
        self.write()
        return y

    def write(self) -> None:
        if isinstance(self.kept, Tensor):
            self.kept.reshape(-1).mul_(2)


def step(model: Any, x: Tensor) -> list[Tensor | None]:
    """What a step computes: the output, and all gradients."""
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    y = getattr(model, "features", model)(leaf)
    y.contiguous().data.mul_(2)  # what a caller may do
    y.square().sum().backward()
    found = [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    with torch.no_grad():
        found.append(model(x))
    return found


def assert_steps_alike(ours: nn.Module, eager: nn.Module) -> None:
    x = torch.randn(2, C, 6, 8, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        for training in (True, False):
            for model in (ours, eager):
                model.train(training)
            images = x.contiguous(memory_format=layout)
            try:
                expected = step(eager, images)
            except RuntimeError:  # a view of channels_last images
                assert layout is torch.channels_last
                continue
            found = step(ours, images)
            largest = max(float(e.abs().max()) for e in expected if e is not None)
            for i, (a, e) in enumerate(zip(found, expected, strict=True)):
                assert_equal(a, e, f"value {i}", rounding=1e-13 * largest)


@pytest.mark.parametrize("of", [block, known_block], ids=["own block", "torchvision's"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_uses_are_as_in_eager(kind: str, of: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    eager = randomize(NETWORKS[kind](of())).double()
    ours = dense_ext.swap(copy.deepcopy(eager))
    assert isinstance(ours.block, Fused)
    assert ours.__dict__.keys() - set(ADDED) == eager.__dict__.keys()
    assert_steps_alike(ours, eager)


class Head(AfterAStem):
    """Drops numbers of a vector, which has the same layout for all images."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.block(self.stem(x)).relu(), (1, 1)).flatten(1)
        return F.dropout(pooled, 0.3, self.training)


def test_dropout_after_pooling_needs_no_copy() -> None:
    model: Any = dense_ext.swap(Head(block()))
    assert model.plan.chains[0].as_eager == (False,)


@pytest.mark.parametrize("of", [block, known_block], ids=["own block", "torchvision's"])
def test_a_block_by_itself_may_be_written_into(of: Callable[[], nn.Module]) -> None:
    eager = randomize(of()).double()
    ours = dense_ext.swap(copy.deepcopy(eager))
    x, found = torch.randn(2, C, 6, 8, dtype=torch.float64), []
    for model in (ours, eager):
        y = model(x)
        y.contiguous().data.mul_(2)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    largest = max(float(e.abs().max()) for e in found[1])
    for a, e in zip(*found, strict=True):
        assert_equal(a, e, "value", rounding=1e-13 * largest)


@pytest.mark.parametrize("after", ["denseblock1", "transition1"])
def test_a_child_of_features_may_write_into_its_input(after: str) -> None:
    torch.manual_seed(0)
    net = DenseNet(4, (2, 2), C, 2, num_classes=3)
    children = {}
    for name, child in net.features.named_children():
        children[name] = child
        if name == after:
            children["extra"] = WritesItsView()
    net.features = nn.Sequential()
    for name, child in children.items():
        net.features.add_module(name, child)
    eager = randomize(net).double()
    ours = dense_ext.swap(copy.deepcopy(eager))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        outputs = [model.train(training)(x) for model in (ours, eager)]
        assert_equal(*outputs, "output")


@pytest.mark.parametrize("name", ["denseblock1", "transition1", "denseblock2"])
def test_a_hook_of_a_part_may_write_into_a_view(name: str) -> None:
    torch.manual_seed(0)
    eager = randomize(DenseNet(4, (2, 2), C, 2, num_classes=3)).double()
    ours = dense_ext.swap(copy.deepcopy(eager))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    outputs = []
    for model in (ours, eager):
        model.features.get_submodule(name).register_forward_hook(double_output)
        outputs.append(model(x))
    assert_equal(*outputs, "output")


def double_output(module: nn.Module, args: Any, output: Tensor) -> None:
    output.contiguous().mul_(2)


class WritesItsView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.contiguous().mul_(2)
        return x


@pytest.mark.parametrize("statement", ["iadd", "isub", "imul", "itruediv", "ipow"])
def test_a_graph_shows_operators_in_place(statement: str) -> None:
    names = [getattr(node.target, "__name__", "") for node in graph_of(InPlace(), lambda m: False).nodes]
    assert names.count(statement) == 2
    assert names[-2:] == ["setitem", ""]


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.data
        for z in (x, y):
            z += 1
            z -= 1
            z *= 2
            z /= 2
            z **= 2
        x[0] = 1
        return x
