"""The classes of modules that were traced: the base class, and that of recognised modules."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # absent from torch's stubs

from .. import ops
from ..arguments import Arguments
from ..backends.general import Form, block_form, transition_form
from ..batch_norm import num_features, update_running_stats
from ..eligibility import Absence, Fused, interference, known_methods, patched_method
from ..modules import (
    as_image,
    autocast_dtype,
    finished,
    run_dense_block,
    run_transition,
)
from ..supported import block_reason, dims_of, transition_reason
from .description import Block, Dropout, Plan, Transition
from .tracing import Guards


class Traced(Fused):
    """Mixin for a module whose forward was traced; it runs something else as long as nothing has changed.

    Attributes:
        plan: what the module computes; it has ``guards``.
        kinds: the submodules' classes and first names at that time, by dotted name.
    """

    plan: Any
    kinds: dict[str, tuple[type[nn.Module], str]]
    training: bool

    # Without a return type, which TorchScript then infers.
    def forward(self, input: Tensor):  # type: ignore[no-untyped-def]
        if not is_scripting():
            return self.run_or_fall_back(input)
        return self.original_forward(input)

    def run_or_fall_back(self, x: Any) -> Any:
        """The module's output, from the fused operators or the original's forward."""
        if not isinstance(x, Tensor) or self.why_eager(x) is not None:
            return self.run_original(x)
        return self.computed(x)

    def computed(self, x: Tensor) -> Any:
        """The module's output, from the fused operators."""
        raise NotImplementedError

    def unfusable(self) -> str | None:
        reason = super().unfusable()
        if reason is None and not torch.compiler.is_compiling():
            # Tracing has followed these too; `interference` looks for them in submodules.
            own = self.__dict__.keys() & known_methods(original_class(type(self))).keys()
            reason = f"carries a {min(own)} of its own" if own else None
        modes = self.plan.guards.modes
        if reason is None and any([submodule(self, name).training != self.training for name in modes]):  # noqa: C419  # compiled
            return "a module whose mode its forward reads is in another mode"
        return reason

    def __getitem__(self, idx: Any) -> Any:
        """Index like a Sequential; a slice is another module, with the original's class."""
        found = super().__getitem__(idx)  # type: ignore[misc]
        if isinstance(idx, slice):
            found.__class__ = original_class(type(self))
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the original's class, from which unpickling makes this class again."""
        traced = traced_base(type(self))
        return _new, (traced.__bases__[1], traced.__bases__[0]), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    @classmethod
    def guarded(cls, module: Any) -> list[tuple[Any, str, Any]]:
        guards = module.plan.guards
        holders = [(submodule(module, path), name) for path, name, _ in guards.attributes]
        holders += [_holder(path, name) for path, name, _ in guards.variables]
        # The values that are there, which equal the guards': those of an unpickled plan are other objects.
        values = [(of, name, getattr(of, name, Absence.ABSENT)) for of, name in holders]
        original = original_class(type(module))
        return [*values, *((original, *item) for item in known_methods(original).items())]


