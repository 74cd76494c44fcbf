"""What a model holds in Python beside its tensors and parts, in a form that shows whether a pass has changed it."""

from __future__ import annotations

import collections
import itertools
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from permgraph.capture.following_copy import Memo
from permgraph.capture.python_state import MAX_LENGTH, OF_MODULES, attributes_of, content_of, is_of_others

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_BY_IDENTITY = (Tensor, nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)  # others run code of their own when looked into
_MAX_DEPTH = 5


class HeldState:
    """The attributes of modules and of their classes, what functions close over, and what all these hold in turn.

    Iterators other than counters show nothing, and neither do objects of torch and of Python's own library.

    Args:
        modules: those of a copy.
        memo: what was copied as what.
    """

    def __init__(self, modules: Iterable[nn.Module], memo: Memo) -> None:
        self._modules = list(modules)
        kinds = dict.fromkeys(kind for module in self._modules for kind in type(module).__mro__)
        self._kinds = [kind for kind in kinds if not is_of_others(kind.__module__)]
        self._cells = [made for _, made in memo.cells.values()]
        self._objects = [memo.get(id(original)) for original in memo.originals()]
        self._alive: list[Any] = []  # so that no `id` is used twice

    def shown(self) -> list[Any]:
        """What is held now, in a form that is equal to an earlier one if nothing was added, replaced or counted."""
        look = _Look(self._alive)
        found: list[Any] = [look.attributes(vars(module), skip=OF_MODULES) for module in self._modules]
        for kind in self._kinds:
            found.append(look.attributes({k: v for k, v in vars(kind).items() if not k.startswith("__")}))
        found += [look.at(content_of(cell)) for cell in self._cells]
        found += [look.at(made) for made in self._objects]
        return found


class _Look:
    """One look at what is held; each object is looked into once."""

    def __init__(self, alive: list[Any]) -> None:
        self._seen: set[int] = set()
        self._alive = alive

    def attributes(self, held: Mapping[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
        return {name: self.at(value) for name, value in held.items() if name not in skip}

    def at(self, value: Any, depth: int = 0) -> Any:
        """What shows whether a value was changed."""
        kind = type(value)  # a value is not asked for its class
        if kind in _PLAIN or issubclass(kind, _PLAIN):
            return value
        if kind is itertools.count:
            return repr(value)
        self._alive.append(value)
        if issubclass(kind, _BY_IDENTITY) or id(value) in self._seen or depth == _MAX_DEPTH:
            return id(value)
        self._seen.add(id(value))
        if issubclass(kind, _CONTAINERS):
            return id(value), self._elements(value, depth) if kind.__len__(value) else 0
        attributes = attributes_of(value)
        if attributes is None or is_of_others(kind.__module__):
            return id(value)
        return id(value), {name: self.at(inner, depth + 1) for name, inner in attributes.items()}

    def _elements(self, value: Any, depth: int) -> Any:
        kind = next(kind for kind in _CONTAINERS if issubclass(type(value), kind))
        length = kind.__len__(value)
        if length > MAX_LENGTH:
            return length
        if kind is dict:
            return [(self.at(key, depth + 1), self.at(inner, depth + 1)) for key, inner in dict.items(value)]
        if kind in (set, frozenset):
            return {id(inner) for inner in kind.__iter__(value)}
        return [self.at(inner, depth + 1) for inner in kind.__iter__(value)]
