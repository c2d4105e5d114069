"""Blocks that look like plain dense blocks but are not; they are refused, or fused exactly.

Each changes one thing about a plain block. Those in ``REFUSED`` must not be recognised. Those in ``GUARDED``
may be; then a change of a value on which their forward depends must be noticed at the next call.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from os import getenv
from random import uniform
from time import time
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.data
from numpy.random import rand
from torch import Tensor, get_default_dtype, get_num_threads, nn
from torch.backends import cudnn

import dense_ext
from dense_ext.recognise import RefusedError, recognise

from ..helpers import Calls, assert_equal, randomize, twin

FLAG = False
SCALES = [1.0]
C, K = 6, 4


class Layer(nn.Module):
    def __init__(self, inputs: int, bottleneck: int = 8) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, bottleneck, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(bottleneck),
            nn.Conv2d(bottleneck, K, 3, padding=1, bias=False),
        )
        self.relu = nn.ReLU()

    def new(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.norm2(self.conv1(self.relu(self.norm1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1)


class Plain(nn.Module):
    layer: Any = Layer

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[self.layer(C + i * K) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


REFUSED: dict[str, Callable[[], nn.Module]] = {}


def refused(made: Any) -> Any:
    """Register a block, or a layer that is put into a plain block."""
    if issubclass(made, Layer):
        REFUSED[made.__name__] = type(made.__name__, (Plain,), {"layer": made})
    else:
        REFUSED[made.__name__] = made
    return made


# --- branches that depend on the input ----------------------------------------------------------------


@refused
class ClampsLarge(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 100:
            x = x.clamp(-100, 100)
        return self.layers(x)


@refused
class SplitsBatches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 8:
            return torch.cat([self.layers(part) for part in x.split(8)])
        return self.layers(x)


@refused
class LooksAtSize(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 64:
            x = F.avg_pool2d(x, 2)
        return self.layers(x)


@refused
class LooksAtDtype(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 2) if x.dtype == torch.bfloat16 else self.layers(x)


@refused
class LooksAtDevice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 2) if x.is_cuda else self.layers(x)


@refused
class LooksForTensors(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = x.clamp(-100, 100)
        return self.layers(x)


@refused
class AsksWhetherItIsATensor(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.clamp(-100, 100) if torch.is_tensor(x) else x)


@refused
class AsksForTheType(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.clamp(-100, 100) if type(x) is Tensor else x)


@refused
class CatchesTheTracersError(Plain):
    def forward(self, x: Tensor) -> Tensor:
        try:
            odd = bool(x.shape[-1] % 2)
        except Exception:
            odd = False
        return self.layers(F.pad(x, (0, 1)) if odd else x)


@refused
class AsksForInferenceMode(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 1.5 if torch.is_inference_mode_enabled() else x)


@refused
class AsksForADefault(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 1.5 if torch.get_default_dtype() == torch.float16 else x)


@refused
class LooksForGradients(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if torch.is_grad_enabled() else x * 1.5)


@refused
class LooksAtRequiresGrad(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.requires_grad else x * 1.5)


@refused
class LooksForFrozenImages(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 1.5 if torch.is_grad_enabled() and not x.requires_grad else x)


@refused
class LooksForFrozenWeights(Layer):
    def forward(self, x: Tensor) -> Tensor:
        frozen = torch.is_grad_enabled() and not self.conv1.weight.requires_grad
        return torch.cat([self.new(x), x] if frozen else [x, self.new(x)], 1)


@refused
class LooksAtTraining(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1) if self.training else torch.cat([self.new(x), x], 1)


@refused
class LooksAtAutocast(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 2) if torch.is_autocast_enabled("cpu") else self.layers(x)


@refused
class AutocastInside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.layers(x)


@refused
class NoGradInside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.layers[0](x)
        return self.layers[2](self.layers[1](x))


@refused
class ComparesABuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if self.step < 100 else x


# --- side effects -------------------------------------------------------------------------------------


@refused
class KeepsFeatures(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        self.last = y
        return y


@refused
class CountsCalls(Plain):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


@refused
class LogsCalls(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        return self.layers(x)


@refused
class StochasticDepth(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.01:
            return torch.cat([x, torch.zeros_like(x[:, :K])], 1)
        return torch.cat([x, self.new(x)], 1)


@refused
class NumpyRandom(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if np.random.rand() < 2 else x


@refused
class NumpyFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.new(x)
        return torch.cat([x, y * 0 if rand() > 2 else y], 1)


@refused
class PythonFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.new(x)
        return torch.cat([x, y * 0 if uniform(0, 1) > 2 else y], 1)


@refused
class TimeOfDay(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x) * (2 if time() < 0 else 1)], 1)


@refused
class Environment(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.new(x)
        return torch.cat([x, y * 0 if getenv("DENSE_EXT_NO_SUCH_VARIABLE") else y], 1)


@refused
class CountsInItsClass(Layer):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return torch.cat([x, self.new(x)], 1)


def counting_relu(x: Tensor) -> Tensor:
    counting_relu.calls += 1  # type: ignore[attr-defined]
    return F.relu(x)


counting_relu.calls = 0  # type: ignore[attr-defined]


@refused
class CountsInAFunction(Layer):
    def new(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.norm2(self.conv1(counting_relu(self.norm1(x))))))


count = itertools.count().__next__


@refused
class CountsInABoundMethod(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.new(x)
        return torch.cat([x, y if count() >= 0 else -y], 1)


@refused
class ImportsInside(Layer):
    def new(self, x: Tensor) -> Tensor:
        import os

        y = super().new(x)
        return y if os.environ.get("DENSE_EXT_TEST_SIGN") is None else -y


@refused
class ModuleByALocalName(Layer):
    def new(self, x: Tensor) -> Tensor:
        own, y = sys, super().new(x)
        return y if own.maxsize > 0 else -y


@refused
class GlobalsByName(Layer):
    def new(self, x: Tensor) -> Tensor:
        y = super().new(x)
        return -y if globals()["FLAG"] else y


@refused
class ReadsItsDict(Layer):
    def new(self, x: Tensor) -> Tensor:
        y = super().new(x)
        return -y if self.__dict__.get("negative") else y


@refused
class ReadsItsParameters(Layer):
    def new(self, x: Tensor) -> Tensor:
        y = super().new(x)
        return y if any(p.requires_grad for p in self.parameters()) else -y


@refused
class MutableValueOfItsClass(Layer):
    signs = {"sign": 1}  # noqa: RUF012

    def new(self, x: Tensor) -> Tensor:
        y = super().new(x)
        return y if type(self).signs["sign"] == 1 else -y


@refused
class NamelessFunction(Layer):
    def new(self, x: Tensor) -> Tensor:
        return nameless(super().new(x))


nameless = lambda x: x  # noqa: E731


@refused
class MutableDefault(Layer):
    def forward(self, x: Tensor, scale: list[float] = SCALES) -> Tensor:
        y = self.new(x)
        return torch.cat([x, y if scale[0] == 1.0 else -y], 1)


def relu_with_a_mutable_default(x: Tensor, scale: list[float] = SCALES) -> Tensor:
    return F.relu(x) if scale[0] == 1.0 else x


@refused
class FunctionWithAMutableDefault(Layer):
    def new(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.norm2(self.conv1(relu_with_a_mutable_default(self.norm1(x))))))


class Settings:
    scale = 1


@refused
class SettingsInAClass(Layer):
    settings = Settings

    def forward(self, x: Tensor) -> Tensor:
        y = self.new(x)
        return torch.cat([x, y if self.settings.scale == 1 else -y], 1)


class Store:
    """Holds settings, and takes features by class methods."""

    items: ClassVar[list[Any]] = []
    last: ClassVar[Any] = None
    options: ClassVar[dict[str, bool]] = {"double": False}

    @classmethod
    def add(cls, x: Any) -> None:
        cls.items.append(x)

    @classmethod
    def put(cls, x: Any) -> None:
        cls.last = x

    @classmethod
    def option(cls, name: str) -> bool:
        return cls.options[name]


@refused
class AppendsInAClass(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        Store.add(y)
        return y


@refused
class SetsAnAttributeOfAClass(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        Store.put(y)
        return y


@refused
class SetsAGlobal(Plain):
    def forward(self, x: Tensor) -> Tensor:
        global FEATURES
        y = self.layers(x)
        FEATURES = y
        return y


FEATURES = None


@refused
class OptionOfAClassByAMethod(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * 2 if Store.option("double") else self.layers(x)


@refused
class OptionOfAClassByALocalName(Plain):
    def forward(self, x: Tensor) -> Tensor:
        of = Store
        return self.layers(x) * 2 if of.options["double"] else self.layers(x)


@refused
class OptionOfItsClass(Plain):
    options: ClassVar[dict[str, bool]] = {"double": False}

    @classmethod
    def doubles(cls) -> bool:
        return cls.options["double"]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * 2 if self.doubles() else self.layers(x)


def block_with_a_class_of_its_function() -> type[Plain]:
    class Own:
        double = False

    class OptionOfAnEnclosedClass(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * 2 if Own.double else self.layers(x)

    return OptionOfAnEnclosedClass


refused(block_with_a_class_of_its_function())


class Values:
    _doubles = [False]  # noqa: RUF012

    @property
    def double(self) -> bool:
        return self._doubles[0]


@refused
class OptionOfANewInstance(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * 2 if Values().double else self.layers(x)


# --- PyTorch's state ----------------------------------------------------------------------------------


STATES: dict[str, Callable[[], Any]] = {
    "processes": lambda: dist.is_initialized(),
    "cudnn": lambda: cudnn.benchmark,
    "threads": lambda: get_num_threads() > 99,
    "default dtype": lambda: get_default_dtype() == torch.float16,
    "anomalies": lambda: torch.is_anomaly_enabled(),
    "determinism": lambda: torch.get_deterministic_debug_mode(),
    "workers": lambda: torch.utils.data.get_worker_info() is not None,
}


@pytest.mark.parametrize("name", STATES)
def test_a_forward_that_depends_on_pytorchs_state_is_refused(name: str) -> None:
    class AsksPyTorch(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x * 2) if asks() else self.layers(x)

    asks = STATES[name]
    with pytest.raises(RefusedError, match="may tell it of PyTorch's state"):
        recognise(AsksPyTorch())


@refused
class StateByALocalName(Plain):
    def forward(self, x: Tensor) -> Tensor:
        own = torch
        return self.layers(x * 2) if own.is_anomaly_enabled() else self.layers(x)


@refused
class StateByAnImport(Plain):
    def forward(self, x: Tensor) -> Tensor:
        from torch import is_anomaly_enabled

        return self.layers(x * 2) if is_anomaly_enabled() else self.layers(x)


@refused
class LooksForHooks(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 2) if self.layers[0].norm1._forward_hooks else self.layers(x)


@refused
class WritesItsResult(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y[:, 0] = 0
        return y


@refused
class MutableGlobal(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if SCALES[0] == 1.0 else x


# --- other arithmetic ---------------------------------------------------------------------------------


@refused
class Scaled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 0.2 * self.new(x)], 1)


@refused
class Residual(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x) + x[:, :K]], 1)


@refused
class ReluBeforeNorm(Layer):
    def new(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.norm2(self.conv1(self.norm1(self.relu(x))))))


@refused
class InPlaceOnFeatures(Layer):
    def new(self, x: Tensor) -> Tensor:
        return super().new(F.relu(x, inplace=True))


@refused
class ConcatenatesInto(Layer):
    """Passes an argument that recognition does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1, out=None)


