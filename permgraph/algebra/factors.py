"""The factors that splits make, by names that are the same in each run: where one was cut, the next run makes it so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from permgraph.algebra.axis import Axis, FactorKey, Kind
from permgraph.algebra.limits import MAX_PARTS

if TYPE_CHECKING:
    from permgraph.algebra.store import Axes


@dataclass(frozen=True)
class ByPart:
    """Where a factor is cut at each part of one that stands before it.

    Attributes:
        position: of the other, among the factors of the split.
        points: for each of its parts.
    """

    position: int
    points: tuple[tuple[int, ...], ...]

    @property
    def anywhere(self) -> tuple[int, ...]:
        """Where the factor is cut at any of the parts."""
        return tuple(sorted({point for each in self.points for point in each}))


@dataclass(frozen=True)
class Nest:
    """A factor that is made as a sum or as a product, of which some part is made up of others again.

    Attributes:
        kind: whether it is a sum or a product.
        children: its parts, or its factors: of these that are not made up of others, the sizes.
    """

    kind: Kind
    children: tuple[int | Nest, ...]


Cuts = tuple[int, ...] | ByPart | Nest
"""Where a factor is cut: the same everywhere, or otherwise at each part of another, or in rows each of which is cut."""


class Factors:
    """Makes factors, and knows where they have been cut since.

    A view comes before the operator that takes a part of what it made. So a factor that an earlier run saw being cut
    is made as a sum from the start, and the factors beside it as families over it (see the head of this package).
    """

    def __init__(self, cuts: Mapping[FactorKey, Cuts] | None = None) -> None:
        self.cuts = dict(cuts or {})
        self._made: list[tuple[FactorKey, list[Axis], int]] = []  # the names, with all factors of the split
        self._split: set[FactorKey] = set()  # the names of those of one axis that have others nested in them
        self._alike: dict[FactorKey, int] = {}  # how many splits alike the current node has made

    def start_node(self) -> None:
        """Start (again) on the constraints of one graph node: its splits are numbered afresh."""
        self._alike = {}

    def split_name(self, *shape: object) -> FactorKey:
        """The name of one more split of this shape in the current node."""
        self._alike[shape] = self._alike.get(shape, -1) + 1
        return (*shape, self._alike[shape])

    def make(self, axes: Axes, name: FactorKey, sizes: Sequence[int], *, nested: bool = False) -> list[Axis]:
        """New axes that stand side by side, known by a name: where one was cut in an earlier run, it is a sum now.

        They are `nested` in one another if one axis was split into them.
        """
        cuts = [self.cuts.get((*name, position), ()) for position in range(len(sizes))]
        outers: dict[int, Axis] = {}  # those that are sums, by their positions
        for position, size in enumerate(sizes):
            own = cuts[position]
            if own and not isinstance(own, ByPart):  # its parts differ with those of the ones before it
                outers[position] = _made_cut(axes, size, own, dict(outers))
        result = [
            outers[position] if position in outers else _made_cut(axes, size, cuts[position], outers)
            for position, size in enumerate(sizes)
        ]
        self._made.extend(((*name, position), result, position) for position in range(len(sizes)))
        if nested:
            self._split.update((*name, position) for position in range(len(sizes) - 1))
        return result

    def cuts_seen(self, axes: Axes, *, within: bool = False) -> dict[FactorKey, Cuts]:
        """Where factors have been cut since they were made, and those of earlier runs.

        With `within`, what was cut in a member of a family counts as cut at the part to which the member belongs. Rows
        that are each cut alike tell the parts of what stands beside them, and are seen where something does.
        """
        seen = dict(self.cuts)
        cut_anew: set[int] = set()  # splits of which a factor was cut that had not been: the next run tells its parts
        for key, split, position in self._made:
            axis = axes.resolve(split[position])
            known = seen.get(key, ())
            if axis.kind is Kind.FAMILY:
                cuts = _by_part(axes, split, position)
                if cuts is not None and (within or isinstance(cuts, ByPart)):
                    seen[key] = cuts
            elif id(split) not in cut_anew and key in self._split and (nest := _nest(axes, axis)):
                seen[key] = nest
                if nest != known:
                    cut_anew.add(id(split))
            elif isinstance(known, tuple) and id(split) not in cut_anew and (points := _points(axes, axis)):
                seen[key] = tuple(sorted(points | set(known)))
                if not points <= set(known):
                    cut_anew.add(id(split))
        return seen


def _by_part(axes: Axes, split: Sequence[Axis], position: int) -> Cuts | None:
    """Where a factor that is a family is cut; at which parts of which factor, if that is one before it."""
    axis = axes.resolve(split[position])
    assert axis.index is not None
    if any(_nest(axes, before) for before in split[:position]):  # of the parts of rows nothing is foreseen
        return None
    cuts = ByPart(-1, tuple(tuple(sorted(_points(axes, member))) for member in axis.children))
    if not any(cuts.points):
        return None
    if len(set(cuts.points)) == 1:  # one seam for all of them, with which other factors can differ
        return cuts.anywhere
    for at, before in enumerate(split[:position]):
        before = axes.resolve(before)
        if before.kind is Kind.SUM and before.index is not None and before.index.find() is axis.index.find():
            return replace(cuts, position=at)
    return cuts.anywhere


def _made_cut(axes: Axes, size: int, cuts: Cuts, outers: Mapping[int, Axis]) -> Axis:
    """A new axis with these cuts: its parts differ from part to part of those before it."""
    if isinstance(cuts, Nest):
        return _made_nest(axes, cuts, list(outers.values()))
    if isinstance(cuts, ByPart):
        outer = outers.get(cuts.position)
        if outer is None or outer.kind is not Kind.SUM or len(outer.children) != len(cuts.points):
            return _made_cut(axes, size, cuts.anywhere, outers)
        others = {at: axis for at, axis in outers.items() if at != cuts.position}
        assert outer.index is not None
        return axes.family(outer.index, [_made_cut(axes, size, points, others) for points in cuts.points])
    bounds = [0, *cuts, size]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    return axes.sum([_family_of_atoms(axes, one, list(outers.values())) for one in sizes])


def _made_nest(axes: Axes, nest: int | Nest, outers: Sequence[Axis]) -> Axis:
    if isinstance(nest, int):
        return _family_of_atoms(axes, nest, outers)
    children = [_made_nest(axes, child, outers) for child in nest.children]
    return axes.sum(children) if nest.kind is Kind.SUM else axes.product(children)


def _family_of_atoms(axes: Axes, size: int, outers: Sequence[Axis]) -> Axis:
    """An axis of its own at each part of the sums among `outers`, and of those within their parts and factors."""
    if not outers:
        return axes.atom(size)
    outer, rest = axes.resolve(outers[0]), outers[1:]
    if outer.kind is Kind.SUM and outer.index is not None:
        members = [_family_of_atoms(axes, size, [child, *rest]) for child in outer.children]
        return axes.family(outer.index, members)
    return _family_of_atoms(axes, size, [*outer.children, *rest] if outer.kind is Kind.PRODUCT else rest)


def _nest(axes: Axes, axis: Axis) -> Nest | None:
    """How an axis is made up, if there are rows in it that are each cut; of families nothing is said."""
    stack, rows, parts = [axis], False, 0
    while stack:
        one = axes.resolve(stack.pop())
        parts += one.kind is Kind.SUM and len(one.children)
        if one.kind is Kind.FAMILY or parts > MAX_PARTS:
            return None
        rows |= one.kind is Kind.PRODUCT and any(factor.kind is Kind.SUM for factor in axes.factors(one))
        stack.extend(one.children)
    found = _made_up(axes, axis) if rows else None
    return found if isinstance(found, Nest) else None


def _made_up(axes: Axes, axis: Axis) -> int | Nest:
    axis = axes.resolve(axis)
    children = axes.parts(axis) if axis.kind is Kind.SUM else axes.factors(axis) if axis.kind is Kind.PRODUCT else []
    made = tuple(_made_up(axes, child) for child in children)
    if axis.kind is Kind.PRODUCT and all(isinstance(one, int) for one in made):
        return axis.size  # the split that made it so makes it again
    return Nest(axis.kind, made) if made else axis.size


def _points(axes: Axes, axis: Axis) -> set[int]:
    """Where an axis is cut; of a family, where any of its members is."""
    axis = axes.resolve(axis)
    if axis.kind is Kind.FAMILY:
        return set().union(*(_points(axes, member) for member in axis.children))
    if axis.kind is not Kind.SUM:
        return set()
    return set(itertools.accumulate(part.size for part in axes.parts(axis)[:-1]))
