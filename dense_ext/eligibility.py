"""The gate: decides at every call whether a fused operator may replace a module's own forward.

The gate checks PyTorch's mode (:func:`mode_reason`), the input (:func:`input_reason`) and the modules
(:meth:`Fused.unfusable`). If any of them is not known to be safe, the original's forward runs.

A full check of the modules takes about a millisecond. A :class:`Snapshot` records the state that passed it.
Later calls compare the modules with the snapshot, and repeat the full check only if they differ.
"""

from __future__ import annotations

import enum
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from .batch_norm import VECTORS, constant, uses_batch_stats

# --- PyTorch's mode ----------------------------------------------------------------------------------

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
# The functions that a call of an eager module runs, as PyTorch defines them. Other tools replace them to
# observe the call; then the original's forward has to run. For each owner, a module or class: the names of
# its functions, a getter and what it reads them from, and the functions. To compare them takes a microsecond.
_CALL_PATH: dict[Any, tuple[tuple[str, ...], Callable[[Any], Any], Any, tuple[Any, ...]]] = {}


def watch(owner: Any, *names: str) -> None:
    """Add two or more functions to those of which none may be replaced if fused operators are to run."""
    before = _CALL_PATH[owner][0] if owner in _CALL_PATH else ()
    names = tuple(dict.fromkeys((*before, *names)))
    in_module = isinstance(owner, types.ModuleType)
    get: Callable[[Any], Any] = itemgetter(*names) if in_module else attrgetter(*names)
    holder = vars(owner) if in_module else owner  # a dict is faster to read
    _CALL_PATH[owner] = names, get, holder, get(holder)


watch(nn.Module, "__call__", "_call_impl")
# Those of modules that no forward calls itself; recognition adds those that a forward may call.
watch(F, "batch_norm", "conv1d", "conv2d", "conv3d")
# What functions of F look up when they are called.
watch(torch, "batch_norm", "max_pool1d", "max_pool2d", "max_pool3d")
_export_fused = False


@contextmanager
def fused_export() -> Iterator[None]:
    """Keep the fused operators in graphs that ``torch.export`` makes inside this context.

    By default a swapped network exports as the standard PyTorch operators of its original, which load
    anywhere. A graph with fused operators can be loaded or compiled only where dense_ext is installed.
    """
    global _export_fused
    before, _export_fused = _export_fused, True
    try:
        yield
    finally:
        _export_fused = before


def mode_reason() -> str | None:
    """Why PyTorch's current mode requires the original's forward, or None."""
    if torch.compiler.is_compiling():
        exports = torch.compiler._is_exporting_flag and not _export_fused
        return "torch.export records standard operators" if exports else None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records standard operators"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform differentiates or batches the operators inside"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation passes through the operators inside"
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return "make_fx records standard operators"
    if any(_GLOBAL_HOOKS):
        return "a global module hook is registered"
    for owner, (names, get, holder, functions) in _CALL_PATH.items():
        if (found := get(holder)) != functions:
            name = next(name for name, now, was in zip(names, found, functions, strict=True) if now != was)
            return f"{owner.__name__}.{name} has been replaced"
    return None


# --- the input ----------------------------------------------------------------------------------------

# Tensor classes that the operators read like plain tensors. Adapters add their library's.
VOUCHED_TENSORS: set[type] = {Tensor, nn.Parameter, FakeTensor}


def input_reason(x: Any) -> str | None:
    """Why an input requires the original's forward, or None."""
    if not isinstance(x, (Tensor, torch.fx.Proxy)):
        return None  # eager can't take it either; the check of the fused operator's input refuses it
    if not vouched(x):
        return f"the input is a {qualified_name(type(x))}"
    if x.layout is not torch.strided:
        return f"the input has layout {x.layout}"
    return None