@refused
class AddsInPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += 0
        return torch.cat([x, self.new(x)], 1)


@refused
class EndsInTorchScript(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.jit.script(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x))


@refused
class NormUnused(Layer):
    def new(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.conv1(self.relu(self.norm1(x)))))


@refused
class NormForNothing(Layer):
    def new(self, x: Tensor) -> Tensor:
        self.norm1(x)
        return super().new(x)


@refused
class Detached(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x.detach())], 1)


@refused
class AlongTheHeight(Layer):
    def __init__(self, inputs: int) -> None:
        super().__init__(C)
        self.conv2 = nn.Conv2d(8, C, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 2)


@refused
class OneLayerTwice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        return torch.cat([x, first.new(x), first.new(x)], 1)


@refused
class SkipsALayer(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a = self.layers[0].new(x)
        b = self.layers[1].new(torch.cat([x, a], 1))
        return torch.cat([x, b], 1)


@refused
class SwapsTwoLayers(Plain):
    def forward(self, x: Tensor) -> Tensor:
        a = self.layers[0].new(x)
        b = self.layers[1].new(torch.cat([x, a], 1))
        return torch.cat([x, b, a], 1)


@refused
class DropsOutAlways(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.dropout(self.new(x), 0.2)], 1)


@refused
class DropsOutElementsThenChannels(Layer):
    def new(self, x: Tensor) -> Tensor:
        return F.dropout2d(F.dropout(super().new(x), 0.2, self.training), 0.2, self.training)