class Recognised(Traced):
    """Mixin that runs a module's plan, as long as the module is unchanged since it was recognised."""

    plan: Plan
    recompute: str

    def computed(self, x: Tensor) -> Tensor:
        return finished(self, self.run(x)[0], x)

    def unfusable(self) -> str | None:
        reason = super().unfusable()
        if reason is None and any([step.drops for step in self.plan.steps]):  # noqa: C419  # compiled
            modes = {m.training for m in self.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm)}  # type: ignore[attr-defined]
            if len(modes) > 1:
                return "some of its modules apply dropout and some do not"
        return reason

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return changes(module, module.kinds, module.plan) or unsupported(module, module.plan)

    def run(self, x: Tensor, carried: ops.Carried = ops.NOTHING_CARRIED) -> tuple[Tensor, ops.Carried]:
        """The module's output, computed by the fused operators, and the last block's information about it.

        ``carried`` comes from the block that has just made x, if one has.
        """
        image = as_image(x, self._find(self.plan.convs[0]))
        signals, x = image is not x, image
        carried = ops.NOTHING_CARRIED if signals else carried
        for step in self.plan.steps:
            if isinstance(step, Transition):
                x, carried = self._run_transition(step, x, carried), ops.NOTHING_CARRIED
            else:
                x, carried = self._run_block(step, x)
        return (x.squeeze(2), ops.NOTHING_CARRIED) if signals else (x, carried)

    def forms(self) -> list[Form]:
        """What the primitives compute in each step, with signals as images of one row."""
        forms = []
        for step in self.plan.steps:
            conv = self._find(step.conv if isinstance(step, Transition) else step.layers[0].convs[-1])
            row = (1,) if dims_of(conv) == 1 else ()
            if isinstance(step, Transition):
                last = step.pool == "max" or (step.drops and self.training)
                forms.append(transition_form(row + (2,) * dims_of(conv), step.activation, last))
            else:
                forms.append(block_form(row + conv.kernel_size, conv.dilation[0], step.activation))
        return forms

    def _find(self, name: str) -> Any:
        return submodule(self, name)

    def _run_transition(self, step: Transition, x: Tensor, carried: ops.Carried) -> Tensor:
        y, _ = run_transition(
            x, self._find(step.norm), self._find(step.conv), self.backend, carried,
            pool=step.pool,
            drop_rate=step.dropout.rate if self.training else 0.0,
            drops_channels=step.dropout.dims > 0,
            activation=step.activation,
        )  # fmt: skip
        return y

    def _run_block(self, step: Block, x: Tensor) -> tuple[Tensor, ops.Carried]:
        norms = [self._find(name) for layer in step.layers for name in layer.norms]
        convs = [self._find(name) for layer in step.layers for name in layer.convs]
        options: dict[str, Any] = {
            "drop_rates": [dropout.rate if self.training else 0.0 for dropout in step.dropouts],
            "drops_channels": step.drops_channels,
            "activation": step.activation,
        }
        if not step.newest_first:
            out, carried = run_dense_block(x, norms, convs, self.recompute, self.backend, **options)
            if not step.only_new:
                return out, carried
            out = out[:, x.shape[1] :]
        else:
            out = _run_newest_first(x, norms, convs, self.recompute, self.backend, options)
            if step.only_new:
                out = out[:, : -x.shape[1]]
        if step.only_new:
            out = out.to(autocast_dtype(x) or out.dtype)
        return out, ops.NOTHING_CARRIED


def submodule(module: Any, name: str) -> Any:
    """The submodule with a dotted name; ``get_submodule`` takes several times as long."""
    for part in name.split(".") if name else ():
        module = module._modules[part]
    return module


# --- blocks that concatenate the newest features first --------------------------------------------------


