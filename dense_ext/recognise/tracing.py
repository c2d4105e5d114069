"""Traces a module's forward into a graph, and finds everything else that the graph depends on.

``torch.fx`` traces the module with torch.nn's modules as leaves. A proxy has no truth value, so a forward
that branches on its input cannot be traced. A forward may read plain attributes and globals; their values are
returned as guards. It may write no attributes and draw no random numbers.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import gc
import inspect
import operator
import os
import pickle
import random
import sys
import types
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from ..eligibility import Absence
from .kept import Kept, RefusedError, is_users, kept_generators, package, passed_over, recorded_code
from .proxies import WritableProxy

# The standard library's modules that a forward may use; results of others may differ from call to call.
_HARMLESS = {"builtins", "collections", "contextlib", "functools", "itertools", "math", "operator", "typing"}
_HARMLESS |= {"_collections", "_functools", "_operator"}  # as which C's functions of these say they are
_PARALLEL = ("torch.distributed.", "torch.nn.parallel.")  # where wrappers such as FSDP have their forward
_PLAIN = {bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, Absence}
# Attributes that every module has: the tracer reads these itself, and none is state of the forward.
_OF_EVERY_MODULE = frozenset([*dir(nn.Module()), "__class__", "__dict__"])
# Those of them that give a forward values which no guard covers.
_VALUES = frozenset([
    "__dict__", "_parameters", "_buffers", "parameters", "named_parameters", "buffers", "named_buffers",
    "get_parameter", "get_buffer", "state_dict", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
    "_backward_pre_hooks",
])  # fmt: skip
# Attributes of users' classes that Python itself keeps there.
_OF_PYTHON = ("_abc_impl", "_field_defaults")
# Builtins by which code reads variables that its instructions do not name.
_REFLECTION = ("__import__", "eval", "exec", "globals", "locals", "vars")
# PyTorch's functions whose result follows from their arguments: those of ATen, and what is made of them.
_NAMESPACES: tuple[Any, ...] = (
    torch._C._VariableFunctions, torch._C._nn, torch.functional, torch.nn.functional,
    *(getattr(torch._C, name) for name in ("_linalg", "_fft", "_special")),
)  # fmt: skip
# Others that a forward may call: gradient mode and autocast are traced in both states, and the rest says the
# same at every call, or changes nothing that is computed.
_ALLOWED = (
    "_assert", "_check", "_dynamo.is_compiling", "compiler.is_compiling", "compiler.is_dynamo_compiling",
    "compiler.is_exporting", "cuda.device_count", "cuda.empty_cache", "cuda.is_available",
    "cuda.nvtx.range_pop", "cuda.nvtx.range_push", "cuda.synchronize",
    "is_autocast_cpu_enabled", "is_autocast_enabled", "is_grad_enabled", "is_storage", "is_tensor",
    "jit.annotate", "jit.is_scripting", "jit.is_tracing", "jit.isinstance", "onnx.is_in_onnx_export",
    "typename", "utils.checkpoint.checkpoint", "utils.checkpoint.checkpoint_sequential",
)  # fmt: skip
_CONSTANTS = (
    torch.dtype, torch.layout, torch.memory_format, torch.device, torch.torch_version.TorchVersion, float,
    torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip


@dataclass(frozen=True)
class Guards:
    """The values that a forward reads besides its input; while they are unchanged, it computes the same.

    Attributes:
        attributes: tuples of a submodule's dotted name, an attribute, and its value.
        variables: tuples of a Python module's name, a dotted name in it, and its value.
        modes: the names of submodules whose mode the code of other modules reads; it was the module's own.
    """

    attributes: tuple[tuple[str, str, Any], ...] = ()
    variables: tuple[tuple[str, str, Any], ...] = ()
    modes: tuple[str, ...] = ()

    def __or__(self, other: Guards) -> Guards:
        """The union of two sets of guards."""
        return Guards(
            tuple(dict.fromkeys((*self.attributes, *other.attributes))),
            tuple(dict.fromkeys((*self.variables, *other.variables))),
            tuple(dict.fromkeys((*self.modes, *other.modes))),
        )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, needs_grad: bool, leaves: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.kind = type("_Proxy", (WritableProxy,), {"requires_grad": needs_grad})
        self.leaves = leaves
        self.ambient, self.hooks = _ambient(), _hooks()
        self.branches = False  # whether the forward has asked for a proxy's truth value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self.kind(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self.ambient:
            raise RefusedError("it changes gradient mode or autocast")
        node = super().create_node(*args, **kwargs)
        # Hooks are active in a checkpoint that was called by another name, and inside `save_on_cpu`.
        node.meta["saved_otherwise"] = bool(_checkpoints) or _hooks() != self.hooks
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.branches = True
        return super().to_bool(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaves(m) or is_torchs(m)


def is_torchs(module: nn.Module) -> bool:
    """Whether a module's class is torch.nn's, except containers, whose contents are traced."""
    if type(module) is nn.Module or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return type(module).__module__.startswith("torch.nn.")


def _ambient() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
    )


def _hooks() -> Any:
    """The hooks for tensors that are saved for backward, None without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def graph_of(module: nn.Module, leaves: Callable[[nn.Module], bool], needs_grad: bool = True) -> fx.Graph:
    """The graph of a module's forward in its current mode; modules for which ``leaves`` holds are not traced.

    Raises:
        RefusedError: the forward cannot be traced.
    """
    modules = list(_outside(module, leaves))
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise RefusedError("it has a module of TorchScript, which cannot be traced")
    if any(str(type(m).forward.__module__).startswith(_PARALLEL) for m in modules):
        raise RefusedError("it has modules wrapped for several processes, whose first call sets them up")
    try:
        tracer = _Tracer(needs_grad, leaves)
        with _proxies_as_tensors(module):
            graph = tracer.trace(module)
        if tracer.branches:
            raise RefusedError("it branches on values or sizes of its input, and catches the tracer's error")
        return graph
    except RefusedError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise RefusedError(f"its forward cannot be traced: {type(error).__name__}: {first[:120]}") from error


