"""The elements of tensors that one statement of a rule relates, a few of which stand for all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from permgraph.algebra import Axis
from permgraph.inference.general.leaves import MAX_ELEMENTS, Leaves, UnreadableError
from permgraph.rules.ledger import Labelled, Rearrangement, Relation
from permgraph.rules.typed_tensor import VALUE, TypedTensor


@dataclass(frozen=True)
class Case:
    """One element of each tensor of a link, all at the same coordinates along each label.

    Args:
        unknowns: for each tensor of the link the unknowns under each label, in order.
        loose: the unknowns along dimensions that have no label.
        numbered: the labels that stand for the values of an index.
        unlike: atoms that do not stand alike in all tensors with their label.
    """

    unknowns: tuple[Mapping[str, tuple[int, ...]], ...]
    loose: tuple[int, ...]
    numbered: frozenset[str]
    unlike: frozenset[Axis]
    alike: tuple[tuple[int, int], ...]


def cases(relation: Relation, leaves: Leaves) -> Iterator[tuple[list[Labelled], Case]]:
    """The cases of a link, each with its tensors, those inside the operator left out.

    Raises UnreadableError if there are more than are looked at, or if labels do not fill their dimensions.
    """
    tensors = [labelled for labelled in relation.tensors if labelled.tensor is not None]
    sizes: dict[str, int] = {}
    along: dict[str, set[int]] = {}
    numbered = set()
    for labelled in tensors:
        for label, axis in labelled.axes.items():
            sizes[label] = axis.size
            along.setdefault(label, set()).update(leaves.representatives(axis))
            if labelled.where[label] == VALUE:
                numbered.add(label)
    labels = list(along)
    if math.prod(len(coordinates) for coordinates in along.values()) > MAX_ELEMENTS:
        raise UnreadableError
    for combination in itertools.product(*(sorted(along[label]) for label in labels)):
        at = dict(zip(labels, combination, strict=True))
        found: list[Mapping[str, tuple[int, ...]]] = []
        loose: list[int] = []
        alike: list[tuple[int, int]] = []
        for labelled in tensors:
            of_labels: dict[str, tuple[int, ...]] | None = None
            for unknowns, rest in _of_tensor(labelled, at, leaves):
                loose.extend(rest)
                if of_labels is None:
                    of_labels = unknowns
                else:
                    for label, several in unknowns.items():
                        alike.extend(zip(of_labels[label], several, strict=True))
            found.append(of_labels or {})
        yield (
            tensors,
            Case(tuple(found), tuple(dict.fromkeys(loose)), frozenset(numbered), _unlike(found, leaves), tuple(alike)),
        )


def _of_tensor(
    labelled: Labelled, at: Mapping[str, int], leaves: Leaves
) -> Iterator[tuple[dict[str, tuple[int, ...]], list[int]]]:
    """The unknowns of a tensor at these coordinates, for each way that the dimensions without a label can stand."""
    tensor = labelled.tensor
    assert tensor is not None
    if 0 in tensor.shape or not leaves.concerns(tensor):
        return
    inside: dict[int, list[str]] = {}
    for label, dim in labelled.where.items():
        if dim != VALUE:
            inside.setdefault(dim, []).append(label)
    choices: list[Sequence[int]] = []
    for dim, size in enumerate(tensor.shape):
        if dim not in inside:
            choices.append(leaves.representatives(tensor.dims[dim]))
            continue
        total, coordinate = 1, 0
        for label in inside[dim]:
            part = labelled.axes[label].size
            total, coordinate = total * part, coordinate * part + at[label]
        if total != size:
            raise UnreadableError
        choices.append((coordinate,))
    if math.prod(map(len, choices)) > MAX_ELEMENTS:
        raise UnreadableError
    for index in itertools.product(*choices):
        unknowns = leaves.at(tensor, index)
        of_labels: dict[str, tuple[int, ...]] = {}
        for dim, names in inside.items():
            own = unknowns.get(dim, ())
            if len(names) == 1:
                of_labels[names[0]] = own
                continue
            start = 0
            for label in names:
                atoms = leaves.atoms_along(labelled.axes[label], at[label], tensor, index)
                of_labels[label] = own[start : start + len(atoms)]
                if [leaves.atoms[x] for x in of_labels[label]] != atoms:
                    raise UnreadableError
                start += len(atoms)
            if start != len(own):
                raise UnreadableError
        yield of_labels, [x for dim, several in unknowns.items() if dim not in inside for x in several]


def _unlike(found: Sequence[Mapping[str, tuple[int, ...]]], leaves: Leaves) -> frozenset[Axis]:
    first: dict[str, list[Axis]] = {}
    unlike: set[Axis] = set()
    for unknowns in found:
        for label, several in unknowns.items():
            atoms = [leaves.atoms[x] for x in several]
            known = first.setdefault(label, atoms)
            if known != atoms:
                unlike.update(known, atoms)
    return frozenset(unlike)


Pair = tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]


def pairs(moved: Rearrangement, leaves: Leaves) -> Iterator[Pair]:
    """Elements of a source and of the result that are one and the same, with their unknowns by dimension.

    Raises UnreadableError if there are more than are looked at.
    """
    *sources, out = moved.tensors
    kind, *how = moved.how
    offset = 0
    for source in sources:
        if kind == "join" and (source.ndim != out.ndim or source.shape[how[0]] == 0):
            continue
        to, back = _maps(kind, how, source, out, offset)
        if kind == "join":
            offset += source.shape[how[0]]
        if 0 in source.shape or 0 in out.shape or not (leaves.concerns(source) or leaves.concerns(out)):
            continue
        seen = dict.fromkeys((index, to(index)) for index in leaves.elements(source))
        seen.update(dict.fromkeys((back(index), index) for index in leaves.elements(out)))
        for before, after in seen:
            if before is not None and after is not None:
                yield leaves.at(source, before), leaves.at(out, after)


def _maps(kind: str, how: Sequence[object], source: TypedTensor, out: TypedTensor, offset: int):  # type: ignore[no-untyped-def]
    """From elements of the source to those of the result and back; None for one that is not there."""
    if kind == "view":
        return (
            lambda index: _unravelled(_ravelled(index, source.shape), out.shape),
            lambda index: _unravelled(_ravelled(index, out.shape), source.shape),
        )
    if kind == "pad":
        before = [margin[0] for margin in how[0]]  # type: ignore[attr-defined]
        return (
            lambda index: _inside(tuple(i + b for i, b in zip(index, before, strict=True)), out.shape),
            lambda index: _inside(tuple(i - b for i, b in zip(index, before, strict=True)), source.shape),
        )
    dim: int = how[0]  # type: ignore[assignment]
    keep, start, step = True, -offset, 1
    if kind == "take":
        start, keep = how[1], how[2]  # type: ignore[assignment]
    elif kind == "every":
        start, step = how[1], how[2]  # type: ignore[assignment]

    def to(index: tuple[int, ...]) -> tuple[int, ...] | None:
        at, left = divmod(index[dim] - start, step)
        if left or at < 0 or (not keep and at != 0):
            return None
        return _inside((*index[:dim], *((at,) if keep else ()), *index[dim + 1 :]), out.shape)

    def back(index: tuple[int, ...]) -> tuple[int, ...] | None:
        at = index[dim] if keep else 0
        return _inside((*index[:dim], at * step + start, *index[dim + keep :]), source.shape)

    return to, back


def _inside(index: tuple[int, ...], shape: Sequence[int]) -> tuple[int, ...] | None:
    return index if all(0 <= i < n for i, n in zip(index, shape, strict=True)) else None


def _ravelled(index: Sequence[int], shape: Sequence[int]) -> int:
    at = 0
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def _unravelled(at: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for n in reversed(shape):
        at, i = divmod(at, n)
        index.append(i)
    return tuple(reversed(index))
