"""The tensors inside whatever a model returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensor_leaves(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, sets, mappings, dataclasses and plain objects, in order, once each."""
    seen = set() if seen is None else seen
    if value is None or isinstance(value, (str, bytes, int, float, complex, type)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    children: list[Any] = []
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = list(value)
    elif dataclasses.is_dataclass(value):
        children = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    else:
        slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
        children = [getattr(value, name, None) for name in slots] + list(getattr(value, "__dict__", {}).values())
    for child in children:
        yield from tensor_leaves(child, seen)


def _names(slots: Any) -> list[str]:
    """What a class has as its ``__slots__``: several names, or one."""
    return [slots] if isinstance(slots, str) else [name for name in slots if isinstance(name, str)]