# A forward may depend on training mode, gradient mode, whether its tensors need gradients, and autocast.
_MODES = [
    (training, grad, needs_grad, autocast)
    for training in (True, False)
    for grad, needs_grad, autocast in (
        (True, True, False), (True, False, False), (False, False, False), (training, training, True)
    )
]  # fmt: skip


def traces(
    module: nn.Module, leaves: Callable[[nn.Module], bool] = lambda _: False
) -> Iterator[tuple[bool, fx.Graph, Guards]]:
    """For every mode: whether it is training mode, the forward's graph, and its guards.

    Modules for which ``leaves`` holds are not traced.

    Raises:
        RefusedError: the forward cannot be traced, has side effects, or reads values that cannot be guarded.
    """
    modules = list(_outside(module, leaves))
    if isinstance(module, fx.GraphModule):
        raise RefusedError("it is a GraphModule, whose class cannot be changed")
    for m in modules:  # tracing would run the hooks
        if m is not module and not (leaves(m) or is_torchs(m)) and (m._forward_hooks or m._forward_pre_hooks):
            raise RefusedError("it has modules that carry hooks, which a fused call would skip")
    before, drawn, kept = _state(modules), _generators(), Kept(modules)
    classes = dict.fromkeys(c for m in modules for c in type(m).__mro__ if not _is_torchs_class(c))
    names = {m: name for name, m in module.named_modules()}
    changed: list[tuple[nn.Module, str]] = []
    for training, grad, needs_grad, autocast in _MODES:
        with kept, kept_generators():
            for m in modules:
                m.training = training
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.set_grad_enabled(grad))
                for device in ("cpu", "cuda"):
                    stack.enter_context(_autocast(device, autocast))
                stack.enter_context(_without_collection())
                read = stack.enter_context(_recorded_reads(modules))
                code = stack.enter_context(recorded_code(kept))
                graph = graph_of(module, leaves, needs_grad)
            if (written := kept.changed()) is not None:
                raise RefusedError(f"its forward writes {written}")
            if _generators() != drawn:
                raise RefusedError("its forward draws random numbers")
            attributes = _attribute_guards(module, read) + _uncalled_guards(module, modules, graph)
            _check_defaults((f for c in classes for f in vars(c).values()), code)
            modes = dict.fromkeys(names[m] for m, name, _ in read if name == "training" and m in names)
            guards = Guards(attributes, _variable_guards(code, classes), tuple(modes))
            after = _state(modules)
            changed += [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
            yield training, graph, guards  # while the modules are in this mode
    if changed:
        raise RefusedError(f"its forward writes {type(changed[0][0]).__name__}.{changed[0][1]}")


def _outside(module: nn.Module, leaves: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """A module and those inside it, each once, but none inside modules for which ``leaves`` holds."""
    seen, waiting = set(), [module]
    while waiting:
        found = waiting.pop()
        if found not in seen:
            seen.add(found)
            yield found
            if found is module or not leaves(found):
                waiting += found.children()


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from running other code, such as its callbacks, during a forward."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _autocast(device: str, enabled: bool) -> Iterator[None]:
    """Switch a device's autocast on or off, even if this machine has no such device."""
    was = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, was)


@contextmanager
def _proxies_as_tensors(module: nn.Module) -> Iterator[None]:
    """Let forwards see proxies as tensors in ``isinstance``, so that they take the same branches.

    A proxy with ``__class__`` Tensor would do the same, but PyTorch's C++ code would believe it and crash.
    """

    def instance(value: Any, kinds: Any) -> bool:
        return isinstance(value, kinds) or (isinstance(value, fx.Proxy) and issubclass(Tensor, kinds))

    forwards = [getattr(type(m).forward, "__globals__", {}) for m in module.modules()]
    written = {id(g): g for g in forwards if not g.get("__name__", "torch.").startswith("torch.")}
    with ExitStack() as stack:
        for variables in written.values():
            if "isinstance" not in variables:
                variables["isinstance"] = instance
                stack.callback(variables.pop, "isinstance")
        yield


# The functions whose checkpoints a forward is in while it is traced.
_checkpoints: list[Callable[..., Any]] = []


@contextmanager
def transparent_checkpoints() -> Iterator[None]:
    """Make ``checkpoint(f, *args)`` call ``f(*args)``.

    It computes the same, but updates running statistics once; a checkpoint's backward updates them again.
    Nodes made in it have ``meta["saved_otherwise"]``. Contexts may be nested: the outermost has done it all.
    """
    real = torch.utils.checkpoint.checkpoint
    if _is_stand_in(real):
        yield
        return

    def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        kept = (
            "use_reentrant",
            "preserve_rng_state",
            "context_fn",
            "determinism_check",
            "debug",
            "early_stop",
        )
        _checkpoints.append(function)
        try:
            return function(*args, **{k: v for k, v in options.items() if k not in kept})
        finally:
            _checkpoints.pop()

    modules = list(sys.modules.values())  # thousands
    holders = [m for m in modules if getattr(m, "__dict__", {}).get("checkpoint") is real]
    with ExitStack() as stack:
        for holder in holders:
            stack.enter_context(mock.patch.object(holder, "checkpoint", checkpoint))
        yield


# --- the values that a forward reads ------------------------------------------------------------------


@contextmanager
def _recorded_reads(modules: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, str, Any]]]:
    """Records the attributes of modules that are read inside the context, with their values."""
    read: list[tuple[nn.Module, str, Any]] = []

    def recording(kind: Any) -> Any:
        def read_attribute(self: nn.Module, name: str) -> Any:
            value = kind.__getattribute__(self, name)
            if name not in _OF_EVERY_MODULE:
                read.append((self, name, value))
            elif name == "training":
                if _is_read_by_another(self, sys._getframe(1)):
                    read.append((self, name, value))
            elif name in _VALUES and not passed_over(sys._getframe(1).f_code.co_filename):
                raise RefusedError(f"its forward reads {kind.__name__}.{name}")
            return value

        def find_attribute(self: nn.Module, name: str) -> Any:
            try:
                value = kind.__getattr__(self, name)
            except AttributeError:
                read.append((self, name, Absence.ABSENT))
                raise
            if not isinstance(value, (fx.Proxy, nn.Module)):  # from a __getattr__ of the class's own
                read.append((self, name, value))
            return value

        own = {
            "__getattribute__": read_attribute, "__getattr__": find_attribute, "__module__": kind.__module__,
            "__records__": True,
        }  # fmt: skip
        return type(kind.__name__, (kind,), own)

    classes = [(m, type(m)) for m in modules]
    for m, kind in classes:
        if m.__class__ is not kind:  # a wrapper; its class cannot be changed
            raise RefusedError(f"{kind.__name__} passes for {m.__class__.__name__}")
    kinds = {kind: recording(kind) for kind in dict.fromkeys(kind for _, kind in classes)}
    before = {kind: set(vars(recorder)) for kind, recorder in kinds.items()}
    try:
        for m, kind in classes:
            m.__class__ = kinds[kind]
        yield read
    finally:
        for m, kind in classes:
            m.__class__ = kind
    for kind, recorder in kinds.items():
        if names := set(vars(recorder)) - before[kind]:
            raise RefusedError(f"its forward writes {kind.__name__}.{min(names)}, of a class")