@refused
class DropsOutTheInputToo(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.cat([x, self.new(x)], 1), 0.2, self.training)


@refused
class DropsOutInTwoWays(Layer):
    def new(self, x: Tensor) -> Tensor:
        z = F.dropout2d(self.conv1(self.relu(self.norm1(x))), 0.2, self.training)
        return F.dropout(self.conv2(self.relu(self.norm2(z))), 0.2, self.training)


@refused
class DropsOutVolumes(Layer):
    def new(self, x: Tensor) -> Tensor:
        return F.dropout3d(super().new(x), 0.2, self.training)


@refused
class ActivatesInTwoWays(Layer):
    def new(self, x: Tensor) -> Tensor:
        return self.conv2(F.elu(self.norm2(self.conv1(self.relu(self.norm1(x))))))


@refused
class Unpadded(Layer):
    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.conv2 = nn.Conv2d(8, K, 3, padding=1, dilation=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, 1:-1, 1:-1], self.new(x)], 1)


@refused
class EvenWindows(Layer):
    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.conv2 = nn.Conv2d(8, K, 2, padding="same", bias=False)


@refused
class DilatesMoreAndMore(Plain):
    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(self.layers, start=1):
            layer.conv2 = nn.Conv2d(8, K, 3, padding=i, dilation=i, bias=False)