def readable(x: Any, module: Any) -> Any:
    """``x`` in a memory layout from which the norms inside ``module`` compute the right gradients.

    For channels_last images on a CPU, PyTorch's batch norm backward assumes that a norm's vectors are dense,
    and is wrong for a single image if the norm has a backward hook. In eager the images might have been
    contiguous; a fused part made them channels_last.
    """
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or x.dim() not in (4, 5):
        return x
    if x.is_contiguous():
        return x
    wrong = any(
        _has_strided_vectors(m) or (len(x) == 1 and (m._backward_hooks or m._backward_pre_hooks))
        for m in module.modules()
    )
    return x.contiguous() if wrong else x


def _has_strided_vectors(norm: nn.Module) -> bool:
    """Whether a batch norm's vectors may be strided; those that are no plain tensors of the norm may be."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    own = {**norm._parameters, **norm._buffers}
    return any(name not in own for name in VECTORS) or any(
        tensor is not None and not tensor.is_contiguous() for tensor in own.values()
    )


def vouched(x: Any) -> bool:
    """Whether the operators read x like a plain tensor. The compiler has its own classes and checks them."""
    return torch.compiler.is_compiling() or type(x) in VOUCHED_TENSORS


def qualified_name(kind: type) -> str:
    """A class's name with its module, to tell apart classes with the same name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def names_of(found: type, expected: type) -> tuple[str, str]:
    """The names of two classes, with their modules if the bare names are equal."""
    if found.__name__ == expected.__name__:
        return qualified_name(found), qualified_name(expected)
    return found.__name__, expected.__name__


# --- classes -------------------------------------------------------------------------------------------

# Methods that a module's call runs and that other tools replace on a class.
_METHODS = (
    "forward", "_conv_forward", "bn_function", "call_checkpoint_bottleneck", "_check_input_dim", "__call__",
    "_call_impl", "_compiled_call_impl", "__getattr__",
)  # fmt: skip


# The methods of each class when it was first checked; classes with replaced methods are not recorded.
_known_methods: dict[type, dict[str, Any]] = {}


def patched_method(kind: type) -> str | None:
    """The name of a method of the class that has been replaced, or None."""
    methods = {name: getattr(kind, name) for name in _method_names(kind) if hasattr(kind, name)}
    if kind not in _known_methods:
        for name in _METHODS:
            if name in methods and _comes_from_elsewhere(kind, name):
                return name
        _known_methods[kind] = methods
    known = _known_methods[kind]
    return next((name for name in known if methods.get(name) is not known[name]), None)


def known_methods(kind: type) -> dict[str, Any]:
    """The methods of a class as they were when it was first checked."""
    return _known_methods.get(kind, {})


def _method_names(kind: type) -> list[str]:
    """The methods that a call may run: those in ``_METHODS``, and all of classes outside PyTorch."""
    written = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _PYTORCHS]
    kinds = (types.FunctionType, staticmethod)
    own = [n for base in written for n, value in vars(base).items() if isinstance(value, kinds)]
    return list(dict.fromkeys((*_METHODS, *own)))


_PYTORCHS = ("builtins", "dense_ext", "torch")


def _comes_from_elsewhere(kind: type, name: str) -> bool:
    """Whether a method's code is in another file than the class that defines the method."""
    owner = next(base for base in kind.__mro__ if name in base.__dict__)
    file = getattr(sys.modules.get(owner.__module__), "__file__", None) or ""
    code = getattr(owner.__dict__[name], "__code__", None)
    # Without source files (an interactive session, a frozen application) there is nothing to compare.
    return file.endswith(".py") and code is not None and code.co_filename != file


# --- settings -------------------------------------------------------------------------------------------

