"""How the campaign calls a network: which part runs, and how autograd is used."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import dense_ext

#: A part of a network as a function of images, which returns one tensor or several.
Function = Callable[[Tensor], Any]
#: A call's results by name: tensors and other values that must be equal.
Found = dict[str, Any]

# --- the part that is called -------------------------------------------------------------------------------


def _one_by_one(features: nn.Sequential) -> Function:
    """Call the children in turn and return all their results, as an encoder does."""

    def run(x: Tensor) -> list[Tensor]:
        children = list(features.children())
        found = [x := child(x) for child in children]
        # Leave out the results that an in-place ReLU has overwritten.
        return [
            y for y, after in zip(found, [*children[1:], None], strict=True) if not isinstance(after, nn.ReLU)
        ]

    return run


def _slices(features: Any) -> Function:
    """Call the features as two slices."""

    def run(x: Tensor) -> Tensor:
        middle = len(features) // 2 + 1
        return features[middle:](features[:middle](x))

    return run


def _beginning(features: Any) -> Function:
    return lambda x: features[: 2 * len(features) // 3](x)


def _reversed_twice(features: Any) -> Function:
    """Call the features twice, with x and with x / 2, and use both outputs."""
    return lambda x: [features(x), features(x * 0.5)]


def _written_into(features: Any) -> Function:
    """Call the features and write into their output."""

    def run(x: Tensor) -> Tensor:
        y = features(x)
        return y.mul_(0.5) if y.requires_grad else y

    return run


PARTS: dict[str, Callable[[Any], Function]] = {
    "network": lambda model: model,
    "features": lambda model: model.features,
    "children one by one": lambda model: _one_by_one(model.features),
    "slices": lambda model: _slices(model.features),
    "beginning": lambda model: _beginning(model.features),
    "features twice": lambda model: _reversed_twice(model.features),
    "features written into": lambda model: _written_into(model.features),
    "features without their last": lambda model: model.features[:-1],
}

# --- the way autograd is used ------------------------------------------------------------------------------


def _outputs(function: Function, x: Tensor) -> tuple[list[Tensor], Found]:
    ys = function(x)
    ys = list(ys) if isinstance(ys, (list, tuple)) else [ys]
    found: Found = {}
    for i, y in enumerate(ys):
        found[f"output {i}"] = y.detach().clone()
        # Only for contiguous images. Blocks and transitions called on their own may return either format.
        if len(ys) == 1 and x.is_contiguous():
            found[f"memory format of output {i}"] = memory_formats(y)
        found[f"whether output {i} requires a gradient"] = y.requires_grad
    return ys, found


def memory_formats(y: Tensor) -> tuple[bool, bool]:
    """Whether a tensor is contiguous, and whether it is contiguous in channels_last memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = y.dim() in formats and y.is_contiguous(memory_format=formats[y.dim()])
    return y.is_contiguous(), last


def _loss(ys: list[Tensor]) -> Tensor:
    """A scalar loss with some curvature in every output."""
    total = torch.zeros((), dtype=torch.float64)
    for y in ys:
        weights = torch.arange(y.numel(), dtype=y.dtype).sin().view(y.shape)
        total = total + (F.softplus(y) * weights).mean()
    return total


def _backward(model: nn.Module, function: Function, x: Tensor) -> Found:
    ys, found = _outputs(function, x)
    loss = _loss(ys)
    if loss.requires_grad:
        loss.backward()
    return found


def _plain_sum(model: nn.Module, function: Function, x: Tensor) -> Found:
    """The output's gradient is one number, expanded."""
    ys, found = _outputs(function, x)
    ys[-1].sum().backward()
    return found


def _given_gradient(model: nn.Module, function: Function, x: Tensor) -> Found:
    """The user passes the output's gradient, which must not be modified."""
    ys, found = _outputs(function, x)
    grad = torch.linspace(-1, 1, ys[-1].numel(), dtype=torch.float64).view(ys[-1].shape)
    kept = grad.clone()
    ys[-1].backward(grad)
    return {**found, "the gradient given": torch.equal(grad, kept)}


