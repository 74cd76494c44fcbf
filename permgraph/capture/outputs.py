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
    return (item for item in _walk(value) if isinstance(item, Tensor))


def returned_tensors(value: Any) -> tuple[list[Tensor], tuple[str, ...]]:
    """Every tensor in what a model returned, and the types of the objects that cannot be looked into.

    Raises `CaptureError` for a generator and the like: what it holds is not there before somebody has asked for it.
    """
    tensors: list[Tensor] = []
    opaque: dict[str, None] = {}
    for item in _walk(value):
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, _ONCE) or (isinstance(item, Iterable) and not isinstance(item, Sized)):
            raise CaptureError(
                f"the model returns a {type(item).__name__}, whose tensors can be read only once, and not before the "
                "forward pass is over: return a list or a tuple of them"
            )
        else:
            opaque[f"{type(item).__module__}.{type(item).__qualname__}"] = None
    return tensors, tuple(opaque)


def _walk(value: Any) -> Iterator[Any]:
    """The tensors in a value, and besides the objects in it that cannot be looked into or read twice."""
    seen: set[int] = set()
    waiting = [value]
    alive = []  # what a container makes as it is asked: while it lives, no other object has its identity
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen or type(value).__module__ == "numpy":
            continue
        seen.add(id(value))
        alive.append(value)
        children = _attributes(value)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            children = [*value.keys(), *value.values(), *children]
        elif isinstance(value, _ONCE):
            yield value
            continue
        elif isinstance(value, Iterable):
            if not isinstance(value, Sized):
                yield value
                continue
            children = [*value, *children]
        elif isinstance(value, _FUNCTIONS) or not _has_attributes(value):
            yield value
        waiting.extend(reversed(children))


def _attributes(value: Any) -> list[Any]:
    """The values of an object's attributes, in slots or in its dictionary."""
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    held = dict(getattr(value, "__dict__", {}))
    if isinstance(value, FakeTensor):  # what the stand-in for a tensor has for itself
        held = {name: item for name, item in held.items() if name not in _of_fakes()}
    return [*(getattr(value, name, None) for name in slots), *held.values()]


@functools.cache
def _of_fakes() -> frozenset[str]:
    return frozenset(vars(FakeTensorMode().from_tensor(torch.empty(0))))


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") or any("__slots__" in vars(kind) for kind in type(value).__mro__)


def _names(slots: Any) -> list[str]:
    """What a class has as its ``__slots__``: several names, or one."""
    return [slots] if isinstance(slots, str) else [name for name in slots if isinstance(name, str)]
