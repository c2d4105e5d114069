"""Keeps users' objects as they are while their code runs to be traced or compared.

A forward may update a meter, append to a list of its module or a global one, or count in a class. Traced, it
would leave proxies there. So what code can reach from its modules and globals is noted before it runs, and is
put back afterwards: attributes, lists, dicts, sets, deques, and the state of random generators.
"""

from __future__ import annotations

import collections
import dis
import functools
import operator
import os
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..eligibility import Absence

_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_SITE = os.path.dirname(os.path.dirname(torch.__file__)) + os.sep
# What cannot change, or holds nothing that a forward changes; these are most values by far.
_ATOMS = {bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size}
_SKIPPED = (Tensor, fx.Proxy, types.ModuleType, types.CodeType)
_MOST = 100_000  # objects
_LONG = 1000  # the items of a longer list are data
# How to copy what a container holds; a user's class may have another ``copy``.
_COPIES: dict[type, Callable[[Any], Any]] = {
    dict: dict.copy,
    list: list.copy,
    set: set.copy,
    collections.deque: lambda queue: list(collections.deque.__iter__(queue)),
    bytearray: bytearray.copy,
}
_CONTAINERS = tuple(_COPIES)


class RefusedError(Exception):
    """A module is not recognised; the message gives the reason."""


@functools.cache  # called for every call in PyTorch
def passed_over(file: str) -> bool:
    """Whether code of a file is PyTorch's, the standard library's or this package's."""
    if file.startswith((_TORCH, _OURS, "<frozen ")):
        return True
    return file.startswith(_LIBRARY) and not file.startswith(_SITE)


def package(value: Any) -> str:
    """The outermost package that a class belongs to, or that a Python module is in."""
    return str(getattr(value, "__module__", None) or value.__name__).partition(".")[0]


def is_users(kind: type) -> bool:
    """Whether a class is neither PyTorch's nor the standard library's nor this package's."""
    of = package(kind)
    return of == "__main__" or not (of in ("torch", "dense_ext") or of in sys.stdlib_module_names)