_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
# The settings of a plain convolution by class and kernel size: stride 1, same output size, one group.
_PLAIN = {
    (kind, size): ((size,) * d, (1,) * d, (size // 2,) * d, (1,) * d, 1, "zeros")
    for kind, d in ((nn.Conv2d, 2), (nn.Conv3d, 3))
    for size in (1, 3)
}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AVERAGE = {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False, "divisor_override": None}
_MAXIMUM = {
    "kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False,
}  # fmt: skip
_POOLS: dict[type[nn.Module], dict[str, Any]] = {
    nn.AvgPool2d: _AVERAGE, nn.AvgPool3d: _AVERAGE, nn.MaxPool2d: _MAXIMUM, nn.MaxPool3d: _MAXIMUM,
}  # fmt: skip
# The classes of `Fused.parts`, with the classes that replace them in a network for volumes.
_OF_VOLUMES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: nn.BatchNorm3d, nn.Conv2d: nn.Conv3d, nn.AvgPool2d: nn.AvgPool3d,
    nn.MaxPool2d: nn.MaxPool3d,
}  # fmt: skip
_VOLUMES = frozenset(_OF_VOLUMES.values())
# Norms with fixed statistics, which are supported in place of a batch norm. Adapters add their library's.
FIXED_NORMS: set[type[nn.Module]] = set()


class Fused:
    """A module or mixin that replaces its children's computation if their types and settings allow it."""

    # The classes of the inner modules for images, by name and in the order they run; and the classes of a
    # norm's own children.
    parts: ClassVar[Mapping[str, type[nn.Module]]]
    parts_of_norm: ClassVar[Mapping[str, type[nn.Module]]] = {}
    # The class whose forward runs if the fused operator may not. The forward is kept as it was when the fused
    # class was defined, and as a copy for TorchScript.
    original: ClassVar[Any]
    known_forward: ClassVar[Any]
    original_forward: ClassVar[Callable[..., Tensor]]
    # The forward that runs the fused operator; a user's subclass may have another one.
    fused_forward: ClassVar[Callable[..., Tensor]]
    # The module's dotted name in the swapped model, for messages. None marks features that were swapped
    # although their stem can't be fused.
    part_name: str | None = ""
    backend: str
    # Whether a call returns a copy, since the code around it writes into the result or relies on its layout.
    # The copy is contiguous where eager's result is.
    returns_copy: bool = False
    _modules: dict[str, Any]
    # TorchScript compiles the original's forward, which uses none of these.
    __jit_ignored_attributes__: ClassVar = [
        "backend", "functions", "kinds", "part_name", "plan", "recompute", "returns_copy",
    ]  # fmt: skip

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Find the forward that the class would have without the fused one."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            # The class may inherit its forward, and get one of its own later.
            if issubclass(base, nn.Module) and not issubclass(base, Fused):
                cls.original, cls.known_forward = base, base.forward
                cls.original_forward = _renamed(cls.known_forward, "original_forward")
                return

    def run_original(self, x: Any) -> Any:
        """Call the module's own forward, as its class defines it now."""
        return self.original.forward(self, readable(x, self))

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """The full check of a module: why its own forward has to run, or None."""
        raise NotImplementedError

    @classmethod
    def why_not_at_rest(cls, module: Any) -> str | None:
        """The full check outside a call, for a swap or a report; it also checks the weights."""
        return cls.why_not(module) or weights_reason(cls.inspected(module), at_rest=True)

    @classmethod
    def inspected(cls, module: Any) -> list[Any]:
        """The children that the check looks at."""
        return list(module._modules.values())

    @classmethod
    def surroundings(cls, module: Any) -> tuple[list[Any], list[Any]]:
        """Modules that the check looks at without what is inside them: at all of the first, at which children
        the second have.
        """
        return [], []

    @classmethod
    def guarded(cls, module: Any) -> list[tuple[Any, str, Any]]:
        """Further attributes that the check depends on, each as (object, name, value)."""
        return []

    def unfusable(self) -> str | None:
        """Why the state of the inner modules requires the module's own forward, or None."""
        if torch.compiler.is_compiling():  # the compiler guards everything that the full check reads
            return self.why_not(self)
        if self.original.forward is not type(self).known_forward:
            return f"{self.original.__name__}.forward has been replaced"
        snapshot = _snapshots.get(self)
        if snapshot is None or not snapshot.holds(self.inspected(self), *self.surroundings(self)):
            if (reason := self.why_not(self) or weights_reason(self.inspected(self))) is not None:
                return reason
            _snapshots[self] = Snapshot(self.inspected(self), *self.surroundings(self), self.guarded(self))
        return None

    def why_eager(self, x: Any) -> str | None:
        """The gate: why a call with the input ``x`` has to run the original's forward, or None."""
        return mode_reason() or self.why_not_fused(x)

    def why_not_fused(self, x: Any) -> str | None:
        """The gate without the check of PyTorch's mode, for callers that have already made it."""
        if (reason := input_reason(x)) is not None:
            return reason
        if (reason := self.unfusable()) is not None:
            self._warn_once(reason)
        return reason

    def _warn_once(self, reason: str) -> None:
        """Warn once per reason that this part, which was to run fused, no longer does."""
        if torch.compiler.is_compiling() or self.part_name is None or _warned.get(self) == reason:
            return
        _warned[self] = reason
        name = self.part_name or type(self).__name__
        warnings.warn(f"dense_ext: {name} runs its original forward: {reason}", stacklevel=2)

    @classmethod
    def reason(cls, modules: Mapping[str, Any], names: Iterable[str]) -> str | None:
        """Why these modules can't run fused, or None; their names must be ``names``, in this order."""
        if list(modules) != list(names):
            return f"its children are {', '.join(modules) or 'none'}, expected {', '.join(names)}"
        of_three = "conv2" if "conv2" in modules else "conv1"
        parts = cls.parts
        if not _VOLUMES.isdisjoint([type(module) for module in modules.values()]):
            parts = {name: _OF_VOLUMES.get(part, part) for name, part in parts.items()}
        for name, module in modules.items():
            if wrong := cls.part_reason(module, parts[name], 3 if name == of_three else 1):
                return f"{name} {wrong}"
        return None

    @classmethod
    def part_reason(cls, module: Any, expected: type[nn.Module], size: int) -> str | None:
        kind = type(module)
        other_norm = kind in FIXED_NORMS or kind is nn.SyncBatchNorm
        if kind is not expected and not (other_norm and expected in _NORMS):
            return "is {}, not {}".format(*names_of(kind, expected))
        if (reason := interference(module)) is not None:
            return reason
        if expected in _CONVS:
            return _conv_reason(module, size)
        if expected in _POOLS:
            return _pool_reason(module)
        return cls._own_reason(module) if module._modules or cls.parts_of_norm else None

    @classmethod
    def _own_reason(cls, module: nn.Module) -> str | None:
        """Why the children of a norm or an activation prevent fusing, or None."""
        expected = cls.parts_of_norm if isinstance(module, _NORMS) else {}
        found = {name: type(child) for name, child in module._modules.items()}
        if found != expected:
            shown = (", ".join(f"{n} ({t.__name__})" for n, t in of.items()) for of in (found, expected))
            return "has {}, expected {}".format(*(text or "nothing inside" for text in shown))
        for name, child in module.named_children():
            if (reason := interference(child)) is not None:
                return f"has {name} that {reason}"
        return None


def _renamed(function: Any, name: str) -> Any:
    """A copy of a function under another name, since TorchScript uses the name stored in the function."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copy.__annotations__, copy.__kwdefaults__ = function.__annotations__, function.__kwdefaults__
    return copy


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module itself carries a hook of any kind."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def interference(module: nn.Module, kind: Any = None) -> str | None:
    """Why a call of ``module`` might do anything other than its class's own forward, or None.

    ``kind`` is the class whose methods are checked: that of the module, unless it is given.
    """
    kind = kind or type(module)
    if has_hooks(module):
        return "carries a hook, which a fused call would skip"
    own: dict[str, Any] = module.__dict__
    names: Iterable[str] = _METHODS
    if not torch.compiler.is_compiling():
        if name := patched_method(kind):
            return f"is of a class whose {name} has been replaced"
        names = known_methods(kind)
    for name in names:
        if name in own:
            return f"carries a {name} of its own"
    return None


def _conv_reason(conv: Any, size: int) -> str | None:
    """How a convolution differs from a plain one without bias, or None."""
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    plain = _PLAIN[type(conv), size]
    if settings != plain:
        pairs = zip(_CONV, settings, plain, strict=True)
        return next(f"has {name} {got}, expected {right}" for name, got, right in pairs if got != right)
    if constant(conv, "bias") is not None:
        return "has a bias, expected none"
    return None


def weights_reason(modules: Iterable[nn.Module], at_rest: bool = False) -> str | None:
    """Why a tensor of a convolution or a norm inside ``modules`` prevents fusing, or None.

    ``at_rest`` means outside a call; then FSDP's weights may be sharded.
    """

    def is_sharded(tensor: Any) -> bool:
        return at_rest and qualified_name(type(tensor)) == "torch.distributed.tensor.DTensor"

    for top in modules:
        for name, module in top.named_modules():
            for vector in VECTORS if _is_norm(module) else ():
                tensor = constant(module, vector)
                if not (tensor is None or vouched(tensor) or is_sharded(tensor)):
                    return f"{name or 'norm'} has a {vector} of type {qualified_name(type(tensor))}"
            if type(module) not in _CONVS:
                continue
            conv: Any = module
            weight = constant(conv, "weight")
            if at_rest and getattr(weight, "_fsdp_flattened", False):
                continue  # FSDP1's: a process's share of the weight, which has another shape
            if not (vouched(weight) or is_sharded(weight)):
                return f"{name or 'conv'} has a weight of type {qualified_name(type(weight))}"
            expected = (conv.out_channels, conv.in_channels, *conv.kernel_size)
            if tuple(weight.shape) != expected:
                return f"{name or 'conv'} has a weight of shape {tuple(weight.shape)}, expected {expected}"
            bias = constant(conv, "bias")
            if bias is not None and not (vouched(bias) and tuple(bias.shape) == expected[:1]):
                return f"{name or 'conv'} has a bias of type {qualified_name(type(bias))} {tuple(bias.shape)}"
    return None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module) in FIXED_NORMS


def _pool_reason(pool: nn.Module) -> str | None:
    for name, right in _POOLS[type(pool)].items():
        got = getattr(pool, name)
        if got != right and not (isinstance(got, tuple) and set(got) == {right}):
            return f"has {name} {got}, expected {right}"
    return None


# --- snapshots ---------------------------------------------------------------------------------------------

_children, _attributes = attrgetter("_modules"), attrgetter("__dict__")
_settings_of_conv = itemgetter(*_CONV)


def _values(parents: list[Any]) -> list[Any]:
    """The children of modules, one after the other."""
    return list(chain.from_iterable(map(dict.values, map(_children, parents))))


class Snapshot:
    """The state of modules that passed the full check, in a form that can be compared in microseconds.

    A DenseNet-121 has 400 modules and is to be compared in 150 us. So the comparison is by identity, over
    flat lists, with little Python per module. If any object is not the same, the full check runs again.
    """

    def __init__(
        self, top: list[Any], entered: list[Any], holders: list[Any], guarded: list[tuple[Any, str, Any]]
    ) -> None:
        self.top, self.entered, self.holders, self.guarded = top, entered, holders, guarded
        self.held = _values(holders)
        self.parents = [m for t in top for m in t.modules() if m._modules]
        self.modules = self._flat()
        self.types = list(map(type, self.modules))
        # A new attribute of an instance can hide a method of its class, or a parameter; compare their number.
        self.attributes = list(map(_attributes, self.modules))
        self.lengths = list(map(len, self.attributes))
        convs = [m.__dict__ for m in self.modules if type(m) in _CONVS]
        # Store ids, so as not to keep the weights alive: in a functional call they are not the module's own.
        self.convs = [
            (conv, _settings_of_conv(conv), *(id(conv["_parameters"].get(n)) for n in ("weight", "bias")))
            for conv in convs
        ]
        norms = filter(_is_norm, self.modules)
        self.vectors = [tensors for norm in norms for tensors in (norm._parameters, norm._buffers)]
        self.vector_types = self._types_of_vectors()
        self.pools = [(m, _pool_settings(m)) for m in self.modules if type(m) in _POOLS]
        self.synchronised = [(m, _sync_settings(m)) for m in self.modules if type(m) is nn.SyncBatchNorm]
        # A forward may read the names of a ModuleDict's children.
        self.named = [(m._modules, tuple(m._modules)) for m in self.modules if isinstance(m, nn.ModuleDict)]
        self.dropping = [(m.__dict__, m.drop_rate) for m in top if hasattr(m, "drop_rate")]
        self.drops = any(rate for _, rate in self.dropping)
        self.methods = [
            (kind, name, function)
            for kind in set(self.types)
            for name, function in _known_methods.get(kind, {}).items()
        ]

    def _types_of_vectors(self) -> set[type]:
        return set(map(type, chain.from_iterable(map(dict.values, self.vectors))))

    def _flat(self) -> list[Any]:
        return [*self.top, *self.entered, *_values(self.parents)]

    def holds(self, top: list[Any], entered: list[Any], holders: list[Any]) -> bool:
        """Whether the modules are unchanged since they passed the full check."""
        try:
            return (
                top == self.top
                and entered == self.entered
                and (not holders or (holders == self.holders and _values(holders) == self.held))
                and self._flat() == self.modules
                and list(map(type, self.modules)) == self.types
                and list(map(len, self.attributes)) == self.lengths
                and all([tuple(children) == names for children, names in self.named])  # noqa: C419  # faster
                and self._types_of_vectors() == self.vector_types
                and self._no_hooks()
                and self._same_settings()
                and _unchanged(self.methods)
                and _unchanged(self.guarded)
            )
        except (KeyError, AttributeError, RuntimeError):  # an attribute is gone, or changes in another thread
            return False

    def _no_hooks(self) -> bool:
        for own in self.attributes:
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own  # in place of another attribute
            ):
                return False
        return True

    def _same_settings(self) -> bool:
        for conv, (size, stride, padding, dilation, groups, mode), weight, bias in self.convs:
            tensors = conv["_parameters"]
            if (
                id(tensors["weight"]) != weight
                or id(tensors["bias"]) != bias
                or conv["_buffers"]
                or conv["kernel_size"] is not size
                or conv["padding"] is not padding
                or conv["stride"] is not stride
                or conv["dilation"] is not dilation
                or conv["groups"] is not groups
                or conv["padding_mode"] is not mode
            ):
                return False
        for layer, rate in self.dropping:
            if layer["drop_rate"] != rate:
                return False
        if self.drops and len({layer["training"] for layer, _ in self.dropping}) > 1:
            return False
        for read, checked in ((_pool_settings, self.pools), (_sync_settings, self.synchronised)):
            for module, settings in checked:
                if read(module) != settings:
                    return False
        return True


class Absence(enum.Enum):
    """The value of an attribute that there is not."""

    ABSENT = "absent"


def _unchanged(attributes: list[tuple[Any, str, Any]]) -> bool:
    """Whether attributes, each given as (object, name, value), still have their values."""
    for of, name, value in attributes:  # noqa: SIM110  # a generator for `all` takes longer
        if getattr(of, name, Absence.ABSENT) is not value:
            return False
    return True


def _sync_settings(norm: Any) -> tuple[Any, ...]:
    return norm.training, uses_batch_stats(norm), norm.process_group


def _pool_settings(pool: nn.Module) -> list[Any]:
    return [getattr(pool, name) for name in _POOLS[type(pool)]]


# Weak dictionaries, so that a module gets no extra attributes and its copies and pickles carry none.
_snapshots: weakref.WeakKeyDictionary[Any, Snapshot] = weakref.WeakKeyDictionary()
_warned: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