@refused
class PoolsThreeByThree(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.layers(x), 3, 2, 1)


@refused
class Parametrized(Plain):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.layers[1].conv2)


@refused
class InnerHook(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].conv2.register_forward_hook(lambda module, inputs, output: output * 2)


@refused
class LayerHook(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)


@refused
class OwnForward(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].conv1.forward = lambda x: F.conv2d(x, self.layers[1].conv1.weight * 2)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    block = REFUSED[name]()
    attributes = [set(m.__dict__) for m in block.modules()]
    with pytest.raises(RefusedError):
        recognise(block)
    assert [set(m.__dict__) for m in block.modules()] == attributes, "the block was changed"
    assert all(module.training for module in block.modules())


def test_the_plain_block_is_recognised() -> None:
    assert recognise(Plain()).kind == "dense block"


# --- changed after the swap ---------------------------------------------------------------------------


class Guarded(Plain):
    scale = False
    mode: Any = "plain"

    sign = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.scale or FLAG or getattr(self, "doubles", False) or hasattr(self, "doubled"):
            x = x * 2
        return self._result(self.layers(x)) if type(self).sign == 1 else -x

    def _result(self, y: Tensor) -> Tensor:
        return y if self.mode == "plain" else -y


def _set(path: str, value: Any) -> Callable[[Any, Any], None]:
    def change(model: Any, monkeypatch: Any) -> None:
        holder, _, name = path.rpartition(".")
        for part in filter(None, holder.split(".")):
            model = model[int(part)] if part.isdigit() else getattr(model, part)
        setattr(model, name, value)

    return change


def _negate(self: Any, y: Tensor) -> Tensor:
    return -y


CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "an attribute": _set("scale", True),
    "another attribute": _set("mode", "negative"),
    "an attribute that was not there": _set("doubles", True),
    "another that was not there": _set("doubled", None),
    "one that was not there, in the class": lambda model, patch: patch.setattr(
        Guarded, "doubles", True, raising=False
    ),
    "an attribute read by type": lambda model, patch: patch.setattr(Guarded, "sign", -1),
    "an attribute of the class": lambda model, patch: patch.setattr(Guarded, "scale", True),
    "a global": lambda model, patch: patch.setattr(sys.modules[__name__], "FLAG", True),
    "a method of the class": lambda model, patch: patch.setattr(Guarded, "_result", _negate),
    "a method of the layers' class": lambda model, patch: patch.setattr(
        Layer, "new", lambda self, x: self.conv2(x)
    ),
    "a forward": lambda model, patch: patch.setattr(
        Layer, "forward", lambda self, x: torch.cat([self.new(x), x], 1)
    ),
    "the block's forward": lambda model, patch: patch.setattr(Guarded, "forward", lambda self, x: x * 2),
    "a layer's forward": lambda model, patch: setattr(
        model.layers[1], "forward", lambda x: torch.cat([x, x[:, :K]], 1)
    ),
    "a hook": lambda model, patch: model.layers[1].register_forward_hook(lambda m, i, o: o * 2),
    "an activation": _set("layers.1.relu", nn.Tanh()),
    "a dilation": lambda model, patch: (
        _set("layers.1.conv2.dilation", (2, 2))(model, patch),
        _set("layers.1.conv2.padding", (2, 2))(model, patch),
    )[0],
    "groups": lambda model, patch: (
        torch.manual_seed(1),  # the same weights in both networks
        _set("layers.1.conv2", nn.Conv2d(8, K, 3, padding=1, groups=2, bias=False).double())(model, patch),
    )[1],
    "the order of the layers": lambda model, patch: model.layers._modules.update(
        {"0": model.layers._modules.pop("0")}
    ),
    "a layer exchanged": lambda model, patch: setattr(
        model, "layers", nn.Sequential(*list(model.layers)[:2])
    ),
}


def activate(x: Tensor) -> Tensor:
    return F.relu(x)


class Doubling:
    on = False


def doubled(x: Tensor, by: type[Doubling] = Doubling) -> Tensor:
    return x * 2 if by.on else x


class DefaultOfAHelper(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.layers(x))


class ModeOfANorm(Plain):
    """Reads the mode of a module of PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if self.layers[0].norm1.training == self.training else y * 2


class Helper:
    activate = staticmethod(F.relu)
    factor = 1


class Functions(Plain):
    """Gets functions, modules and values in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.activation, self.kind = F.relu, nn.BatchNorm2d
        self.other, self.switch = nn.BatchNorm2d(C), self.layers[0].norm1
        self.layers.reverse = False
        self.named = nn.ModuleDict({"first": nn.Identity()})

    @staticmethod
    def activated(x: Tensor) -> Tensor:
        return F.relu(x)

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["_sign"] if name == "sign" else super().__getattr__(name)

    _sign = 1

    def forward(self, x: Tensor) -> Tensor:
        own = Helper
        for layer in self.layers:
            norm = self.switch if layer is self.layers[0] else layer.norm1
            z = layer.norm2(layer.conv1(self.activation(norm(x))))
            x = torch.cat([x, layer.conv2(activate(z))], 1)
        if self.layers.reverse or self.kind is not nn.BatchNorm2d or own.factor != 1:
            return -x
        return x if "first" in self.named and self.layers[0].conv1.padding_mode == "zeros" else -x


class HelperFunctions(Functions):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer.norm2(layer.conv1(Helper.activate(layer.norm1(x))))
            x = torch.cat([x, layer.conv2(self.activated(z))], 1)
        return x


def _rename(model: Any, patch: Any) -> None:
    model.named["second"] = model.named.pop("first")


OTHER_VALUES: dict[str, tuple[type[Plain], Callable[[Any, Any], Any]]] = {
    "a class that is a default": (
        DefaultOfAHelper,
        lambda model, patch: patch.setattr(Doubling, "on", True),
    ),
    "a norm's mode": (ModeOfANorm, lambda model, patch: model.layers[0].norm1.eval()),
    "a function of the module": (Functions, _set("activation", F.silu)),
    "a class of the module": (Functions, _set("kind", nn.GroupNorm)),
    "a second name of a module": (Functions, lambda model, patch: setattr(model, "switch", model.other)),
    "an attribute of a Sequential": (Functions, _set("layers.reverse", True)),
    "a name in a ModuleDict": (Functions, _rename),
    "a method on the module": (Guarded, lambda model, patch: setattr(model, "_result", torch.neg)),
    "a global function": (
        Functions,
        lambda model, patch: patch.setattr(sys.modules[__name__], "activate", F.silu),
    ),
    "a value of a class with a local name": (
        Functions,
        lambda model, patch: patch.setattr(Helper, "factor", 2),
    ),
    "a function of a class": (
        HelperFunctions,
        lambda model, patch: patch.setattr(Helper, "activate", staticmethod(F.silu)),
    ),
    "a static method": (
        HelperFunctions,
        lambda model, patch: patch.setattr(HelperFunctions, "activated", staticmethod(F.silu)),
    ),
}