def _is_read_by_another(module: nn.Module, frame: types.FrameType) -> bool:
    """Whether users' code that is no method of a module reads its attribute."""
    code = frame.f_code
    if passed_over(code.co_filename):
        return False
    return not code.co_argcount or frame.f_locals.get(code.co_varnames[0]) is not module


def _attribute_guards(
    module: nn.Module, read: list[tuple[nn.Module, str, Any]]
) -> tuple[tuple[str, str, Any], ...]:
    names = {m: name for name, m in module.named_modules()}
    found: dict[tuple[str, str, Any], None] = {}
    for m, name, value in read:
        if m not in names or isinstance(value, nn.Module) or (_is_function(value) and name not in m.__dict__):
            # A slice of a container is a module of its own, modules are in the graph, and changes of methods
            # are checked by class.
            continue
        if name == "training":  # which is traced in both states
            continue
        of = getattr(value, "__self__", None)  # of a bound method
        if of is m and isinstance(value, types.MethodType):
            value = value.__func__  # a copy of the module has the method bound to itself
        stateful = not (of is None or of is m or isinstance(of, (type, types.ModuleType)))
        if stateful or not (is_plain(value) or _is_function(value) or _is_torchs_class(value)):
            raise RefusedError(f"its forward reads {type(m).__name__}.{name}, a {type(value).__name__}")
        found[names[m], name, value] = None
    return tuple(found)


