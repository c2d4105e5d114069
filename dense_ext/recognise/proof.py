"""Verifies numerically, in float64, that a recognised module computes the same as its original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from ..batch_norm import num_features
from ..supported import NORM_TYPES, dims_of
from .description import Dropout, Plan, Transition, without_dropout
from .fused import Traced, install
from .tracing import RefusedError

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


def prove(module: nn.Module, plan: Plan) -> None:
    """Compare a module with its plan, which the operators run, on random parameters and inputs.

    Compares outputs, gradients of input and parameters, and buffers, in training and eval mode.

    Raises:
        RefusedError: they differ, or cannot be compared.
    """

    def fuse(copied: nn.Module) -> None:
        install(copied, without_dropout(plan), "bottleneck", "auto", "", False)

    dims = dims_of(module.get_submodule(plan.convs[0]))
    poolings = sum(isinstance(step, Transition) for step in plan.steps)
    sizes = [size * 2**poolings for size in (4, 3, 2)[:dims]]
    channels = num_features(module.get_submodule(plan.norms[0]))
    _prove(module, fuse, (2, channels, *sizes), lambda eager: _expected_dropout(eager, plan))


def prove_same(module: nn.Module, dims: int, change: Callable[[nn.Module], None]) -> None:
    """Compare a module that takes images with a copy that was changed, as :func:`prove` does.

    Args:
        module: the module.
        dims: the dimensions of its images, 2 or 3.
        change: changes the copy in place.

    Raises:
        RefusedError: they differ, or cannot be compared.
    """
    convs: list[Any] = [m for m in module.modules() if dims_of(m) == dims]
    channels = convs[0].in_channels if convs else 3
    size = {2: 64, 3: 32}[dims]
    _prove(module, change, (2, channels, *[size] * dims), None)


def _prove(
    module: nn.Module,
    change: Callable[[nn.Module], None],
    shape: tuple[int, ...],
    dropout: Callable[[nn.Module], Any] | None,
) -> None:
    """Compare a module with a changed copy on an input of a shape; ``dropout`` gives what it should drop."""
    try:
        eager = copy.deepcopy(module)
        if any(tensor.is_meta for tensor in (*eager.parameters(), *eager.buffers())):
            eager = eager.to_empty(device="cpu")
        eager = eager.to("cpu", torch.float64).requires_grad_()
        _keep_to_this_process(eager, len(shape) - 2)
        ours: Any = copy.deepcopy(eager)
    except Exception as error:
        raise RefusedError(f"it cannot be copied to be compared: {type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(0)
    _randomize(eager, generator)
    ours.load_state_dict(eager.state_dict())
    for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
        a.copy_(b)  # includes buffers that are not in the state dict
    change(ours)
    x = torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for training in (True, False):
            try:
                results = [_Results(m.train(training), x, generator.clone_state()) for m in (eager, ours)]
            except RefusedError:
                raise
            except Exception as error:
                raise RefusedError(f"it cannot be compared: {type(error).__name__}: {error}") from error
            expected = results[1].dropped if dropout is None else dropout(eager)
            if training and results[0].dropped != expected:
                raise RefusedError("its dropout differs from that of its layers")
            if results[0].structure != results[1].structure:
                raise RefusedError("computed by the fused operators, its outputs are other ones")
            largest = max(float(value.abs().max()) for _, value in results[0].values if value is not None)
            for (what, right), (_, found) in zip(*(r.values for r in results), strict=True):
                _compare(what, found, right, ROUNDING * largest)


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
            if isinstance(module, Traced):
                if (reason := module.why_eager(leaf)) is not None:
                    raise RefusedError(reason)
                result = module.computed(leaf)
            else:
                result = module.forward(leaf)  # hooks of the module itself run in either case
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
