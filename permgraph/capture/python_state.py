"""The state of Python outside a model that a forward pass may change: globals, classes, functions and their caches.

The pass runs on a copy of the model, but the Python modules that define its classes are the caller's own. A table made
of fake tensors, or of float64 ones, that it keeps in a dictionary there, or that `functools.lru_cache` keeps around a
function, would be what the caller's next pass finds. Whatever is inspected is the caller's as well: nothing here runs
an object's own `__getattr__`, which may raise anything.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from permgraph.capture.outputs import tensor_leaves

#: Of larger containers no copy is made: a cache of tensors is small, a vocabulary is not.
MAX_LENGTH = 4096
_MISSING = object()


def defining_modules(modules: Iterable[nn.Module]) -> list[str]:
    """The names of the Python modules where the classes of these modules, and those they derive from, stand."""
    classes = {cls for kind in {type(module) for module in modules} for cls in kind.__mro__}
    names = {cls.__module__ for cls in classes}
    return sorted(name for name in names if name != "torch" and not name.startswith(("torch.", "builtins")))


@contextlib.contextmanager
def python_state_restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Around a forward pass: empty the function caches before and after it, and undo what else it keeps in Python."""
    modules = list(modules)
    caches = list(function_caches(modules))
    for cache in caches:
        cache.cache_clear()
    state = PythonState.snapshot(modules)
    try:
        yield
    finally:
        state.restore()
        for cache in caches:
            cache.cache_clear()


def attributes_of(value: Any) -> dict[str, Any] | None:
    """What `vars` gives of an instance, without asking the instance; None if it has no such dictionary."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def function_caches(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The caches around functions and methods where the classes of these modules, and those they derive from, stand."""
    seen: set[int] = set()
    for name in defining_modules(modules):
        for value in list(vars(sys.modules.get(name, object)).values()):
            inner = list(vars(value).values()) if _is(value, type) and value.__module__ == name else [value]
            for function in inner:
                for cache in _caches_of(function):
                    if id(cache) not in seen:
                        seen.add(id(cache))
                        yield cache


def _caches_of(value: Any) -> Iterator[Any]:
    """The caches that a function is, or that it calls as the wrapper of another."""
    function = _function_in(value)
    if _is(function, functools._lru_cache_wrapper):
        yield function
    if _is(function, types.FunctionType):
        yield from (held for held in _cells(function) if _is(held, functools._lru_cache_wrapper))


def _function_in(value: Any) -> Any:
    """What a method, a static or class method or a property runs; anything else as it is."""
    if _is(value, (staticmethod, classmethod, types.MethodType)):
        return value.__func__
    return value.fget if _is(value, property) else value


def _is(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """`isinstance`, but that the value is not asked for its `__class__`."""
    return issubclass(type(value), kinds)


class PythonState:
    """What the Python modules that define a model hold at one moment, to be restored as far as it has to do with
    tensors: the attributes of the modules, and of their classes, functions and objects, and the containers in these."""

    def __init__(self) -> None:
        self._owners: list[tuple[Any, Mapping[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()

    @classmethod
    def snapshot(cls, modules: Iterable[nn.Module]) -> PythonState:
        """The state around the classes of these modules."""
        state, names = cls(), defining_modules(modules)
        for name in names:
            if (module := sys.modules.get(name)) is not None:
                state._note_owner(module, vars(module), names, depth=0)
        return state

    def restore(self) -> None:
        """Undo what was rebound, added or replaced since then."""
        for container, before in self._containers:
            if _changed(container, before):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(before)
        for owner, now, before in self._owners:
            for name, value in list(now.items()):
                if before.get(name, _MISSING) is not value and _holds_tensor(value):
                    if name in before:
                        setattr(owner, name, before[name])
                    else:
                        delattr(owner, name)

    def _note_owner(self, owner: Any, now: Mapping[str, Any], names: Collection[str], depth: int) -> None:
        """Note the attributes of a module, a class, a function or an object, and what these hold."""
        if id(owner) in self._seen:
            return
        self._seen.add(id(owner))
        before = dict(now)
        self._owners.append((owner, now, before))
        for value in before.values():
            self._note_value(_function_in(value), names, depth)

    def _note_value(self, value: Any, names: Collection[str], depth: int) -> None:
        if _is(value, (dict, list, set)):
            self._note_container(value, 0)
        elif _is(value, (types.FunctionType, type)):
            if value.__module__ in names:
                self._note_owner(value, vars(value), names, depth + 1)
                if _is(value, types.FunctionType):
                    for held in _held_by(value):
                        self._note_container(held, 0)
        elif depth < 2 and type(value).__module__ in names and not _is(value, nn.Module):
            attributes = attributes_of(value)
            if attributes is not None:
                self._note_owner(value, attributes, names, depth + 1)

    def _note_container(self, value: Any, depth: int) -> None:
        if not _is(value, (dict, list, set)) or id(value) in self._seen or len(value) > MAX_LENGTH:
            return
        self._seen.add(id(value))
        self._containers.append((value, value.copy()))
        if depth < 2:
            for inner in list(value.values() if isinstance(value, dict) else value):
                self._note_container(inner, depth + 1)


def _held_by(function: types.FunctionType) -> Iterator[Any]:
    """The default arguments of a function, and what it closes over."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from _cells(function)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # still empty
            continue


def _changed(container: Any, before: Any) -> bool:
    """Whether a container has other elements than it had, some of them tensors."""
    now, then = _elements(container), _elements(before)
    if len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True)):
        return False
    known = {id(value) for value in then}
    return any(_holds_tensor(value) for value in now if id(value) not in known) or any(map(_holds_tensor, then))


def _elements(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _holds_tensor(value: Any) -> bool:
    if _is(value, (dict, list, tuple, set)):
        return len(value) <= MAX_LENGTH and next(tensor_leaves(value), None) is not None
    return _is(value, Tensor)
