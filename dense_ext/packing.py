"""Weights that are packed once for inference on a CPU, instead of at every call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from .batch_norm import VECTORS, constant
from .eligibility import Fused
from .ops import constant_when_compiled

_BATCHES = "num_batches_tracked"
_version, _training = attrgetter("_version"), attrgetter("training")
_state = attrgetter("__dict__", "_parameters", "_buffers")


class Packed:
    """The packed weights of a part in the dtype that runs it, and the state of what they are made of.

    It is made before the weights are packed, so that a change in the meantime, by another thread, shows. A
    call compares hundreds of tensors, so it takes little Python for each. The state holds no module, so that
    modules can be freed.
    """

    weights: Tensor

    def __init__(self, norms: Sequence[nn.Module], convs: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.dtype, self.steps = dtype, _steps
        self.states = self._states(norms, convs)
        self.lengths = list(map(len, self.states))  # a new attribute may hide a parameter
        where = _places(norms, convs)
        self.holders = [_holder(module, name) for module, name in where]
        self.names = [name for _, name in where]
        self.found = self._find()
        self.sources: list[Tensor] = [source for source in self.found if source is not None]
        self.versions = self._versions()
        # An assignment to `.data` changes no version. The memory before it is kept, so that the memory after
        # it is another.
        self.memory = [source.detach() for source in self.sources]
        self.eps = [norm.eps for norm in norms]

    @staticmethod
    def _states(norms: Sequence[nn.Module], convs: Sequence[nn.Module]) -> list[dict[str, Any]]:
        """What tells a module from any other, without keeping it alive."""
        return list(chain.from_iterable(map(_state, (*norms, *convs))))

    def _find(self) -> list[Tensor | None]:
        return list(map(getitem, self.holders, self.names))

    def _versions(self) -> list[int]:
        return list(map(_version, self.sources))

    def holds(self, norms: Sequence[Any], convs: Sequence[Any]) -> bool:
        """Whether all modules, parameters and statistics are unchanged."""
        states = self._states(norms, convs)
        try:
            return (
                len(states) == len(self.states)
                and all(map(is_, states, self.states))
                and list(map(len, states)) == self.lengths
                and all(map(is_, self._find(), self.found))
                and self._versions() == self.versions
                and all(map(Tensor.is_set_to, self.sources, self.memory))
                and self.steps == _steps
                and [norm.eps for norm in norms] == self.eps
            )
        except KeyError:  # a tensor is gone
            return False


def _places(norms: Sequence[nn.Module], convs: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Where the tensors of a part are: modules and names.

    PyTorch's batch norm does not count its writes to running statistics. It counts those to the number of
    batches.
    """
    vectors = [(norm, name) for norm in norms for name in (*VECTORS, _BATCHES)]
    return [*vectors, *((conv, name) for conv in convs for name in ("weight", "bias"))]


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary in which a module has its parameter, buffer or plain tensor ``name``."""
    holders = (module.__dict__, module._parameters, module._buffers)
    return next((holder for holder in holders if name in holder), {name: None})


# How many steps optimizers have made since the first call of pack_weights. Fused ones (``fused=True``) do not
# count their writes to parameters.
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# By a part's first norm. Weak, and apart from the modules, so that copies and pickles carry nothing.
_wanted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_packed: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def pack_weights(model: nn.Module) -> nn.Module:
    """Keep the packed weights of fused blocks and transitions for inference on a CPU; returns ``model``.

    The kernels read weights in an order of their own. Without this function they reorder them at every call,
    which takes much of the time of a single image. With it, a part's first call without gradients in eval
    mode keeps them. In float32 that takes some 1.6 times the memory of the weights, as 3x3 windows are kept
    as Winograd's 16 points; under autocast to bfloat16 it takes half. The results have the same bits.

    A changed weight, norm or statistic is noticed, and packed anew; so are the steps of all optimizers. But
    PyTorch does not count writes through ``parameter.data``, NumPy or DLPack, by collectives of
    ``torch.distributed``, by another process, or by ``torch._foreach`` functions inside a
    ``TorchDispatchMode``: after such a write, call this function again.

    Under autocast they are packed in its dtype, which also saves casting them. Training and other devices do
    not use packed weights. Copies and pickles of a model carry none.

    Args:
        model: a model with fused dense blocks and transitions, by :func:`swap` or as a :class:`DenseNet`.

    Raises:
        ValueError: nothing in the model is fused.
    """
    if not any(isinstance(module, Fused) for module in model.modules()):
        raise ValueError("nothing in the model is fused, so there are no weights to pack; swap it first")
    _watch_optimizers()
    for module in model.modules():
        _wanted.add(module)
        _packed.pop(module, None)
    return model


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_count_step)


@constant_when_compiled
def _folds_constants() -> bool:
    """Whether the compiler computes once what depends on parameters alone."""
    return bool(torch._inductor.config.freezing)


def wanted(norms: Sequence[nn.Module]) -> bool:
    """Whether a call of the part with these norms may run with packed weights."""
    if torch.compiler.is_compiling():
        frozen = not torch.is_grad_enabled() and not any([norm.training for norm in norms])  # noqa: C419
        return frozen and _folds_constants()
    if len(_wanted) == 0 or norms[0] not in _wanted:
        return False
    if any(map(_training, norms)):
        # Statistics are often exchanged after training, by collectives whose writes PyTorch does not count.
        _packed.pop(norms[0], None)
        return False
    return not torch.is_grad_enabled()


def find(norms: Sequence[nn.Module], convs: Sequence[nn.Module], dtype: torch.dtype) -> Tensor | None:
    """The packed weights of a part for activations of ``dtype``, if they are up to date; else None."""
    packed = _packed.get(norms[0])
    if packed is None:
        return None
    if packed.dtype == dtype and packed.holds(norms, convs):
        return packed.weights
    _packed.pop(norms[0], None)  # unless another thread has done so
    return None


def watch(norms: Sequence[nn.Module], convs: Sequence[nn.Module], dtype: torch.dtype) -> Packed | None:
    """The state of a part before its weights are packed for activations of ``dtype``.

    None if not all changes would be noticed, so that packed weights can't be kept.
    """
    tensors = [constant(module, name) for module, name in _places(norms, convs)]
    if any(t is not None and t.is_inference() for t in tensors):  # these have no versions to compare
        return None
    if any(isinstance(norm, _BatchNorm) and constant(norm, _BATCHES) is None for norm in norms):
        return None
    return Packed(norms, convs, dtype)


def keep(norms: Sequence[nn.Module], packed: Packed | None, weights: Tensor) -> None:
    """Keep a part's packed weights as long as its first norm lives, if changes will be noticed."""
    if packed is not None:
        packed.weights = weights
        _packed[norms[0]] = packed