def _gradient_from_hook(model: nn.Module, function: Function, x: Tensor) -> Found:
    """A hook on the output keeps its gradient, and so does retain_grad."""
    ys, found = _outputs(function, x)
    kept: list[Tensor] = []
    ys[0].register_hook(kept.append)
    ys[0].retain_grad()
    _loss(ys).backward()
    return {**found, "gradient kept": kept[0], "gradient retained": ys[0].grad}


def _twice_through_a_graph(model: nn.Module, function: Function, x: Tensor) -> Found:
    ys, found = _outputs(function, x)
    loss = _loss(ys)
    loss.backward(retain_graph=True)
    loss.backward()
    return found


def _two_forwards(model: nn.Module, function: Function, x: Tensor) -> Found:
    """Two forwards, then one backward."""
    (first, found), (second, more) = _outputs(function, x), _outputs(function, x.detach() * 0.7)
    (_loss(first) * _loss(second)).backward()
    return {**found, **{f"second {k}": v for k, v in more.items()}}


def _parts_of_gradients(model: nn.Module, function: Function, x: Tensor) -> Found:
    """Gradients of some parameters and then of others, from the same graph."""
    ys, found = _outputs(function, x)
    loss = _loss(ys)
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    for i in range(3):
        some = wanted[i::3]
        grads = torch.autograd.grad(loss, some, retain_graph=True, allow_unused=True) if some else ()
        found.update({f"gradient {i}, {j}": g for j, g in enumerate(grads)})
    return found


def _penalty(model: nn.Module, function: Function, x: Tensor) -> Found:
    """The loss is the norm of the input's gradient."""
    ys, found = _outputs(function, x)
    (grad,) = torch.autograd.grad(_loss(ys), x, create_graph=True)
    grad.square().sum().backward()
    return {**found, "gradient": grad.detach()}


def _penalty_of_parameters(model: nn.Module, function: Function, x: Tensor) -> Found:
    """The loss is the norm of all parameter gradients plus the original loss."""
    ys, found = _outputs(function, x)
    loss = _loss(ys)
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    (loss + sum((g.square().sum() for g in grads if g is not None), torch.zeros(()))).backward()
    return {**found, **{f"gradient {i}": g if g is None else g.detach() for i, g in enumerate(grads)}}


def _hessian_vector_product(model: nn.Module, function: Function, x: Tensor) -> Found:
    """The second derivative through a gradient of the gradient."""
    ys, found = _outputs(function, x)
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(_loss(ys), wanted, create_graph=True, allow_unused=True)
    pairs = [(w, g) for w, g in zip(wanted, grads, strict=True) if g is not None and g.requires_grad]
    total = sum(
        ((g * torch.linspace(-1, 1, g.numel()).view(g.shape)).sum() for _, g in pairs), torch.zeros(())
    )
    second = torch.autograd.grad(total, [w for w, _ in pairs], allow_unused=True)
    return {**found, **{f"second derivative {i}": g for i, g in enumerate(second)}}


def _batch_of_gradients(model: nn.Module, function: Function, x: Tensor) -> Found:
    ys, found = _outputs(function, x)
    grads = torch.stack(
        [torch.ones_like(ys[-1]), torch.linspace(0, 1, ys[-1].numel()).view_as(ys[-1]).double()]
    )
    (of_x,) = torch.autograd.grad(ys[-1], x, grads, is_grads_batched=True)
    return {**found, "gradients": of_x}


def _steps(model: nn.Module, function: Function, x: Tensor) -> Found:
    """Steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    found: Found = {}
    for step in range(3):
        optimizer.zero_grad()
        ys, more = _outputs(function, x)
        _loss(ys).backward()
        optimizer.step()
        found.update({f"step {step}: {k}": v for k, v in more.items()})
    return found


def _reentrant_checkpoint(model: nn.Module, function: Function, x: Tensor) -> Found:
    return _checkpoint(function, x, use_reentrant=True)


def _plain_checkpoint(model: nn.Module, function: Function, x: Tensor) -> Found:
    return _checkpoint(function, x, use_reentrant=False)


def _checkpoint(function: Function, x: Tensor, use_reentrant: bool) -> Found:
    def several(x: Tensor) -> tuple[Tensor, ...]:
        ys = function(x)
        return tuple(ys) if isinstance(ys, list) else (ys,)

    # If it stopped early, it would not update the running statistics of the norms after the last needed
    # tensor.
    with set_checkpoint_early_stop(False):
        ys, found = _outputs(lambda x: checkpoint(several, x, use_reentrant=use_reentrant), x)
        _loss(ys).backward()
    return found


def _saved_elsewhere(model: nn.Module, function: Function, x: Tensor) -> Found:
    """Hooks return copies of the saved tensors."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        ys, found = _outputs(function, x)
    _loss(ys).backward()
    return found


