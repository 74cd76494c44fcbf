"""What a forward pass leaves behind outside its model: tables in a module's globals, on a class or on a function.

The pass ran on a copy of the model, but the Python modules that define its classes are the caller's own. A table that
was made of fake tensors, or of float64 ones, and kept in a dictionary there would be what the caller's next pass finds.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Iterable, Iterator
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


class Remains:
    """What is kept outside a model now, to be put back later as far as it holds tensors."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        names = defining_modules(modules)
        self._owners: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for name in names:
            if (module := sys.modules.get(name)) is not None:
                self._note_owner(module, names, depth=0)

    def put_back(self) -> None:
        """Undo what was rebound, added or replaced since then."""
        for container, before in self._containers:
            if _changed(container, before):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(before)
        for owner, before in self._owners:
            for name, value in list(vars(owner).items()):
                if before.get(name, _MISSING) is not value and _holds_tensor(value):
                    if name in before:
                        setattr(owner, name, before[name])
                    else:
                        delattr(owner, name)

    def _note_owner(self, owner: Any, names: Collection[str], depth: int) -> None:
        """Note the attributes of a module, a class, a function or an object, and what these hold."""
        if id(owner) in self._seen:
            return
        self._seen.add(id(owner))
        before = dict(vars(owner))
        self._owners.append((owner, before))
        for value in before.values():
            self._note_value(value, names, depth)

    def _note_value(self, value: Any, names: Collection[str], depth: int) -> None:
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType):
            if value.__module__ in names:
                self._note_owner(value, names, depth + 1)
                for held in _held_by(value):
                    self._note_container(held, 0)
        elif isinstance(value, (dict, list, set)):
            self._note_container(value, 0)
        elif isinstance(value, type):
            if value.__module__ in names:
                self._note_owner(value, names, depth + 1)
        elif (
            depth < 2
            and type(value).__module__ in names
            and not isinstance(value, nn.Module)
            and hasattr(value, "__dict__")
        ):
            self._note_owner(value, names, depth + 1)

    def _note_container(self, value: Any, depth: int) -> None:
        if not isinstance(value, (dict, list, set)) or id(value) in self._seen or len(value) > MAX_LENGTH:
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
    if isinstance(value, (dict, list, tuple, set)):
        return len(value) <= MAX_LENGTH and next(tensor_leaves(value), None) is not None
    return isinstance(value, Tensor)