class Kept:
    """Objects with what they held when they were noted; at the end of a context they hold that again.

    The context may be entered several times.

    Args:
        modules: modules whose attributes are noted at once.

    Attributes:
        written: the values that were written in the last context.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.written: list[Any] = []
        self._noted: dict[int, Any] = {}  # by id
        self._held: list[tuple[str, Any, Any]] = []  # a name for messages, a container and a copy of it
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._variables: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._cells: list[tuple[str, Any, Any]] = []
        self._states: list[tuple[Callable[[Any], Any], Any]] = []  # how to set a state, and the state
        self._code: set[types.CodeType] = set()
        self._modules = [m.__dict__ for m in modules]
        self._own = {id(own) for own in self._modules}
        self._modes = [(m, m.training) for m in modules]  # not all keep it in their dict
        for m in modules:
            self._note(m, type(m).__name__)

    def __enter__(self) -> None:
        self.written = []

    def __exit__(self, *_: object) -> None:
        self.restore()

    def ran(self, frame: types.FrameType) -> None:
        """Note what code can reach that is about to run."""
        code = frame.f_code
        if code not in self._code and not _is_imported(frame):
            self._code.add(code)
            self._note_variables(frame.f_globals, code, _stored(code)[0])

    def _note_variables(self, variables: dict[str, Any], code: types.CodeType, stored: set[str]) -> None:
        for name in {*code.co_names, *stored}:
            value = variables.get(name, Absence.ABSENT)
            if name in stored:
                self._variables.setdefault((id(variables), name), (variables, name, value))
            if not isinstance(value, types.ModuleType):
                self._note(value, name)
            elif is_users(value) and value.__dict__ is not variables:  # type: ignore[arg-type]
                self._note_variables(value.__dict__, code, _stored(code)[1])

    def _note(self, value: Any, name: str) -> None:
        waiting = [(value, name)]
        while waiting:
            value, name = waiting.pop()
            kind = type(value)
            if kind in _ATOMS or id(value) in self._noted or issubclass(kind, _SKIPPED):
                continue
            self._noted[id(value)] = value
            if len(self._noted) > _MOST:
                raise RefusedError("its forward can reach more objects than could be kept as they are")
            waiting += [part for part in self._parts(value, name) if type(part[0]) not in _ATOMS]

    def _parts(self, value: Any, name: str) -> list[tuple[Any, str]]:
        """What an object holds, each with a name; a copy of that is kept."""
        kind = type(value)
        if issubclass(kind, type):
            return self._parts_of_class(value)
        if issubclass(kind, types.FunctionType):
            return self._parts_of_function(value, name)
        if issubclass(kind, (types.MethodType, types.BuiltinMethodType)):
            return [(value.__self__, name), (getattr(value, "__func__", None), name)]
        if issubclass(kind, (staticmethod, classmethod)):
            return [(value.__func__, name)]
        if issubclass(kind, property):
            return [(value.fget, name)]
        if issubclass(kind, functools.partial):
            return [(value.func, name), (value.args, name), (value.keywords, name)]
        if issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn."):  # most objects, by far
            own = [value.__dict__, *(v for v in value.__dict__.values() if type(v) is dict and v)]
            self._held += [(kind.__name__, holder, holder.copy()) for holder in own]
            return [(child, name) for child in value._modules.values()]
        parts: list[tuple[Any, str]] = [(kind, name)]
        if (state := _state(value)) is not None:
            self._states.append(state)
        items: Any = ()
        if issubclass(kind, _CONTAINERS):
            copied = next(copy(value) for of, copy in _COPIES.items() if issubclass(kind, of))
            self._held.append((name, value, copied))
            items = copied.values() if isinstance(copied, dict) else copied
        elif issubclass(kind, (tuple, frozenset)):
            items = value
        if len(items) <= _LONG:
            parts += [(item, name) for item in items]
        for attributes in (_attributes(value), _slots(value)):
            if attributes is not None:
                self._held.append((kind.__name__, attributes, dict(attributes)))
                parts += [(v, f"{kind.__name__}.{n}") for n, v in attributes.items()]
        return parts

    def _parts_of_class(self, kind: type) -> list[tuple[Any, str]]:
        parts: list[tuple[Any, str]] = [(base, "") for base in (*kind.__mro__[1:], type(kind))]
        if not is_users(kind):
            return []
        own = {name: value for name, value in vars(kind).items() if not name.startswith("__")}
        self._classes.append((kind, own))
        return [*parts, *((value, f"{kind.__name__}.{name}") for name, value in own.items())]

    def _parts_of_function(self, function: Any, name: str) -> list[tuple[Any, str]]:
        if passed_over(function.__code__.co_filename):
            return []
        parts = [(value, name) for value in (function.__dict__, *(function.__defaults__ or ()))]
        parts += [(value, name) for value in (function.__kwdefaults__ or {}).values()]
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # it is empty
                continue
            self._cells.append((variable, cell, value))
            parts.append((value, variable))
        return parts

    def changed(self) -> str | None:
        """The name of something that has changed since it was noted, or None.

        Attributes of the modules themselves do not count.
        """
        for variables, name, value in self._variables.values():
            if variables.get(name, Absence.ABSENT) is not value:
                return name
        for kind, own in self._classes:
            if names := _changed_names(kind, own):
                return f"{kind.__name__}.{min(names)}"
        for name, cell, value in self._cells:
            if _contents(cell) is not value:
                return name
        for name, container, copy in self._held:
            if id(container) not in self._own and not _same(container, copy):
                return name
        return None

    def restore(self) -> None:
        """Put everything back."""
        written = self.written
        for m, mode in self._modes:
            m.training = mode
        for variables, name, value in self._variables.values():
            found = variables.get(name, Absence.ABSENT)
            if found is not value:
                written.append(found)
                if value is Absence.ABSENT:
                    del variables[name]
                else:
                    variables[name] = value
        for kind, own in self._classes:
            for name in _changed_names(kind, own):
                written.append(vars(kind).get(name))
                if name in own:
                    type.__setattr__(kind, name, own[name])
                else:
                    type.__delattr__(kind, name)
        for _, cell, value in self._cells:
            if (found := _contents(cell)) is not value:
                written.append(found)
                cell.cell_contents = value
        for _, container, copy in self._held:
            if not _same(container, copy):
                before = set(map(id, _values(copy)))
                written += [value for value in _values(container) if id(value) not in before]
                _fill(container, copy)
        for write, state in self._states:
            write(state)


class _Slots(dict):  # type: ignore[type-arg]
    """The attributes of an object that are in slots; filling this dict sets them."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.read()

    def read(self) -> None:
        super().clear()
        for kind in type(self.of).__mro__:
            for name, member in vars(kind).items():
                if type(member) is types.MemberDescriptorType:
                    value = member.__get__(self.of, kind) if _has(member, self.of) else Absence.ABSENT
                    super().__setitem__(name, value)

    def write(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            member: Any = next(vars(k)[name] for k in type(self.of).__mro__ if name in vars(k))
            if value is not Absence.ABSENT:
                member.__set__(self.of, value)
            elif _has(member, self.of):
                member.__delete__(self.of)


def _has(member: Any, of: Any) -> bool:
    try:
        member.__get__(of)
    except AttributeError:
        return False
    return True


def _attributes(value: Any) -> dict[str, Any] | None:
    try:
        own = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return own if type(own) is dict else None


def _slots(value: Any) -> _Slots | None:
    kind = type(value)
    return _Slots(value) if is_users(kind) and any("__slots__" in vars(k) for k in kind.__mro__) else None


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return Absence.ABSENT


def _changed_names(kind: type, own: dict[str, Any]) -> set[str]:
    now = vars(kind)
    names = own.keys() | {name for name in now if not name.startswith("__")}
    return {n for n in names if now.get(n, Absence.ABSENT) is not own.get(n, Absence.ABSENT)}


def _values(container: Any) -> list[Any]:
    return list(dict.values(container) if isinstance(container, dict) else container)


def _same(container: Any, copy: Any) -> bool:
    """Whether a container holds the same objects as when it was copied, in the same order."""
    if type(container) is _Slots:
        container.read()
    if len(container) != len(copy):
        return False
    if isinstance(copy, dict):
        same = all(map(operator.is_, dict.values(container), copy.values()))
        return same and all(map(operator.is_, dict.keys(container), copy.keys()))
    if isinstance(copy, set):
        return set(map(id, container)) == set(map(id, copy))
    return all(map(operator.is_, container, copy)) if isinstance(copy, list) else bool(container == copy)


def _fill(container: Any, copy: Any) -> None:
    """Give a container its contents back, without methods that a user's class may define."""
    if isinstance(container, _Slots):
        return container.write(copy)
    kinds: tuple[Any, ...] = (collections.OrderedDict, *_CONTAINERS)
    kind = next(kind for kind in kinds if isinstance(container, kind))
    kind.clear(container)
    if kind is collections.OrderedDict:
        for key, value in copy.items():
            kind.__setitem__(container, key, value)
    elif isinstance(copy, (dict, set)):
        kind.update(container, copy)
    else:
        kind.extend(container, copy)
    return None


def _is_imported(frame: types.FrameType) -> bool:
    """Whether code runs because a module is being imported, which happens once."""
    caller: types.FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        caller = caller.f_back
    return False


def _stored(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names of globals that code sets, and of the attributes that it sets."""
    found: tuple[set[str], set[str]] = (set(), set())
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            found[0].add(instruction.argval)
        elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
            found[1].add(instruction.argval)
    return found


def _state(value: Any) -> tuple[Callable[[Any], Any], Any] | None:
    """How to set the state of a generator of random numbers or a small array, and the state; else None."""
    if issubclass(type(value), random.Random):
        return value.setstate, value.getstate()
    if issubclass(type(value), torch.Generator):
        return value.set_state, value.get_state()
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if issubclass(type(value), numpy.random.RandomState):
        return value.set_state, value.get_state()
    if issubclass(type(value), numpy.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state"), value.bit_generator.state
    if issubclass(type(value), numpy.ndarray) and value.flags.writeable and value.nbytes <= 2**20:
        return functools.partial(numpy.copyto, value), value.copy()
    return None


@contextmanager
def recorded_code(kept: Kept) -> Iterator[dict[types.CodeType, Any]]:
    """Records the users' code that runs inside the context, and notes what it can reach.

    For each piece of code: its globals, its free variables, and the classes that it takes or is called for.
    """
    seen: dict[types.CodeType, Any] = {}

    def record(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if passed_over(code.co_filename):
            return
        if code not in seen:
            free = {name: frame.f_locals.get(name) for name in code.co_freevars}
            local = [v if isinstance(v, type) else type(v) for v in frame.f_locals.values()]
            seen[code] = (frame.f_globals, free, local)
        kept.ran(frame)

    # A trace function that returns None is called for calls only, unlike a profile function.
    before = sys.gettrace()
    sys.settrace(record)
    try:
        yield seen
    finally:
        sys.settrace(before)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Give the generators of random numbers of Python, NumPy and PyTorch their state back."""
    numpy = sys.modules.get("numpy")
    restores: list[tuple[Callable[..., Any], Any]] = [(random.setstate, random.getstate())]
    if numpy is not None:
        restores.append((numpy.random.set_state, numpy.random.get_state(legacy=False)))
    if torch.cuda.is_initialized():
        restores.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for restore, state in restores:
            restore(state)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave users' objects and all generators of random numbers as they are, whatever runs inside."""
    with (kept := Kept()), kept_generators(), recorded_code(kept):
        yield