def _save_on_cpu(model: nn.Module, function: Function, x: Tensor) -> Found:
    with torch.autograd.graph.save_on_cpu():
        ys, found = _outputs(function, x)
        _loss(ys).backward()
    return found


def _anomalies(model: nn.Module, function: Function, x: Tensor) -> Found:
    with torch.autograd.detect_anomaly(check_nan=False):
        return _backward(model, function, x)


def _written_input(model: nn.Module, function: Function, x: Tensor) -> Found:
    """The input is modified between forward and backward, which raises if the input was saved."""
    y = x * 1
    ys, found = _outputs(function, y)
    with torch.no_grad():
        y.mul_(2)
    _loss(ys).backward()
    return found


def _no_grad(model: nn.Module, function: Function, x: Tensor) -> Found:
    with torch.no_grad():
        return _outputs(function, x)[1]


def _inference_mode(model: nn.Module, function: Function, x: Tensor) -> Found:
    with torch.inference_mode():
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in _outputs(function, x)[1].items()}


def _inference_tensor(model: nn.Module, function: Function, x: Tensor) -> Found:
    """An input made in inference mode, used outside."""
    with torch.inference_mode():
        x = x.detach().clone()
    return _backward(model, function, x)


def _after_no_grad(model: nn.Module, function: Function, x: Tensor) -> Found:
    """A step after a forward without gradients."""
    return {
        **{f"before: {k}": v for k, v in _no_grad(model, function, x).items()},
        **_backward(model, function, x),
    }


def _eval_then_train(model: nn.Module, function: Function, x: Tensor) -> Found:
    """The mode changes between forward and backward, and before another forward."""
    ys, found = _outputs(function, x)
    model.train(not model.training)
    _loss(ys).backward()
    return {**found, **{f"other mode: {k}": v for k, v in _outputs(function, x.detach())[1].items()}}


def _several_in_one(ys: Any) -> Tensor:
    return _loss(list(ys) if isinstance(ys, (list, tuple)) else [ys])


def _in_eval(how: Any) -> Any:
    """Run in eval mode, since torch.func refuses updates of running statistics."""

    @functools.wraps(how)
    def run(model: nn.Module, function: Function, x: Tensor) -> Found:
        model.eval()
        return how(model, function, x)

    return run


@_in_eval
def _func_grad(model: nn.Module, function: Function, x: Tensor) -> Found:
    return {"gradient": torch.func.grad(lambda x: _several_in_one(function(x)))(x.detach())}


@_in_eval
def _func_grad_of_parameters(model: nn.Module, function: Function, x: Tensor) -> Found:
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    call = torch.func.functional_call
    return torch.func.grad(lambda p: _several_in_one(call(model, p, (x.detach(),))))(parameters)


@_in_eval
def _jvp(model: nn.Module, function: Function, x: Tensor) -> Found:
    y, tangent = torch.func.jvp(lambda x: _several_in_one(function(x)), (x.detach(),), (torch.ones_like(x),))
    return {"loss": y, "tangent": tangent}


def _forward_mode(model: nn.Module, function: Function, x: Tensor) -> Found:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        loss = forward_ad.unpack_dual(_several_in_one(function(dual)))
        return {"loss": loss.primal.detach(), "tangent": loss.tangent.detach()}


@_in_eval
def _per_sample(model: nn.Module, function: Function, x: Tensor) -> Found:
    """Gradients for each sample."""
    grad = torch.func.grad(lambda x: _several_in_one(function(x[None])))
    return {"gradients": torch.func.vmap(grad)(x.detach())}


