"""Refinements: writing an axis as a product, taking a range of it, and what that says to the axes beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from permgraph.algebra.axis import Axis, Kind, Pinned, Restriction, TooIntricateError, show
from permgraph.algebra.limits import MAX_SKEW, RESTLESS
from permgraph.errors import ConflictError

if TYPE_CHECKING:
    from permgraph.algebra.store import Axes


def restrict(axes: Axes, axis: Axis, restriction: Restriction) -> Axis:
    """The axis as seen where another axis of its tensor was restricted to some of its parts."""
    axis = axes.resolve(axis)
    if not restriction or axis.kind is Kind.ATOM:
        return axis
    children = [axes.restrict(child, restriction) for child in axis.children]
    if axis.kind is Kind.FAMILY:
        assert axis.index is not None
        for index, kept in restriction.items():
            if index.find() is axis.index.find():
                if isinstance(kept, int):
                    return children[kept]
                return axes.family(kept[0], [children[i] for i in kept[1]])
    if all(new is old for new, old in zip(children, axis.children, strict=True)):
        return axis
    if axis.kind is Kind.PRODUCT:
        return axes.product(children)
    if axis.kind is Kind.SUM:
        return axes.sum(children, axis.index)
    assert axis.index is not None
    return axes.family(axis.index, children)


def split(axes: Axes, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Write the axis as a product of factors of these sizes (outermost first), refining it where need be.

    What no common refinement of two products can express (4·6 against 6·4 beyond their common outer 2) is pinned.
    """
    if math.prod(sizes) != axis.size:
        raise ConflictError(f"cannot view an axis of {axis.size} {show(axis)} as {'x'.join(map(str, sizes))}")
    wanted = [size for size in sizes if size != 1]
    if axis.size == 0:  # nothing is known of factors beside one without an index
        return axes.splits.setdefault((axes.scope, *sizes), [axes.atom(size) for size in sizes])
    if axis.size == 1:
        found: list[Axis] = []
    elif len(wanted) == 1:
        found = [axes.resolve(axis)]
    else:
        try:
            with axes.depth:
                found = _split(axes, axes.resolve(axis), wanted)
        except TooIntricateError:
            if axes.depth.now:
                raise
            found = _split(axes, _made_opaque(axes, axis, axes.too_intricate()), wanted)
    remaining = iter(found)
    return [axes.one if size == 1 else next(remaining) for size in sizes]


