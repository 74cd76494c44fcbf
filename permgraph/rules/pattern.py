"""The label language in which a rule says which dimensions are permuted alike, read and checked.

A rule is written in labels, like an einsum. Two dimensions with the same label are permuted alike; a label that a
tensor lacks is summed over, broadcast or produced. For a linear map,

    call.link((x, "... k"), (w, "o k"), (b, "o"), (out, "... o"))

Labels also say, without the rule's help, *which permutations may differ where*. An axis may be permuted differently at
each index of another exactly if every tensor which has the one has the other, and that is read off the labels. So a
rule must show each tensor that matters, the ones inside the operator included: softmax along d divides by a sum that
has every label but d, and says so with ``via=["..."]``.

===========  =========================================================================================================
``c``        a dimension with the label c
``...``      all dimensions that no other label of the pattern stands for, counted from the last; it may stand anywhere
``(g i)``    a dimension that is a product; sizes by keyword, ``g=4``, of all its factors but at most one
``c!``       a dimension, or a factor, that must stay put, for the reason given as ``why``
``_``        a dimension about which the link says nothing
``... ; e``  after the semicolon, the axis that an integer tensor's *values* number, so that an index tensor is
             labelled just as its one-hot encoding would be
===========  =========================================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from permgraph.errors import ConflictError
from permgraph.rules.typed_tensor import TypedTensor

ELLIPSIS = "..."


@dataclass(frozen=True)
class Factor:
    """A label in a pattern that was fitted to a tensor: whether it must stay put, and how many indices it has."""

    label: str
    stays: bool
    size: int


@dataclass(frozen=True)
class Fitted:
    """A pattern fitted to a shape: the factors of each dimension, and the label of the values."""

    dims: tuple[tuple[Factor, ...], ...]
    value: str | None


Parsed = tuple[tuple[tuple[str, ...], ...], "str | None"]


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Parsed:
    """``"b (g i) _ ; e"`` as the labels of each dimension, and the label of the values.

    Raises `ConflictError` if brackets do not match, or a label stands twice.
    """
    labels, semicolon, value = text.partition(";")
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in labels.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            _require(group is None, text, "has a bracket inside a bracket")
            group = []
        elif token == ")":
            _require(group is not None, text, "closes a bracket that it has not opened")
            _require(bool(group), text, "has a bracket with nothing in it")
            dims.append(tuple(group or ()))
            group = None
        elif group is not None:
            _require(token != ELLIPSIS, text, "has '...' inside a bracket")
            group.append(token)
        else:
            dims.append((token,))
    _require(group is None, text, "opens a bracket that it does not close")
    named = [label.rstrip("!") for dim in dims for label in dim if label.rstrip("!") not in ("", "_")]
    named += value.split()
    for label in named:
        _require(named.count(label) == 1, text, f"has the label {label!r} twice")
    _require(len(value.split()) == (1 if semicolon else 0), text, "needs one label after the semicolon")
    return tuple(dims), value.strip() or None


@lru_cache(maxsize=16384)
def fit(
    slots: tuple[tuple[str, tuple[int, ...]], ...], via: tuple[str, ...], sizes: tuple[tuple[str, int], ...], why: bool
) -> tuple[Fitted, ...]:
    """The patterns of one link, each fitted to the shape of its tensor.

    Raises `ConflictError`, with the pattern and the shape, for what a link cannot mean: a pattern of another number of
    dimensions, a factor of unknown size, a size for a label that is nowhere, a pin without a reason.
    """
    known = dict(sizes)
    fitted = tuple(_fit(text, shape, known) for text, shape in slots)
    labels = {label.rstrip("!") for text, _ in slots for label in _labels(text)}
    patterns = ", ".join(f"{text!r} for shape {shape}" for text, shape in slots)
    for name in known:
        if name not in labels:
            raise ConflictError(f"a size is given for {name!r}, which is no label of {patterns}")
    for text in via:
        missing = [label for label in _labels(text) if label not in labels and label != ELLIPSIS]
        if missing:
            raise ConflictError(f"via={text!r} has the label {missing[0]!r}, which is none of {patterns}")
    if not why and any(factor.stays for one in fitted for dim in one.dims for factor in dim):
        raise ConflictError(f"a label with '!' stays put for a reason: why= is missing beside {patterns}")
    return fitted


def _fit(text: str, shape: tuple[int, ...], known: dict[str, int]) -> Fitted:
    dims, value = parse_pattern(text)
    if (ELLIPSIS,) in dims:
        at = dims.index((ELLIPSIS,))
        extra = len(shape) - (len(dims) - 1)
        dims = (*dims[:at], *((f"*{extra - 1 - k}",) for k in range(extra)), *dims[at + 1 :])
    if len(dims) != len(shape):
        raise ConflictError(f"pattern {text!r} does not fit shape {shape}: it has labels for {len(dims)} dimensions")
    return Fitted(
        tuple(_factors(labels, size, text, shape, known) for labels, size in zip(dims, shape, strict=True)), value
    )


def _factors(
    labels: Sequence[str], size: int, text: str, shape: tuple[int, ...], known: dict[str, int]
) -> tuple[Factor, ...]:
    """The factors of one dimension, with the size of the one that is not given."""
    names = [label.rstrip("!") or "_" for label in labels]
    if len(names) == 1:
        return (Factor(names[0], labels[0].endswith("!"), size),)
    unknown = [name for name in names if name not in known]
    if len(unknown) > 1:
        missing = " and ".join(f"{name}=" for name in unknown)
        raise ConflictError(f"pattern {text!r} for shape {shape} needs the sizes {missing} but for one of them")
    given = math.prod(known[name] for name in names if name in known)
    rest = size // given if unknown and given else 1
    if given * rest != size:
        sizes = ", ".join(f"{name}={known[name]}" for name in names if name in known)
        raise ConflictError(f"pattern {text!r} for shape {shape} makes a dimension of {size} a product with {sizes}")
    return tuple(
        Factor(name, label.endswith("!"), known.get(name, rest)) for name, label in zip(names, labels, strict=True)
    )


def expand_via(text: str, known: Iterable[str]) -> list[str]:
    """The labels of a tensor inside the operator, as far as the tensors around it vary along them."""
    labels, known = _labels(text), list(known)
    starred = [label for label in known if label.startswith("*")] if ELLIPSIS in labels else []
    return [label for label in (*labels, *starred) if label in known]


def last_labels(text: str, tensor: TypedTensor) -> str:
    """The last labels of a pattern, as many as the tensor has dimensions, as broadcasting has it."""
    labels = re.findall(r"\([^)]*\)|\S+", text)
    return " ".join(labels[len(labels) - tensor.ndim :])


def _labels(text: str) -> list[str]:
    dims, value = parse_pattern(text)
    return [*(label for dim in dims for label in dim), *([value] if value else [])]


def _require(holds: bool, text: str, problem: str) -> None:
    if not holds:
        raise ConflictError(f"pattern {text!r} {problem}")