def _uncalled_guards(
    module: nn.Module, modules: Sequence[nn.Module], graph: fx.Graph
) -> tuple[tuple[str, str, Any], ...]:
    """Guards for the settings of torch.nn's modules that a forward does not call, since it may read them."""
    called = {module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    names = {m: name for name, m in module.named_modules()}
    return tuple(
        (names[m], name, value)
        for m in modules
        if is_torchs(m) and m not in called
        for name, value in m.__dict__.items()
        if not name.startswith("_") and name != "training" and is_plain(value)
    )


def is_plain(value: Any) -> bool:
    """Whether a value is immutable, so that comparing it is enough for a guard."""
    if isinstance(value, enum.Enum):
        return is_plain(value.value)
    # A class derived from these may have attributes.
    return type(value) in _PLAIN or (isinstance(value, tuple) and all(map(is_plain, value)))


def _is_function(value: Any) -> bool:
    kinds = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)
    return isinstance(value, (*kinds, type(torch.conv2d), type(Tensor.relu)))


def _is_code(value: Any) -> bool:
    return isinstance(value, type) or _is_function(value)


def _is_torchs_class(value: Any) -> bool:
    return isinstance(value, type) and package(value) in ("torch", "builtins")


def _class_guards(classes: Iterable[type], read: set[str]) -> tuple[tuple[str, str, Any], ...]:
    """Guards for the values of users' classes that a forward can reach by another way than an instance.

    ``read`` are the names in the code that has run.

    Raises:
        RefusedError: no guard covers a value.
    """
    found: dict[tuple[str, str, Any], None] = {}
    waiting, seen = list(classes), set()
    while waiting:
        kind = waiting.pop()
        if kind in seen or not is_users(kind) or issubclass(kind, enum.Enum):  # whose members are constants
            continue
        seen.add(kind)
        waiting += [*kind.__mro__, type(kind)]
        if "__records__" in vars(kind):  # it stands for the class from which it is derived
            continue
        # A tracer records what is read from a module, but not what is read from its class.
        any_name = "getattr" in read and not (
            issubclass(kind, nn.Module) and read.isdisjoint(("type", "__class__"))
        )
        for name in dict.fromkeys(name for base in kind.__mro__ if is_users(base) for name in vars(base)):
            if name.startswith("__") or name in _OF_PYTHON or not (any_name or name in read):
                continue
            value = inspect.getattr_static(kind, name)
            if isinstance(value, type):
                waiting.append(value)
            elif isinstance(value, staticmethod):
                value = value.__func__
            if _is_code(value) or hasattr(type(value), "__get__"):  # a method
                continue
            if not is_plain(value) or not _has_name(kind):
                raise RefusedError(f"its forward may read {kind.__name__}.{name} by its class")
            found[kind.__module__, f"{kind.__qualname__}.{name}", value] = None
    return tuple(found)