@_in_eval
def _vmap(model: nn.Module, function: Function, x: Tensor) -> Found:
    return {
        "losses": torch.func.vmap(lambda x: _several_in_one(function(x)))(torch.stack([x, x * 2]).detach())
    }


@_in_eval
def _hessian(model: nn.Module, function: Function, x: Tensor) -> Found:
    """torch.func: forward over reverse, along one direction."""
    gradient = torch.func.grad(lambda x: _several_in_one(function(x)))
    return {"product": torch.func.jvp(gradient, (x.detach(),), (torch.ones_like(x),))[1]}


def _functional_call(model: nn.Module, function: Function, x: Tensor) -> Found:
    """functional_call with other parameters, which get the gradients."""
    parameters = {k: (p.detach() * 1.1).requires_grad_() for k, p in model.named_parameters()}
    ys, found = _outputs(lambda x: torch.func.functional_call(model, parameters, (x,)), x)
    grads = torch.autograd.grad(_loss(ys), list(parameters.values()), allow_unused=True)
    return {**found, **dict(zip((f"gradient of {k}" for k in parameters), grads, strict=True))}


HOW: dict[str, Callable[[nn.Module, Function, Tensor], Found]] = {
    f.__name__[1:]: f
    for f in (
        _backward, _plain_sum, _given_gradient, _gradient_from_hook, _twice_through_a_graph, _two_forwards,
        _parts_of_gradients, _penalty, _penalty_of_parameters, _hessian_vector_product, _batch_of_gradients,
        _steps, _reentrant_checkpoint, _plain_checkpoint, _saved_elsewhere, _save_on_cpu, _anomalies,
        _written_input, _no_grad, _inference_mode, _inference_tensor, _after_no_grad, _eval_then_train,
        _func_grad, _func_grad_of_parameters, _jvp, _forward_mode, _per_sample, _vmap, _hessian,
        _functional_call,
    )
}  # fmt: skip

# --- the surroundings of the call --------------------------------------------------------------------------


@contextmanager
def _patched_relu() -> Iterator[None]:
    """Replace ``F.relu``, as libraries do that record calls."""
    original = F.relu
    F.relu = lambda *args, **kwargs: original(*args, **kwargs) * 0.5
    try:
        yield
    finally:
        F.relu = original


@contextmanager
def _global_hook() -> Iterator[None]:
    """A hook on every module halves the convolutions' outputs."""

    def halve(module: nn.Module, args: Any, y: Any) -> Any:
        return y * 0.5 if isinstance(module, (nn.Conv2d, nn.Conv3d)) else None

    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _patched_class() -> Iterator[None]:
    """Replace the norms' forward on the class."""
    original = nn.BatchNorm2d.forward
    nn.BatchNorm2d.forward = lambda self, x: original(self, x) * 0.5
    try:
        yield
    finally:
        nn.BatchNorm2d.forward = original


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    # Autocast does not change float64.
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "reference": lambda: dense_ext.use_backend("reference"),
    "relu replaced": _patched_relu,
    "global hook": _global_hook,
    "class patched": _patched_class,
}


# Those in which no part runs fused.
UNFUSED = ("relu replaced", "global hook", "class patched")


@dataclass(frozen=True)
class Call:
    """A call of a part of a network, with one way of using autograd, in some surroundings."""

    part: str = "network"
    how: str = "backward"
    surroundings: str = "nothing"

    def run(self, model: Any, x: Tensor) -> Found:
        """Make the call; returns its results."""
        with ExitStack() as stack:
            stack.enter_context(SURROUNDINGS[self.surroundings]())
            return HOW[self.how](model, PARTS[self.part](model), x)


calls = st.lists(
    st.builds(
        Call,
        part=st.sampled_from(list(PARTS)),
        how=st.sampled_from(list(HOW)),
        surroundings=st.sampled_from([*itertools.repeat("nothing", 5), *SURROUNDINGS]),
    ),
    min_size=1,
    max_size=2,
).map(tuple)