def _split(axes: Axes, axis: Axis, sizes: list[int]) -> list[Axis]:
    if axis in axes.opaque:
        assert axis.pinned is not None
        return axes.splits.setdefault((axis, *sizes), [axes.pinned(size, axis.pinned) for size in sizes])
    if axis.kind is Kind.ATOM:
        factors = _split_atom(axes, axis, sizes)
        axes.link(axis, axes.product(factors))
        axes.changes += 1
        return factors
    if axis.kind is Kind.PRODUCT:
        return _split_product(axes, axis, sizes)
    if axis.kind is Kind.SUM:
        outer, inner = _split_sum(axes, axis, sizes[0], axis.size // sizes[0])
        return [outer, *axes.split(inner, sizes[1:])]
    assert axis.index is not None
    columns = zip(*(axes.split(member, sizes) for member in axis.children), strict=True)
    return [axes.family(axis.index, column) for column in columns]


def _split_atom(axes: Axes, axis: Axis, sizes: list[int]) -> list[Axis]:
    if axis.pinned is not None:
        return [axes.pinned(size, axis.pinned) for size in sizes]
    return axes.named.make(axes, axes.named.split_name(axes.scope, axis.size, tuple(sizes)), sizes, nested=True)


def _split_product(axes: Axes, axis: Axis, sizes: list[int]) -> list[Axis]:
    queue = axes.factors(axis)
    found = []
    for size in sizes:
        taken: list[Axis] = []
        need = size
        while need > 1:
            factor = axes.resolve(queue.pop(0))
            if factor.kind is Kind.PRODUCT:
                queue[:0] = factor.children
                continue
            common = math.gcd(need, factor.size)
            if common == 1:
                return _unsplittable(axes, axis, sizes)
            if common < factor.size:
                factor, left = axes.split(factor, [common, factor.size // common])
                queue.insert(0, left)
            taken.append(factor)
            need //= common
        found.append(axes.product(taken))
    return found


def _unsplittable(axes: Axes, axis: Axis, sizes: list[int]) -> list[Axis]:
    """Pin an axis that is viewed in a way which these types cannot express."""
    shape = "x".join(map(str, sizes))
    why = Pinned(f"{show(axis)[:80]} was viewed as {shape}, which no product refines", axes.scope)
    return _split(axes, _made_opaque(axes, axis, why), sizes)


def _made_opaque(axes: Axes, axis: Axis, why: Pinned) -> Axis:
    """Pin an axis, and forget what it was made of."""
    axes.pin(axis, why)
    opaque = axes.pinned(axis.size, why)
    axes.opaque.add(opaque)
    axes.link(axis, opaque)
    axes.changes += 1
    return opaque


def _split_sum(axes: Axes, axis: Axis, outer: int, inner: int) -> list[Axis]:
    """Rows and columns of a concatenation: rows are cut at its joints, and columns differ from row to row."""
    key = (axis, outer, inner)
    if key in axes.splits:
        return axes.splits[key]
    joints, at = [], 0
    for part in axis.children[:-1]:
        at += part.size
        joints.append(at)
    aligned = all(joint % inner == 0 for joint in joints)
    if not aligned and axes.skew >= MAX_SKEW:
        return _unsplittable(axes, axis, [outer, inner])
    rows = sorted({0, outer} | {row for j in joints for row in (j // inner, -(-j // inner))})
    heads, columns = [], []
    axes.skew += not aligned
    try:
        for start, end in itertools.pairwise(rows):
            piece, _ = axes.slice(axis, start * inner, end * inner)
            head, column = axes.split(piece, [end - start, inner])
            heads.append(head)
            columns.append(column)
    finally:
        axes.skew -= not aligned
    total = axes.resolve(axes.sum(heads, axis.index if aligned else None))
    if total.index is None:  # all of it is pinned: nothing tells the rows apart any more
        for column in columns[1:]:
            axes.unify(columns[0], column)
        result = [total, columns[0]]
    else:
        result = [total, axes.family(total.index, columns)]
    axes.splits[key] = result
    return result


def slice_(axes: Axes, axis: Axis, start: int, end: int) -> tuple[Axis, Restriction]:
    """Indices start..end of the axis, cutting it there; and what that says to the tensor's other axes."""
    axis = axes.resolve(axis)
    if not 0 <= start <= end <= axis.size:
        raise ConflictError(f"cannot take {start}:{end} of an axis of {axis.size} {show(axis)}")
    if start == end:
        return axes.empty, {}
    if (start, end) == (0, axis.size):
        return axis, {}
    if axis.kind is Kind.ATOM:
        if not axes.may_cut:
            axes.pin(axis, Pinned(RESTLESS, axes.scope))
        if axis.pinned is not None:
            if (axis, start, end) not in axes.slices:
                axes.slices[axis, start, end] = axes.pinned(end - start, axis.pinned), {}
            return axes.slices[axis, start, end]
        bounds = sorted({0, start, end, axis.size})
        parts = [axes.atom(stop - begin) for begin, stop in itertools.pairwise(bounds)]
        axes.link(axis, axes.sum(parts))
        axes.changes += 1
        return axes.slice(axis, start, end)
    try:
        with axes.depth:
            if axis.kind is Kind.SUM:
                return _slice_sum(axes, axis, start, end)
            if axis.kind is Kind.PRODUCT:
                return _slice_product(axes, axis, start, end)
            assert axis.index is not None
            return axes.family(axis.index, [axes.slice(member, start, end)[0] for member in axis.children]), {}
    except TooIntricateError:
        if axes.depth.now:
            raise
        return axes.slice(_made_opaque(axes, axis, axes.too_intricate()), start, end)


def _slice_sum(axes: Axes, axis: Axis, start: int, end: int) -> tuple[Axis, Restriction]:
    assert axis.index is not None
    key = (axis, start, end)
    if key in axes.slices:
        return axes.slices[key]
    pieces, kept, at = [], [], 0
    for i, part in enumerate(axis.children):
        low, high = max(start - at, 0), min(end - at, part.size)
        if low < high:
            if start >= at and end <= at + part.size:  # inside one part: go on in it
                piece, restriction = axes.slice(part, low, high)
                return piece, {axis.index.find(): i, **restriction}
            pieces.append(axes.slice(part, low, high)[0])
            kept.append(i)
        at += part.size
    total = axes.resolve(axes.sum(pieces))
    axes.slices[key] = total, {} if total.index is None else {axis.index.find(): (total.index, tuple(kept))}
    return axes.slices[key]


def _slice_product(axes: Axes, axis: Axis, start: int, end: int) -> tuple[Axis, Restriction]:
    factors = axes.factors(axis)
    head, inner = factors[0], axis.size // factors[0].size
    first, last = start // inner, -(-end // inner)
    if start % inner == 0 and end % inner == 0:
        rows, restriction = axes.slice(head, first, last)
        rest = [axes.restrict(factor, restriction) for factor in factors[1:]]
        return axes.product([rows, *rest]), restriction
    if last - first == 1:
        _, restriction = axes.slice(head, first, last)
        column = axes.product([axes.restrict(factor, restriction) for factor in factors[1:]])
        piece, more = axes.slice(column, start - first * inner, end - first * inner)
        return piece, {**restriction, **more}
    key = (axis, start, end)
    if key not in axes.slices:
        joints = sorted({start, -(-start // inner) * inner, end // inner * inner, end})
        pieces = [axes.slice(axis, low, high)[0] for low, high in itertools.pairwise(joints)]
        axes.slices[key] = axes.sum(pieces), {}
    return axes.slices[key]