def _has_name(kind: type) -> bool:
    """Whether a class is found by its name, as a guard finds it."""
    try:
        return bool(operator.attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind)
    except (AttributeError, KeyError):
        return False


def _check_function(code: types.CodeType, path: str, value: Any) -> None:
    """Refuse a function among the globals that may give other results from call to call."""
    of = getattr(value, "__self__", None)
    if not (of is None or isinstance(of, (type, types.ModuleType))):
        raise RefusedError(f"{code.co_name} calls {path}, a method of a {type(of).__name__}")
    module = of.__name__ if isinstance(of, types.ModuleType) else getattr(value, "__module__", None)
    if str(module).partition(".")[0] == "torch":
        _check_torchs(code, path, value)
    _check_package(code, str(module))


@functools.cache
def _allowed() -> frozenset[int]:
    """The ids of PyTorch's functions that a forward may use."""
    found = [getattr(namespace, name) for namespace in _NAMESPACES for name in dir(namespace)]
    for name in _ALLOWED:
        with contextlib.suppress(AttributeError):  # in another version of PyTorch
            found.append(operator.attrgetter(name)(torch))
    return frozenset(map(id, filter(callable, found)))


def _check_torchs(code: types.CodeType, path: str, value: Any) -> None:
    """Refuse what tells a forward of PyTorch's state, which no guard covers."""
    if isinstance(value, (types.ModuleType, type, *_CONSTANTS)) or value is None or _is_stand_in(value):
        return
    if id(value) not in _allowed():
        raise RefusedError(f"{code.co_name} uses {path}, which may tell it of PyTorch's state")


def _check_module(code: types.CodeType, path: str, module: types.ModuleType) -> None:
    """Check all that code may read from a module of PyTorch's, which it has by a local name."""
    waiting, seen = [(path, module)], set()
    while waiting:
        path, module = waiting.pop()
        seen.add(module)
        for name in set(code.co_names) & vars(module).keys():
            value = getattr(module, name)
            _check_torchs(code, f"{path}.{name}", value)
            if isinstance(value, types.ModuleType) and package(value) == "torch" and value not in seen:
                waiting.append((f"{path}.{name}", value))


def _check_package(code: types.CodeType, module: str) -> None:
    """Refuse a module of the standard library or of NumPy whose functions may differ from call to call."""
    package = module.partition(".")[0]
    if package == "numpy" or (package in sys.stdlib_module_names and package not in _HARMLESS):
        raise RefusedError(f"{code.co_name} uses {package}")


def _check_defaults(functions: Iterable[Any], seen: Container[types.CodeType]) -> None:
    """Refuse a function that has run if the default of an argument can change."""
    for function in functions:
        if getattr(function, "__code__", None) in seen:
            defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
            if not all(is_plain(value) or _is_code(value) for value in defaults):
                raise RefusedError(f"{function.__name__} has a default that can change")


