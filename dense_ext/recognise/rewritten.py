"""The class of a module whose forward was rewritten, and how a chain runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..eligibility import Fused, interference, patched_method
from ..modules import (
    FusedDenseBlock,
    FusedTransition,
    contiguous_in_eager,
    may_need_layout,
    own_memory,
    run_stem,
    run_transition,
    runs_fused,
)
from ..supported import NORM_TYPES, transition_reason
from .chains import Chain, Part, Pieces, Rewriting, children_of, rewrite
from .fused import Recognised, Traced, changed_guards, kinds_of, original_class, submodule, traced_class
from .kept import RefusedError
from .proof import prove_same
from .tracing import transparent_checkpoints


class Rewritten(Traced):
    """Mixin that runs the rewritten forward.

    Attributes:
        plan: how the forward was rewritten.
        functions: the new forward in eval and in training mode.
    """

    plan: Rewriting
    functions: tuple[Callable[..., Any], Callable[..., Any]]

    def computed(self, x: Tensor) -> Any:
        in_eval, in_training = self.functions
        return (in_training if self.training else in_eval)(self, x, self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.functions = _functions(self.plan)

    @classmethod
    def inspected(cls, module: Any) -> list[Any]:
        return [submodule(module, name) for pieces in module.plan.pieces for name in pieces.modules]

    @classmethod
    def surroundings(cls, module: Any) -> tuple[list[Any], list[Any]]:
        entered = [submodule(module, name) for name in module.plan.entered]
        return entered, [submodule(module, name) for name, _ in module.plan.children]

    def unfusable(self) -> str | None:
        in_eval, in_training = self.plan.code
        if (reason := super().unfusable()) is None and in_eval != in_training:
            _, inside = self.surroundings(self)
            if any([module.training != self.training for module in inside]):  # noqa: C419  # compiled
                return "some of its modules are in training mode and some are not"
        return reason

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if not torch.compiler.is_compiling() and (name := patched_method(original_class(type(module)))):
            return f"its class's {name} has been replaced"
        if children_of(module, module.plan.called) != module.plan.children:
            return "its modules have changed since the forward was traced"
        for name, (kind, _) in module.kinds.items():
            found = submodule(module, name)
            if type(found) is not kind:
                return f"{name} has changed since the forward was traced"
            if (reason := interference(found)) is not None:
                return f"{name} {reason}"
        if (reason := changed_guards(module, module.plan.guards)) is not None:
            return reason
        return next(filter(None, (_reason(module, pieces) for pieces in module.plan.pieces)), None)


def name_of_pieces(module: Any, pieces: Pieces) -> str:
    """The dotted name of the module that holds all pieces and nothing else; else that of the norm."""
    holders = {name.rpartition(".")[0] for name in pieces.modules}
    (holder, *others) = holders
    if not others and holder and len(submodule(module, holder)._modules) == len(pieces.modules):
        return holder
    return pieces.norm


def _reason(module: Any, pieces: Pieces) -> str | None:
    """Why the operators no longer compute these pieces, or None."""
    norm = submodule(module, pieces.norm)
    if not pieces.conv:
        reason = Fused.part_reason(norm, NORM_TYPES[pieces.dims], 1)
        return None if reason is None else f"{pieces.norm} {reason}"
    return transition_reason((pieces.norm, norm), (pieces.conv, submodule(module, pieces.conv)))


# --- finding and installing --------------------------------------------------------------------------


def rewritten_calls(
    model: nn.Module, parts: set[nn.Module], skip: set[nn.Module]
) -> dict[nn.Module, tuple[str, Rewriting]]:
    """The modules of a model whose forward can be rewritten, the innermost ones, with their dotted names.

    Args:
        model: the model; it is not changed.
        parts: its dense parts, which are called as a whole.
        skip: modules whose forward is never called.
    """
    found: dict[nn.Module, tuple[str, Rewriting]] = {}
    inside = {inner for part in parts for inner in part.modules() if inner is not part}
    passed_over, outermost = skip | inside | parts, parts - inside
    done = set(parts)

    def may_have_chains(module: nn.Module) -> bool:
        """Whether it has a dense part, and a second one to follow it or a norm of its own."""
        within = outermost.intersection(module.modules())
        has_norm = any("running_mean" in m._buffers for m in module.modules() if m not in inside)
        return len(within) > 1 or (len(within) == 1 and has_norm)

    with transparent_checkpoints():
        for name, module in reversed(list(model.named_modules())):
            if module in passed_over or not _has_forward(module) or not may_have_chains(module):
                continue
            try:
                rewriting = rewrite(module, done, run_chain)
                called = [module.get_submodule(part) for part in rewriting.called]
                prove_same(module, called, functools.partial(install_calls, rewriting=rewriting))
            except RefusedError:
                continue
            done.add(module)
            found[module] = name, rewriting
    return found


def _has_forward(module: nn.Module) -> bool:
    if isinstance(module, Fused):
        return False
    return type(module) is nn.Sequential or not type(module).__module__.startswith("torch.nn.")


def install_calls(module: Any, rewriting: Rewriting, backend: str = "auto", name: str = "") -> None:
    """Make a module run its rewritten forward, in place."""
    pieces = [name for pieces in rewriting.pieces for name in pieces.modules]
    kinds = kinds_of(module)
    checked = {name for p in rewriting.pieces for name in (p.norm, p.conv)}
    module.__class__ = traced_class(type(module), Rewritten)
    module.plan, module.functions = rewriting, _functions(rewriting)
    module.kinds = {name: kinds[name] for name in (*rewriting.entered, *pieces) if name not in checked}
    module.backend, module.part_name = backend, name


def _functions(rewriting: Rewriting) -> tuple[Callable[..., Any], Callable[..., Any]]:
    in_eval, in_training = rewriting.code
    return in_eval.function(), in_training.function()


# --- running -----------------------------------------------------------------------------------------


def run_chain(module: Any, index: int, x: Tensor) -> tuple[Tensor, ...]:
    """Run a chain of a rewritten module on x: its last result, then the activations that it shows."""
    chain: Chain = module.plan.chains[index]
    contiguous = contiguous_in_eager(x)
    carried, shown, last = ops.NOTHING_CARRIED, [], chain.links[-1]
    for link in chain.links:
        if isinstance(link, Part):
            x, carried = _run_part(submodule(module, link.name), x, carried, contiguous)
            continue
        x, activation = _run_pieces(module, link, x, carried)
        carried = ops.NOTHING_CARRIED
        if activation is not None:
            shown.append(activation)
    results = [x, *shown]
    if contiguous:
        results = [y.contiguous() if c else y for y, c in zip(results, chain.as_eager, strict=True)]
    if results[0] is x and chain.as_eager[0] and isinstance(last, Part):
        results[0] = own_memory(x)  # a block's backward reads x
    return tuple(results)


def _run_part(part: Any, x: Tensor, carried: ops.Carried, contiguous: bool) -> tuple[Tensor, ops.Carried]:
    """Run a part; its own call runs if that does more than the fused operator.

    ``contiguous`` tells whether x is contiguous in eager.
    """
    if runs_fused(part, FusedDenseBlock, x):
        return part.run(x)
    if runs_fused(part, FusedTransition, x):
        return part.run(x, carried), ops.NOTHING_CARRIED
    if runs_fused(part, Recognised, x):
        return part.run(x, carried)
    before = x
    if contiguous and may_need_layout(part, x):
        x = x.contiguous()
    if carried is not ops.NOTHING_CARRIED and x is before:
        x = own_memory(x)
    return part(x), ops.NOTHING_CARRIED


def _run_pieces(module: Any, pieces: Pieces, x: Tensor, carried: ops.Carried) -> tuple[Tensor, Tensor | None]:
    norm, backend = submodule(module, pieces.norm), module.backend
    if not pieces.conv:
        return run_stem(x, norm, pieces.dims == 3, backend, shows_activation=pieces.shows_activation)
    return run_transition(
        x, norm, submodule(module, pieces.conv), backend, carried,
        pool=pieces.pool, activation=pieces.activation, shows_activation=pieces.shows_activation,
    )  # fmt: skip
