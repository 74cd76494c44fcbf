"""Constraints: that an axis stays put, and that two are permuted alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from permgraph.algebra.axis import Axis, Kind, Pinned, TooIntricateError, show
from permgraph.errors import ConflictError

if TYPE_CHECKING:
    from permgraph.algebra.store import Axes


def pin(axes: Axes, axis: Axis, why: Pinned) -> None:
    """Say that the axis must stay put."""
    for atom in list(axes.atoms(axis)):
        if atom.pinned is None:
            atom.pinned = why
            axes.changes += 1


def collapse(axes: Axes, family: Axis) -> None:
    """Make the members of a family one axis: it stands where nothing says which member is meant."""
    members = family.find().children
    if len({member.size for member in members}) > 1:  # rows of a skewed matrix were taken for parts of one axis
        for member in members:
            axes.pin(member, axes.too_intricate())
        return
    for member in members[1:]:
        axes.unify(members[0], member)


def unify(axes: Axes, a: Axis, b: Axis) -> None:
    """Say that whatever permutes one axis permutes the other alike.

    Raises `ConflictError` when the sizes differ.
    """
    a, b = axes.resolve(a), axes.resolve(b)
    if a is b or a.size == b.size < 2:
        return
    if a.size != b.size:
        raise ConflictError(f"cannot tie an axis of {a.size} {show(a)} to one of {b.size} {show(b)}")
    if b.kind is Kind.ATOM:
        a, b = b, a
    if a.kind is Kind.ATOM:
        _bind(axes, a, b)
        return
    if a.kind is Kind.SUM and b.kind is Kind.SUM and [c.size for c in a.children] == [c.size for c in b.children]:
        _merge_indices(axes, a, b)
    if not axes.same(a, b):
        try:
            with axes.depth:
                _unify_composites(axes, a, b)
        except TooIntricateError:
            if axes.depth.now:
                raise
            axes.pin(a, axes.too_intricate())
            axes.pin(b, axes.too_intricate())
    a, b = axes.resolve(a), axes.resolve(b)
    if a is not b and a.kind is b.kind and len(a.children) == len(b.children) and axes.same(a, b):
        axes.link(a, b)


def _bind(axes: Axes, atom: Axis, other: Axis) -> None:
    if atom.pinned is not None:
        axes.pin(other, atom.pinned)
    if atom in axes.opaque:
        if other.kind is not Kind.ATOM:
            return
        atom, other = other, atom
    if other.kind is Kind.FAMILY and _is_member(axes, atom, other):
        axes.collapse(other)
        return
    axes.link(atom, other)
    axes.changes += 1


def _is_member(axes: Axes, atom: Axis, family: Axis) -> bool:
    members = [axes.resolve(child) for child in family.children]
    return any(m is atom or (m.kind is Kind.FAMILY and _is_member(axes, atom, m)) for m in members)


def _unify_composites(axes: Axes, a: Axis, b: Axis) -> None:
    if a.kind is Kind.FAMILY or b.kind is Kind.FAMILY:
        if b.kind is not Kind.FAMILY:
            a, b = b, a
        if a.kind is Kind.FAMILY:
            assert a.index is not None and b.index is not None
            if a.index.find() is b.index.find() and len(a.children) == len(b.children):
                _unify_each(axes, a.children, b.children)
            else:
                axes.collapse(a)
                axes.collapse(b)
                axes.unify(a, b)
        elif a.kind is Kind.PRODUCT:
            _unify_each(axes, axes.split(b, [f.size for f in a.children]), a.children)
        else:
            _unify_slices(axes, b, a)
    elif a.kind is Kind.SUM and b.kind is Kind.SUM:
        if [c.size for c in a.children] == [c.size for c in b.children]:
            _unify_each(axes, a.children, b.children)
        else:
            _unify_slices(axes, a, b)
    elif a.kind is Kind.PRODUCT and b.kind is Kind.PRODUCT:
        _unify_each(axes, axes.split(a, [f.size for f in b.children]), b.children)
    else:
        total, product = (a, b) if a.kind is Kind.SUM else (b, a)
        head, tail = product.children[0], product.children[1:]
        outer, inner = axes.split(total, [head.size, product.size // head.size])
        axes.unify(outer, head)
        axes.unify(inner, axes.product(tail))


def _unify_each(axes: Axes, left: Sequence[Axis], right: Sequence[Axis]) -> None:
    pairs = list(zip(left, right, strict=True))
    if axes.has_families:  # the sums that families refer to must have met before, as `Call._tie` has it
        pairs.sort(key=lambda pair: axes.contains_family(pair[0]) or axes.contains_family(pair[1]))
    for x, y in pairs:
        axes.unify(x, y)


def _unify_slices(axes: Axes, axis: Axis, total: Axis) -> None:
    start = 0
    for part in total.children:
        axes.unify(axes.slice(axis, start, start + part.size)[0], part)
        start += part.size


def _merge_indices(axes: Axes, a: Axis, b: Axis) -> None:
    assert a.index is not None and b.index is not None
    older, younger = sorted((a.index.find(), b.index.find()), key=lambda index: index.age)
    if older is not younger:
        younger.link = older
        axes.changes += 1
