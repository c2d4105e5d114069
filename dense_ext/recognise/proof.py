"""Verifies numerically, in float64, that a recognised module computes the same as its original."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from ..batch_norm import num_features
from ..supported import NORM_TYPES, dims_of
from .chains import leaves_around
from .description import Dropout, Plan, Transition, without_dropout
from .fused import Traced, install
from .kept import RefusedError, undisturbed
from .tracing import graph_of

# The relative error allowed: far above rounding in float64, far below any mistake.
TOLERANCE = 1e-9
# Rounding, relative to the largest value compared. A bias before a norm has no gradient but rounding.
ROUNDING = 1e-13
# Dropout functions with the spatial dimensions of images whose channels they drop; 0 drops single elements.
_DROPOUTS = {F.dropout: 0, torch.dropout: 0, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}


class _WithoutDropout(TorchFunctionMode):
    """Makes dropout return its input, since two networks would draw different masks.

    Attributes:
        dropped: the dropout that was left out, in the order of the calls, each with its number of channels.
            Calls on each other's result are one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[tuple[Dropout, int]] = []
        self._last: Tensor | None = None  # the last call's result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            return func(*args, **kwargs)
        given = {**dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
        x, rate = given["input"], given.get("p", 0.5)
        if rate and given.get("training", given.get("train", True)):
            dropout = Dropout(rate, _DROPOUTS[func])
            if x is self._last:
                dropout = self.dropped.pop()[0].then(dropout)
            self.dropped.append((dropout, x.shape[1]))
            self._last = x
        return x


class _Calls(TorchFunctionMode):
    """Records which of PyTorch's functions are called, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A trace has the reading of an attribute where it is first used, if it is used.
        if getattr(func, "__name__", "") != "__get__":
            self.functions.append(func)
        return func(*args, **(kwargs or {}))


@torch.inference_mode(False)
def prove(module: nn.Module, plan: Plan, traced: bool = True) -> None:
    """Compare a module with its plan, which the operators run, on random parameters and inputs.

    Compares outputs, gradients of input and parameters, and buffers, in training and eval mode. If the plan
    comes from a trace, the forward must also call the same functions for a tensor as when it was traced.

    Raises:
        RefusedError: they differ, or cannot be compared.
    """

    def fuse(copied: nn.Module) -> None:
        install(copied, without_dropout(plan), "bottleneck", "auto", "", False)

    dims = dims_of(module.get_submodule(plan.convs[0]))
    poolings = sum(isinstance(step, Transition) for step in plan.steps)
    sizes = [size * 2**poolings for size in (4, 3, 2)[:dims]]
    channels = num_features(module.get_submodule(plan.norms[0]))
    _prove(module, fuse, (2, channels, *sizes), lambda eager: _expected_dropout(eager, plan), traced)


@torch.inference_mode(False)
def prove_same(module: nn.Module, parts: Iterable[nn.Module], change: Callable[[nn.Module], None]) -> None:
    """Compare a module that takes images with what it is after a change, as :func:`prove` does.

    Args:
        module: the module; only a copy is changed.
        parts: submodules that the change does not concern; something cheaper takes their places.
        change: changes the copy in place.

    Raises:
        RefusedError: they differ, or cannot be compared.
    """
    convs: list[Any] = [m for m in module.modules() if dims_of(m)]
    if not convs:
        raise RefusedError("it has no convolution")
    dims = dims_of(convs[0])
    try:
        places = {id(part): _StandIn(part, 1 + i) for i, part in enumerate(parts)}
    except Exception as error:
        raise RefusedError(f"it cannot be copied to be compared: {type(error).__name__}: {error}") from error
    *sizes, last = _SIZES[dims]
    for size in sizes:
        with contextlib.suppress(RefusedError):  # a linear layer may want another size
            return _prove(module, change, (2, convs[0].in_channels, *[size] * dims), None, True, places)
    return _prove(module, change, (2, convs[0].in_channels, *[last] * dims), None, True, places)


# The sizes of images with which a whole network is compared, by their dimensions.
_SIZES = {1: (64, 1024), 2: (64, 32, 224), 3: (32, 64)}


class _StandIn(nn.Module):
    """Takes the place of a part: its results have the same shapes and depend on every input."""

    def __init__(self, part: nn.Module, number: int) -> None:
        super().__init__()
        self.part, self.number = [_on_cpu(part).eval()], number  # in a list, so that it is no submodule
        self.shapes: dict[torch.Size, torch.Size] = {}  # of the results, by the input's

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.shapes:
            weight = next((t for t in self.part[0].parameters() if t.is_floating_point()), x)
            with torch.no_grad():
                self.shapes[x.shape] = self.part[0](x.to(weight.dtype)).shape
        _, channels, *sizes = self.shapes[x.shape]
        factors = torch.linspace(0.5, 0.5 + self.number, channels, dtype=x.dtype, device="cpu")
        y = x[:, torch.arange(channels, device="cpu") % x.shape[1]].sin()
        pools: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        return pools[len(sizes) - 1](y, sizes) * factors.view(-1, *[1] * len(sizes))


@undisturbed()
def _prove(
    module: nn.Module,
    change: Callable[[nn.Module], None],
    shape: tuple[int, ...],
    dropout: Callable[[nn.Module], Any] | None,
    traced: bool,
    places: Mapping[int, nn.Module] | None = None,
) -> None:
    """Compare a copy of a module before and after a change.

    Args:
        module: the module.
        change: changes the copy.
        shape: of the input.
        dropout: returns what dropout there should be, if it is not what the changed module calls.
        traced: whether the change follows from a trace.
        places: modules to put into the copy, by the id of those whose places they take.
    """
    try:
        copied = _on_cpu(module, places).to(torch.float64).requires_grad_()
        _keep_to_this_process(copied, len(shape) - 2)
    except Exception as error:
        raise RefusedError(f"it cannot be copied to be compared: {type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(0)
    _randomize(copied, generator)
    expected = None if dropout is None else dropout(copied)
    x = torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
    before = _results(copied, x, generator)
    if traced:
        stand_ins = {m for m in copied.modules() if isinstance(m, _StandIn)}
        with _kept_buffers(copied):
            _check_trace(copied, x, leaves_around(stand_ins) if places is not None else lambda _: False)
    change(copied)
    after = _results(copied, x, generator)
    for training, eager, ours in zip((True, False), before, after, strict=True):
        if training and eager.dropped != (ours.dropped if expected is None else expected):
            raise RefusedError("its dropout differs from that of its layers")
        if eager.structure != ours.structure:
            raise RefusedError("computed by the fused operators, its outputs are other ones")
        largest = max(float(value.abs().max()) for _, value in eager.values if value is not None)
        for (what, right), (_, found) in zip(eager.values, ours.values, strict=True):
            _compare(what, found, right, ROUNDING * largest)


def _on_cpu(module: nn.Module, places: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """A copy of a module on the CPU, without hooks, and with other modules in some places.

    Values of meta tensors are random.
    """
    memo: dict[int, Any] = {**(places or {})}
    copied = copy.deepcopy(module, memo)
    for inner in copied.modules():
        inner._forward_hooks.clear()
        inner._forward_pre_hooks.clear()
        inner._backward_hooks.clear()
        inner._backward_pre_hooks.clear()
    if any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
        return copied.to_empty(device="cpu")
    return copied.to("cpu")


def _results(module: nn.Module, x: Tensor, generator: torch.Generator) -> list[_Results]:
    """What a module computes in training and in eval mode; its buffers are as before afterwards."""
    try:
        with _kept_buffers(module), torch.random.fork_rng(devices=[]):
            return [_Results(module.train(mode), x, generator.clone_state()) for mode in (True, False)]
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"it cannot be compared: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """With gradients; at the end, buffers have the values that they had at the beginning."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def _check_trace(module: Any, x: Tensor, leaves: Callable[[nn.Module], bool]) -> None:
    """Refuse a forward that calls other functions for a tensor than for the proxy that traces it.

    For example one that asks ``type(x) is Tensor``, or that catches the error of a branch on a proxy's value.
    """
    leaf, drawn = x.clone().requires_grad_(), random.getstate()
    for mode in (True, False):
        graph = graph_of(module.train(mode), leaves)
        runs = []
        for run in (module.forward, fx.Interpreter(module, graph=graph).run):
            random.setstate(drawn)  # a module inside may draw random numbers, the same ones in both
            calls, fork = _Calls(), torch.random.fork_rng(devices=[])
            with fork, torch.autocast("cpu", enabled=False), _WithoutDropout(), calls:
                run(leaf)
            runs.append(calls.functions)
        random.setstate(drawn)
        if runs[0] != runs[1]:
            raise RefusedError("its forward calls other functions than when it is traced")


def _keep_to_this_process(module: nn.Module, dims: int) -> None:
    """Make synchronised norms plain ones: others take no part in the comparison."""
    norms: list[Any] = [norm for norm in module.modules() if type(norm) is nn.SyncBatchNorm]
    for norm in norms:
        norm.__class__ = NORM_TYPES[dims]


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Set random values that hide no mistake: no zeros, ones or symmetric weights."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_floating_point():
                tensor.zero_()
            elif tensor.dim() > 1:
                bound = (3 * len(tensor) / tensor.numel()) ** 0.5  # variance 1 / fan-in
                tensor.uniform_(-bound, bound, generator=generator)  # several times as fast as normal_
            else:
                tensor.uniform_(0.3, 1.3, generator=generator)


class _Results:
    """What a step of a module computes: named values, and the dropout that it would apply."""

    def __init__(self, module: Any, x: Tensor, generator: torch.Generator) -> None:
        leaf = x.clone().requires_grad_()
        with _WithoutDropout() as mode, torch.autocast("cpu", enabled=False):
            if isinstance(module, Traced):  # hooks of the module itself run in either case
                if (reason := module.why_eager(leaf)) is not None:
                    raise RefusedError(reason)
                result = module.computed(leaf)
            else:
                result = module.forward(leaf)
        self.dropped = mode.dropped
        outputs, self.structure = tree_flatten(result)
        outputs = [y for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]
        self.values: list[tuple[str, Tensor | None]] = [("output", y.detach()) for y in outputs]
        loss = torch.zeros((), dtype=x.dtype, device="cpu")
        for y in outputs:
            cotangent = torch.randn(y.shape, dtype=y.dtype, device="cpu", generator=generator)
            loss = loss + (y * cotangent).sum()
        loss.backward()
        self.values.append(("input gradient", leaf.grad))
        self.values += [(f"gradient of {name}", p.grad) for name, p in module.named_parameters()]
        self.values += [(name, buffer.clone()) for name, buffer in module.named_buffers()]
        module.zero_grad()


def _expected_dropout(module: nn.Module, plan: Plan) -> list[tuple[Dropout, int]]:
    """The plan's dropout, in the order that it is applied, each with the number of channels."""
    found: list[tuple[Dropout, int]] = []
    for step in plan.steps:
        if isinstance(step, Transition):
            places = [(step.conv, step.dropout)]
        else:
            places = [pair for layer in step.layers for pair in zip(layer.convs, step.dropouts, strict=True)]
        convs: list[tuple[Any, Dropout]] = [(module.get_submodule(name), dropout) for name, dropout in places]
        found += [(dropout, conv.out_channels) for conv, dropout in convs if dropout.rate]
    return found


def _compare(what: str, found: Tensor | None, expected: Tensor | None, rounding: float) -> None:
    if found is None or expected is None:
        same = found is expected
    elif found.shape != expected.shape or found.dtype != expected.dtype:
        same = False
    else:
        # NaN counts as a difference.
        same = bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max() + rounding)
    if not same:
        raise RefusedError(f"computed by the fused operators, its {what} differs")
