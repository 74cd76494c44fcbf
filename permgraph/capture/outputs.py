"""The tensors inside whatever a model returned, found by one walk for the capture and for `verify`.

What the walk does not see would count as free to move. So it looks at the items of every container and at the
attributes of every object, refuses what can be read only once, and names what cannot be looked into.
"""

from __future__ import annotations

import array
import enum
import functools
import numbers
import types
from collections.abc import AsyncIterable, Coroutine, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from permgraph.errors import CaptureError

_PLAIN = (
    type(None), str, bytes, bytearray, memoryview, array.array, numbers.Number, range, slice, type, enum.Enum,
    types.ModuleType, types.EllipsisType, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator,
)  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_ONCE = (Iterator, AsyncIterable, Coroutine)  # what can be read only once, or not here


def tensor_leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and objects, in order, once each; what can be read only once is let be."""
    met: set[int] = set()
    for _, item in _walk(value):
        if isinstance(item, Tensor) and id(item) not in met:
            met.add(id(item))
            yield item


def named_tensors(value: Any) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Every tensor in nested containers and objects, in order, once each, with the names under which it stands there.

    A name is the path to it: keys, the names of fields and attributes, and indices, with dots between them. A tensor by
    itself is called ``"output"``.
    """
    found: dict[int, tuple[Tensor, dict[str, None]]] = {}
    for path, item in _walk(value):
        if isinstance(item, Tensor):
            found.setdefault(id(item), (item, {}))[1][".".join(path) or "output"] = None
    return [(tensor, tuple(names)) for tensor, names in found.values()]


def returned_tensors(value: Any) -> tuple[list[Tensor], tuple[str, ...]]:
    """Every tensor in what a model returned, and the types of the objects that cannot be looked into.

    Raises `CaptureError` for a generator and the like: what it holds is not there before somebody has asked for it.
    """
    tensors: dict[int, Tensor] = {}
    opaque: dict[str, None] = {}
    for _, item in _walk(value):
        if isinstance(item, Tensor):
            tensors[id(item)] = item
        elif isinstance(item, _ONCE) or (isinstance(item, Iterable) and not isinstance(item, Sized)):
            raise CaptureError(
                f"the model returns a {type(item).__name__}, whose tensors can be read only once, and not before the "
                "forward pass is over: return a list or a tuple of them"
            )
        else:
            opaque[f"{type(item).__module__}.{type(item).__qualname__}"] = None
    return list(tensors.values()), tuple(opaque)


Path = tuple[str, ...]


def _walk(value: Any) -> Iterator[tuple[Path, Any]]:
    """The tensors in a value, at each of their places, and the objects in it that cannot be looked into or read twice.

    Each comes with the path to it.
    """
    seen: set[int] = set()
    waiting: list[tuple[Path, Any]] = [((), value)]
    alive = []  # what a container makes as it is asked: while it lives, no other object has its identity
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, _PLAIN) or type(value).__module__ == "numpy":
            continue
        if id(value) in seen:
            if isinstance(value, Tensor):
                yield path, value
            continue
        seen.add(id(value))
        alive.append(value)
        children = _attributes(value)
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Mapping):
            keys = [(f"keys.{at}", key) for at, key in enumerate(value.keys())]
            children = [*keys, *((str(key), item) for key, item in value.items()), *children]
        elif isinstance(value, _ONCE):
            yield path, value
            continue
        elif isinstance(value, Iterable):
            if not isinstance(value, Sized):
                yield path, value
                continue
            items = list(value)
            children = [*zip(_names_of_items(value, len(items)), items, strict=True), *children]
        elif isinstance(value, _FUNCTIONS) or not _has_attributes(value):
            yield path, value
        waiting.extend(((*path, name), child) for name, child in reversed(children))


def _names_of_items(value: Any, number: int) -> list[str]:
    """What the items of a container are called: its fields, if it is a named tuple, or by their numbers."""
    fields = getattr(type(value), "_fields", None)
    return list(fields) if isinstance(fields, tuple) and len(fields) == number else list(map(str, range(number)))


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """The names and values of an object's attributes, in slots or in its dictionary."""
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    held = dict(getattr(value, "__dict__", {}))
    if isinstance(value, FakeTensor):  # what the stand-in for a tensor has for itself
        held = {name: item for name, item in held.items() if name not in _of_fakes()}
    return [*((name, getattr(value, name, None)) for name in slots), *((str(n), item) for n, item in held.items())]


@functools.cache
def _of_fakes() -> frozenset[str]:
    return frozenset(vars(FakeTensorMode().from_tensor(torch.empty(0))))


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") or any("__slots__" in vars(kind) for kind in type(value).__mro__)


def _names(slots: Any) -> list[str]:
    """What a class has as its ``__slots__``: several names, or one."""
    return [slots] if isinstance(slots, str) else [name for name in slots if isinstance(name, str)]