@pytest.mark.parametrize("change", OTHER_VALUES)
def test_other_values_that_change_are_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, apply = OTHER_VALUES[change]
    torch.manual_seed(0)
    ours, eager = twin(randomize(kind()).double(), lambda m: dense_ext.swap(m, strict=True))
    x = torch.randn(2, C, 6, 5, dtype=torch.float64)
    with Calls() as calls:
        before = ours(x)
        assert_equal(before, eager(x), "before")
    assert calls.names == ["dense_block"]
    for model in (ours, eager):
        apply(model, monkeypatch)
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = eager(x)
        assert_equal(ours(x), after, "after")
    assert calls.names == []
    assert not torch.equal(before, after)


SETTINGS: dict[str, tuple[str, str, Any]] = {
    "a pool's window": ("pool", "kernel_size", 3),
    "a pool's padding": ("pool", "padding", 1),
    "a slope": ("layers.1.activation", "negative_slope", 0.5),
    "a dropout rate": ("layers.1.dropout", "p", 0.9),
}


class Leaky(Layer):
    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.activation, self.dropout = nn.LeakyReLU(0.1), nn.Dropout(0.0)

    def new(self, x: Tensor) -> Tensor:
        z = self.conv1(self.activation(self.norm1(x)))
        return self.dropout(self.conv2(self.activation(self.norm2(z))))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[Leaky(C + i * K) for i in range(2)])
        self.norm, self.conv = nn.BatchNorm2d(C + 2 * K), nn.Conv2d(C + 2 * K, 3, 1)
        self.activation, self.pool = nn.LeakyReLU(0.1), nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.activation(self.norm(self.layers(x)))))


@pytest.mark.parametrize("change", SETTINGS)
def test_a_changed_setting_of_a_module_of_pytorchs_is_noticed(change: str) -> None:
    torch.manual_seed(0)
    ours, eager = twin(randomize(Stage()).double(), lambda m: dense_ext.swap(m, strict=True))
    x = torch.randn(2, C, 6, 5, dtype=torch.float64)
    with Calls() as calls:
        assert_equal(ours(x), eager(x), "before")
    assert calls.names == ["dense_block", "transition"]
    path, name, value = SETTINGS[change]
    for model in (ours, eager):
        setattr(model.get_submodule(path), name, value)
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = ours(x)
        torch.manual_seed(0)
        assert_equal(found, eager(x), "after")
    assert calls.names == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_swap_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ours, eager = twin(randomize(Guarded()).double(), lambda m: dense_ext.swap(m, strict=True))
    x = torch.randn(2, C, 6, 5, dtype=torch.float64)
    with Calls() as calls:
        assert_equal(ours(x), eager(x), "before")
    assert calls.names == ["dense_block"]
    for model in (ours, eager):
        CHANGES[change](model, monkeypatch)
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = eager(x)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                ours(x)
        else:
            assert_equal(ours(x), expected, "after")
    assert calls.names == []
    monkeypatch.undo()


def test_a_bias_after_the_swap_is_added() -> None:
    """The operator has biases, so the block stays fused."""
    torch.manual_seed(0)
    ours, eager = twin(randomize(Guarded()).double(), lambda m: dense_ext.swap(m, strict=True))
    x = torch.randn(2, C, 6, 5, dtype=torch.float64)
    for model in (ours, eager):
        model(x)
        model.layers[1].conv2.bias = nn.Parameter(torch.ones(K, dtype=torch.float64))
    with Calls() as calls:
        assert_equal(ours(x), eager(x), "with a bias")
    assert calls.names == ["dense_block"]


def test_some_modules_in_training_mode() -> None:
    """With dropout, a single layer in eval mode stops fusing; without dropout, its norms are only frozen."""
    ours, eager = twin(randomize(Plain()).double(), dense_ext.swap)
    x = torch.randn(2, C, 6, 5, dtype=torch.float64)
    for model in (ours, eager):
        model.layers[1].eval()
    with Calls() as calls:
        assert_equal(ours(x), eager(x), "output")
    assert calls.names == ["dense_block"]