def _variable_guards(
    seen: dict[types.CodeType, Any], classes: Iterable[type]
) -> tuple[tuple[str, str, Any], ...]:
    """Guards for the globals and the classes that the code reads; ``classes`` are those of the modules."""
    found: dict[tuple[str, str, Any], None] = {}
    reached = list(classes)
    made_inside = {c for code in seen for c in code.co_consts if isinstance(c, types.CodeType)}
    for code, (variables, free, local) in seen.items():
        reached += [*local, *(value for value in free.values() if isinstance(value, type))]
        for name, value in free.items():
            if name != "__class__" and code not in made_inside and not _is_code(value):
                raise RefusedError(f"{code.co_name} reads {name} from the enclosing function")
        for path, value in _globals_read(code, variables):
            if isinstance(value, types.ModuleType):
                _check_package(code, value.__name__)
            elif _is_function(value):
                _check_function(code, path, value)
                _check_defaults([value], seen)
                # A namedtuple's constructor, which the tracer calls, is in no module.
                if variables["__name__"] in sys.modules and not _is_stand_in(value):
                    _check_name(code, path, value)
                    found[variables["__name__"], path, value] = None
            elif isinstance(value, type):  # it may be read by a local name
                reached.append(value)
            else:
                if not is_plain(value):
                    raise RefusedError(f"{code.co_name} reads the global {path}, a {type(value).__name__}")
                found[variables["__name__"], path, value] = None
    found |= dict.fromkeys(_class_guards(reached, {name for code in seen for name in code.co_names}))
    return tuple(found)


def _is_stand_in(function: Any) -> bool:
    """Whether a function is one of this package's, which stands for another while a forward is traced."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(os.path.dirname(__file__) + os.sep)


def _check_name(code: types.CodeType, path: str, function: Any) -> None:
    """Refuse a function that another process would not find, since a pickled module has it in its guards."""
    try:
        pickle.dumps(function)
    except Exception as error:
        raise RefusedError(f"{code.co_name} calls {path}, which has no name to import it by") from error


def _globals_read(code: types.CodeType, variables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The globals that code reads, and the attributes that it reads from modules and classes among them."""
    path, value = "", None
    for instruction in dis.get_instructions(code):
        name, opname = instruction.argval, instruction.opname
        if opname in ("COPY", "DUP_TOP", "EXTENDED_ARG"):  # the first two as in an augmented assignment
            continue
        reads_attribute = opname in ("LOAD_ATTR", "LOAD_METHOD")
        if isinstance(value, types.ModuleType) and not reads_attribute:
            if package(value) != "torch":
                raise RefusedError(f"{code.co_name} uses the module {path} as a value")
            _check_module(code, path, value)
        if opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in variables:
            path, value = name, variables[name]
        elif opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in _REFLECTION:
            raise RefusedError(f"{code.co_name} calls {name}()")
        elif opname == "IMPORT_NAME" and name.partition(".")[0] not in (_HARMLESS | {"torch"}):
            raise RefusedError(f"{code.co_name} imports {name}")
        elif opname == "IMPORT_NAME" and name.partition(".")[0] == "torch":
            _check_module(code, "torch", torch)
            _check_module(code, name, sys.modules.get(name, torch))
            value = None
            continue
        elif opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise RefusedError(f"{code.co_name} writes the global {name}")
        elif opname == "STORE_ATTR" and value is not None:
            raise RefusedError(f"{code.co_name} writes {path}.{name}")
        elif reads_attribute and isinstance(value, types.FunctionType):
            raise RefusedError(f"{code.co_name} reads {path}.{name}, of a function")
        elif reads_attribute and isinstance(value, (types.ModuleType, type)):
            if package(value) == "torch":  # the gate checks those of its functions that tools replace
                if isinstance(value, type):
                    value = None
                else:
                    path, value = f"{path}.{name}", getattr(value, name, None)
                    _check_torchs(code, path, value)
                    value = value if isinstance(value, (types.ModuleType, type)) else None
                continue
            try:
                path, value = f"{path}.{name}", getattr(value, name)
            except AttributeError:
                value = None
                continue
        else:
            value = None
            continue
        yield path, value


# --- side effects -------------------------------------------------------------------------------------


def _state(modules: Sequence[nn.Module]) -> dict[tuple[nn.Module, str], Any]:
    """The identity of every attribute, and the contents of plain containers."""
    return {
        (m, name): (id(value), _contents(value))
        for m in modules
        for name, value in m.__dict__.items()
        if name != "training"
    }


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return [*map(id, value), *map(id, value.values())] if value else None
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(map(id, value))
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _generators() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    drawn = pickle.dumps(numpy.random.get_state(legacy=False)) if numpy else b""
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), drawn
