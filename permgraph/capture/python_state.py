"""The state of Python outside a model that a forward pass may change: globals, classes, functions and their caches.

The pass runs on a copy of the model, but the Python modules that define its classes, and the functions that it calls as
hooks, are the caller's own. A table made of fake tensors, or of float64 ones, that it keeps in a dictionary there, or
that `functools.lru_cache` keeps around a function, would be what the caller's next pass finds. And what stands there
may be a part of the model, such as the list to which a hook appends: for the time of the pass, the copy's stands in its
place. Whatever is inspected is the caller's as well: nothing here runs an object's own `__getattr__`, which may raise
anything.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import sys
import threading
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch.nn.modules.module
from torch import Tensor, nn

from permgraph.capture.following_copy import Memo
from permgraph.capture.outputs import tensor_leaves

#: Of larger containers no copy is made: a cache of tensors is small, a vocabulary is not.
MAX_LENGTH = 4096
OF_MODULES = frozenset(vars(nn.Module()))  # what every module has: its parameters, buffers, parts and hooks
#: So many functions are looked at for the Python modules whose names they use.
_MAX_FUNCTIONS = 200
_MISSING = object()
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, threading.local, collections.UserDict, collections.UserList)
_CONTAINERS = (dict, list, set, collections.deque)


def defining_modules(modules: Iterable[nn.Module]) -> list[str]:
    """The names of the Python modules where the classes of these modules, and those they derive from, stand."""
    classes = {cls for kind in {type(module) for module in modules} for cls in kind.__mro__}
    names = {cls.__module__ for cls in classes}
    return sorted(name for name in names if name != "torch" and not name.startswith(("torch.", "builtins")))


def is_of_others(name: Any) -> bool:
    """Whether a Python module is one whose state is nobody's hook's: torch's, or Python's own."""
    top = name.partition(".")[0] if isinstance(name, str) else "builtins"
    return top in ("torch", "numpy", "permgraph") or (top in sys.stdlib_module_names and top != "__main__")


def _modules_used(functions: Iterable[types.FunctionType]) -> set[str]:
    """The names of the Python modules where these functions, and those that they call by a global name, stand."""
    names: set[str] = set()
    waiting: list[types.FunctionType] = list(functions)
    seen: set[types.FunctionType] = set()
    while waiting and len(seen) < _MAX_FUNCTIONS:
        function = waiting.pop()
        home = function.__globals__.get("__name__")
        if function in seen or is_of_others(home):
            continue
        seen.add(function)
        names.add(str(home))
        for word in function.__code__.co_names:
            used: Any = function.__globals__.get(word)
            if _is(used, types.ModuleType) and not is_of_others(vars(used).get("__name__")):
                names.add(vars(used)["__name__"])
            elif _is(used, types.FunctionType):
                waiting.append(used)
    return names


@contextlib.contextmanager
def python_state_restored(modules: Iterable[nn.Module], memo: Memo | None = None) -> Iterator[None]:
    """Around a forward pass: empty the function caches before and after it, and undo what else it keeps in Python.

    Of a pass on a copy, the memo says what was copied: what stands in Python outside the model is the copy's meanwhile.
    """
    modules = list(modules)
    caches = list(function_caches(modules))
    for cache in caches:
        cache.cache_clear()
    state = PythonState.snapshot(modules, memo)
    try:
        state.rebind(memo or {})
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
    """What the Python modules around a model hold at one moment, to be restored as far as it has to do with tensors.

    These are the modules that define it and its hooks; noted are the attributes of the modules, and of their classes,
    functions and objects, the containers in these, and the variables that functions close over.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._owners: list[tuple[Any, Mapping[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._functions: list[tuple[types.FunctionType, tuple[Any, ...]]] = []
        self._rebound: set[int] = set()
        self._seen: set[int] = set()

    @classmethod
    def snapshot(cls, modules: Iterable[nn.Module], memo: Memo | None = None) -> PythonState:
        """The state around the classes of these modules, and around the functions and objects that were copied."""
        modules = list(modules)
        kinds = {type(module): None for module in modules}
        functions: list[types.FunctionType] = []
        if memo is not None:
            kinds.update(dict.fromkeys(type(original) for original in memo.originals()))
            kinds.update(dict.fromkeys(memo.classes.values()))
            functions = list(memo.functions.values())
        hooks = [hook for registry in _global_hooks() for hook in registry.values()]
        functions += [hook for hook in map(_function_in, hooks) if _is(hook, types.FunctionType)]
        classes = [kind for held in kinds for kind in held.__mro__ if not is_of_others(kind.__module__)]
        used = _modules_used(functions) | {kind.__module__ for kind in classes}
        state = cls(sorted({*defining_modules(modules), *used}))
        for name in state._names:
            if (module := sys.modules.get(name)) is not None:
                state._note_owner(module, vars(module), depth=0)
        for kind in classes:  # also of those that stand inside a function
            state._note_class(kind, depth=1)
        for hook in hooks:
            state._note_value(hook, depth=1)
            state._note_function(_function_in(hook), depth=1)
        return state

    def rebind(self, copies: Mapping[int, Any]) -> None:
        """Put copies in the place of what was copied, by its `id`."""
        if not copies:
            return

        def copied(value: Any) -> Any:
            return copies.get(id(value), value)

        for owner, now, before in self._owners:
            for name, value in before.items():
                if copied(value) is not value:
                    _set(owner, now, name, copied(value))
                    self._rebound.add(id(value))
        for container, before in self._containers:
            if any(copied(value) is not value for value in _elements(before)):
                self._rebound.add(id(container))
                made = {copied(k): copied(v) for k, v in before.items()} if _is(before, dict) else map(copied, before)
                refill(container, made)
        for cell, content in self._cells:
            if copied(content) is not content:
                self._rebound.add(id(cell))
                cell.cell_contents = copied(content)
        for function, defaults in self._functions:
            if any(copied(value) is not value for value in defaults):
                function.__defaults__ = tuple(map(copied, defaults))

    def restore(self) -> None:
        """Undo what was rebound, added or replaced since then."""
        for container, before in self._containers:
            if id(container) in self._rebound or _changed(container, before):
                refill(container, before)
        for owner, now, before in self._owners:
            for name, value in list(now.items()):
                known = before.get(name, _MISSING)
                if known is not value and (id(known) in self._rebound or _holds_tensor(value)):
                    if name in before:
                        _set(owner, now, name, known)
                    else:
                        delattr(owner, name)
            for name in before.keys() - now.keys():
                if id(before[name]) in self._rebound:
                    _set(owner, now, name, before[name])
        for cell, content in self._cells:
            held = content_of(cell)
            if held is not content and (id(cell) in self._rebound or _holds_tensor(held)):
                _fill(cell, content)
        for function, defaults in self._functions:
            if function.__defaults__ is not defaults:
                function.__defaults__ = defaults

    def _note_owner(self, owner: Any, now: Mapping[str, Any], depth: int) -> None:
        """Note the attributes of a module, a class, a function or an object, and what these hold."""
        if id(owner) in self._seen:
            return
        self._seen.add(id(owner))
        before = dict(now)
        self._owners.append((owner, now, before))
        for value in before.values():
            self._note_value(_function_in(value), depth)

    def _note_class(self, kind: type, depth: int) -> None:
        self._note_owner(kind, vars(kind), depth)
        for value in list(vars(kind).values()):  # what was put in the place of a method may be of any Python module
            self._note_function(_function_in(value), depth)

    def _note_function(self, function: Any, depth: int) -> None:
        if not _is(function, types.FunctionType) or is_of_others(function.__module__):
            return
        known = id(function) in self._seen
        self._note_owner(function, vars(function), depth + 1)
        if known:
            return
        if function.__defaults__:
            self._functions.append((function, function.__defaults__))
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._seen.add(id(cell))
                self._cells.append((cell, content_of(cell)))
        for held in held_by(function):
            self._note_value(held, depth + 1)
        if function.__kwdefaults__:
            self._note_container(function.__kwdefaults__, 0)

    def _note_value(self, value: Any, depth: int) -> None:
        if _is(value, _CONTAINERS):
            self._note_container(value, depth)
        elif _is(value, type):
            if value.__module__ in self._names:
                self._note_class(value, depth + 1)
        elif _is(value, types.FunctionType):
            if value.__module__ in self._names:
                self._note_function(value, depth)
        elif depth < 3 and _may_hold(value):
            attributes = attributes_of(value)
            if attributes is not None:
                self._note_owner(value, attributes, depth + 1)

    def _note_container(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or len(value) > MAX_LENGTH:
            return
        self._seen.add(id(value))
        self._containers.append((value, value.copy()))
        if depth < 4:
            for inner in list(value.values() if _is(value, dict) else value):
                self._note_value(inner, depth + 1)


class CopiedState:
    """What the parts of a copy hold at one moment, to be put back after a pass, each keeping its identity.

    So that what a closure holds stays what an attribute holds.
    """

    def __init__(self, modules: Iterable[nn.Module], memo: Memo) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._cells = [(made, content_of(made)) for original, made in memo.cells.values() if original is not made]
        seen: set[int] = set()
        for made in [*modules, *(memo.get(id(original)) for original in memo.originals())]:
            own = None if _is(made, (Tensor, type, types.FunctionType)) else attributes_of(made)
            inside = list(own.values()) if own is not None and _is(made, nn.Module) else []
            for holder in (made, own, *inside):
                if _is(holder, _CONTAINERS) and id(holder) not in seen and len(holder) <= MAX_LENGTH:
                    seen.add(id(holder))
                    self._containers.append((holder, holder.copy()))

    def restore(self) -> None:
        """Put back what was there."""
        for container, before in self._containers:
            if not _same(container, before):
                refill(container, before)
        for cell, content in self._cells:
            _fill(cell, content)


def refill(container: Any, elements: Any) -> None:
    """Give a container these elements and no others."""
    container.clear()
    (container.extend if _is(container, (list, collections.deque)) else container.update)(elements)


def _set(owner: Any, now: Mapping[str, Any], name: str, value: Any) -> None:
    """Set an attribute, past what an object's own `__setattr__` does."""
    if isinstance(now, dict):
        now[name] = value
    else:
        setattr(owner, name, value)


def _may_hold(value: Any) -> bool:
    """Whether something is an object by whose attributes one function may hand a tensor to another."""
    if _is(value, _NAMESPACES):
        return True
    return not _is(value, (nn.Module, types.ModuleType)) and not is_of_others(type(value).__module__)


def _global_hooks() -> list[dict[int, Any]]:
    """The hooks of torch that run in every module."""
    held = vars(torch.nn.modules.module)
    return [value for name, value in held.items() if name.startswith("_global_") and isinstance(value, dict)]


def held_by(function: types.FunctionType) -> Iterator[Any]:
    """The default arguments of a function, and what it closes over."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from _cells(function)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    held = (content_of(cell) for cell in function.__closure__ or ())
    yield from (content for content in held if content is not _MISSING)


def content_of(cell: types.CellType) -> Any:
    """What a variable of a function holds; something that nothing else is if it is still empty."""
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return _MISSING


def _fill(cell: types.CellType, content: Any) -> None:
    if content is not _MISSING:
        cell.cell_contents = content
    elif content_of(cell) is not _MISSING:
        del cell.cell_contents


def variables_of_classes(modules: Iterable[nn.Module]) -> list[types.CellType]:
    """The variables over which the methods of these modules close, and the functions that these call so."""
    kinds = {kind for module in modules for kind in type(module).__mro__ if not is_of_others(kind.__module__)}
    waiting = [_function_in(value) for kind in kinds for value in list(vars(kind).values())]
    found: dict[int, types.CellType] = {}
    while waiting:
        value = waiting.pop()
        for cell in (value.__closure__ or ()) if _is(value, types.FunctionType) else ():
            if id(cell) not in found:
                found[id(cell)] = cell
                waiting.append(_function_in(content_of(cell)))
    return list(found.values())


def _changed(container: Any, before: Any) -> bool:
    """Whether a container has other elements than it had, some of them tensors."""
    if _same(container, before):
        return False
    now, then = _elements(container), _elements(before)
    known = {id(value) for value in then}
    return any(_holds_tensor(value) for value in now if id(value) not in known) or any(map(_holds_tensor, then))


def _same(container: Any, before: Any) -> bool:
    now, then = _elements(container), _elements(before)
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def _elements(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _holds_tensor(value: Any) -> bool:
    if _is(value, (*_CONTAINERS, tuple)):
        return len(value) <= MAX_LENGTH and next(tensor_leaves(value), None) is not None
    return _is(value, Tensor)
