"""How results show themselves at a prompt and in a notebook: a line for each field, and no tensor written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import nn

from permgraph.display import display

WIDTH = 120
MOST_LINES = 40
_SHOWN = 3


class Displayed:
    """Base of results that are dataclasses declared with ``repr=False``: at most 40 short lines, or a table."""

    def __repr__(self) -> str:
        fields = list(summary(self))
        longest = max((len(name) for name, _ in fields), default=0)
        lines = [type(self).__name__, *(f"  {name:{longest}}  {said}"[:WIDTH].rstrip() for name, said in fields)]
        return "\n".join(lines[:MOST_LINES])

    def _repr_html_(self) -> str:
        return str(display("result table", self))


def summary(result: Any) -> Iterator[tuple[str, str]]:
    """Each public field of a dataclass, and what it holds in a few words; those that are None or empty are left out."""
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        empty = value is None or (isinstance(value, (Sequence, Mapping, Set)) and not len(value))
        if not field.name.startswith("_") and not empty:
            yield field.name, in_few_words(value)


def in_few_words(value: Any) -> str:
    """A value on one line: of tensors and arrays the shape and the type, of what is long its beginning."""
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {value.dtype}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, nn.Module):
        return f"module {type(value).__name__}"
    if isinstance(value, Mapping):
        shown = [f"{_cut(str(key), 40)}: {in_few_words(item)}" for key, item in list(value.items())[:_SHOWN]]
        return _listed(shown, len(value))
    if isinstance(value, (tuple, list, Set)):
        return _listed([in_few_words(item) for item in list(value)[:_SHOWN]], len(value))
    if isinstance(value, Displayed) or (dataclasses.is_dataclass(value) and type(value).__str__ is object.__str__):
        return type(value).__name__
    return _cut(" ".join(str(value).split()), 90)


def plural(count: int, what: str) -> str:
    """So many of something."""
    return f"{count} {what}{'s' if count != 1 else ''}"


def _listed(shown: Sequence[str], count: int) -> str:
    text = ", ".join(_cut(item, 60) for item in shown)
    return f"{count} in all: {text}, ..." if count > len(shown) else text


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