def _reversed(x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """The parts of these sizes along a dimension in reversed order."""
    return torch.cat(x.split(list(sizes), dim)[::-1], dim)


def _run_newest_first(
    x: Tensor,
    norms: Sequence[Any],
    convs: Sequence[Any],
    recompute: str,
    backend: str,
    options: dict[str, Any],
) -> Tensor:
    """Run a block whose layers read [newest, ..., oldest, input].

    The operator's buffer has the opposite order. So the layers' parameters are put into the buffer's order,
    and the result into the module's.
    """
    per_layer = len(options["drop_rates"])
    made = [x.shape[1], *[conv.out_channels for conv in convs[per_layer - 1 :: per_layer]]]
    # The sizes of the parts that each first norm of a layer reads, in its own order.
    sizes = {i: made[i // per_layer :: -1] for i in range(0, len(norms), per_layer)}

    def reorder(args: Arguments) -> Arguments:
        vectors = [list(group) for group in (args.norm_weights, args.norm_biases)]
        running = [list(args.running_means), list(args.running_vars)]
        convolutions, fixed = list(args.conv_weights), 0
        for i, batch in enumerate(args.batch_stats):
            if i in sizes:
                for group in vectors:
                    group[i] = _reversed(group[i], sizes[i], 0)
                convolutions[i] = _reversed(convolutions[i], sizes[i], 1)
                if not batch:
                    for group in running:
                        group[fixed] = _reversed(group[fixed], sizes[i], 0)
            fixed += not batch
        return args._replace(
            norm_weights=vectors[0], norm_biases=vectors[1], conv_weights=convolutions,
            running_means=running[0], running_vars=running[1],
        )  # fmt: skip

    def update(stats: Tensor, starts: Sequence[int], count: Any) -> None:
        parts, new_starts = [], [0]
        for i, norm in enumerate(norms):
            part = stats[:, starts[i] : starts[i] + num_features(norm)]
            # The buffer begins with the input, so its sizes are the reversed ones.
            parts.append(_reversed(part, sizes[i][::-1], 1) if i in sizes else part)
            new_starts.append(new_starts[-1] + num_features(norm))
        update_running_stats(norms, torch.cat(parts, 1), new_starts[:-1], count)

    out, _ = run_dense_block(x, norms, convs, recompute, backend, **options, reorder=reorder, update=update)
    return _reversed(out, made, 1)


# --- checks -------------------------------------------------------------------------------------------


def kinds_of(module: Any) -> dict[str, tuple[type[nn.Module], str]]:
    """The class of every submodule by dotted name, and the first name of a submodule that has several."""
    first = {m: name for name, m in module.named_modules()}
    named = module.named_modules(remove_duplicate=False)
    return {name: (type(m), first[m]) for name, m in named if m is not module}


def changes(module: Any, kinds: dict[str, tuple[type[nn.Module], str]], plan: Plan) -> str | None:
    """What has changed since the module was recognised, or None."""
    if list(kinds_of(module).items()) != list(kinds.items()):  # their order too: a Sequential runs in it
        return "its modules have changed since it was recognised"
    original = original_class(type(module)) if isinstance(module, Recognised) else type(module)
    if not torch.compiler.is_compiling() and (name := patched_method(original)):
        return f"its class's {name} has been replaced"
    for name in kinds:
        if reason := interference(submodule(module, name)):
            return f"{name} {reason}"
    return changed_guards(module, plan.guards)


def changed_guards(module: Any, guards: Guards) -> str | None:
    """Which of the values that a forward reads has changed, or None."""
    for path, name, value in guards.attributes:
        holder = submodule(module, path)
        found = getattr(holder, name, Absence.ABSENT)
        if isinstance(found, types.MethodType) and found.__self__ is holder:
            found = found.__func__
        if not equal(found, value):
            return f"{path or 'its'} {name} has changed since it was recognised"
    for path, name, value in guards.variables:
        holder, last = _holder(path, name)
        if not equal(getattr(holder, last, Absence.ABSENT), value):
            return f"{path}.{name} has changed since it was recognised"
    return None


def equal(found: Any, value: Any) -> bool:
    """Whether a guard's value is unchanged; unlike ``==``, True does not equal 1."""
    return found is value or (type(found) is type(value) and found == value)


def _holder(module: str, path: str) -> tuple[Any, str]:
    """The object that holds the last name of a dotted path in a Python module, and that name."""
    found: Any = sys.modules.get(module)
    *names, last = path.split(".")
    for name in names:
        found = getattr(found, name, None)
    return found, last


def unsupported(module: Any, plan: Plan) -> str | None:
    """Why the operators cannot compute the plan, or None."""

    def named(names: Iterable[str]) -> list[tuple[str, Any]]:
        return [(name, submodule(module, name)) for name in names]

    dims = {dims_of(conv) for _, conv in named(plan.convs)}
    if len(dims) > 1:
        return "it is for data of different dimensions"
    for step in plan.steps:
        if isinstance(step, Transition):
            dropouts: tuple[Dropout, ...] = (step.dropout,)
            reason = transition_reason(*named([step.norm, step.conv]))
        else:
            dropouts = step.dropouts
            reason = block_reason([named(layer.modules) for layer in step.layers])
        if reason is not None:
            return reason
        kinds = {dropout.dims for dropout in dropouts if dropout.rate}
        if len(kinds) > 1 or not kinds <= {0, *dims}:
            return "it applies dropout of different kinds or dimensions"
    return None


# --- classes ------------------------------------------------------------------------------------------


@functools.cache
def _traced_class(kind: Any, mixin: Any) -> Any:
    names = ("__module__", "__qualname__", "__doc__", "__annotations__")  # TorchScript reads the last
    own = {name: getattr(kind, name, {}) for name in names}
    # The argument has the original's name, for calls by keyword.
    forward = Traced.forward
    (this, _, *others), (_, argument, *_) = forward.__code__.co_varnames, kind.forward.__code__.co_varnames
    code = forward.__code__.replace(co_varnames=(this, argument, *others))
    own["forward"] = own["fused_forward"] = types.FunctionType(code, forward.__globals__)
    return type(kind.__name__, (mixin, kind), own)


# Annotated again because mypy does not treat classes as hashable.
traced_class: Callable[[Any, Any], Any] = _traced_class


def install(module: Any, plan: Plan, recompute: str, backend: str, name: str, returns_copy: bool) -> None:
    """Make a module run its plan, in place."""
    kinds = kinds_of(module)
    module.__class__ = traced_class(type(module), Recognised)
    module.plan, module.kinds, module.returns_copy = plan, kinds, returns_copy
    module.recompute, module.backend, module.part_name = recompute, backend, name


def traced_base(kind: type) -> Any:
    """The class that :func:`traced_class` made; ``fully_shard`` may have derived ``kind`` from it."""
    return next(base for base in kind.__mro__ if "fused_forward" in base.__dict__)


def original_class(kind: type) -> Any:
    """The class from which a traced module's class was made."""
    return traced_base(kind).__bases__[1]


def _new(kind: Any, mixin: Any) -> Any:
    traced = traced_class(kind, mixin)
    return traced.__new__(traced)
