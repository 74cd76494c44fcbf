"""The factors that splits make, by names that are the same in each run: where one was cut, the next run makes it so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from permgraph.algebra.axis import Axis, FactorKey, Kind

if TYPE_CHECKING:
    from permgraph.algebra.store import Axes


class Factors:
    """Makes factors, and knows where they have been cut since.

    A view comes before the operator that takes a part of what it made. So a factor that an earlier run saw being cut
    is made as a sum from the start, and the factors beside it as families over it (see the head of this package).
    """

    def __init__(self, cuts: Mapping[FactorKey, tuple[int, ...]] | None = None) -> None:
        self.cuts = dict(cuts or {})
        self._made: list[tuple[FactorKey, Axis]] = []
        self._alike: dict[FactorKey, int] = {}  # how many splits alike the current node has made

    def start_node(self) -> None:
        """Start (again) on the constraints of one graph node: its splits are numbered afresh."""
        self._alike = {}

    def split_name(self, *shape: object) -> FactorKey:
        """The name of one more split of this shape in the current node."""
        self._alike[shape] = self._alike.get(shape, -1) + 1
        return (*shape, self._alike[shape])

    def make(self, axes: Axes, name: FactorKey, sizes: Sequence[int]) -> list[Axis]:
        """New axes that stand side by side, known by a name: where one was cut in an earlier run, it is a sum now."""
        keys = [(*name, position) for position in range(len(sizes))]
        outers: list[Axis] = []
        cut = []
        for key, size in zip(keys, sizes, strict=True):
            cut.append(self._make_cut(axes, key, size, outers))  # its parts differ from part to part of those before it
            outers += [axis for axis in cut[-1:] if axis is not None]
        result = [axis or _family_of_atoms(axes, size, outers) for axis, size in zip(cut, sizes, strict=True)]
        self._made.extend(zip(keys, result, strict=True))
        return result

    def _make_cut(self, axes: Axes, key: FactorKey, size: int, outers: Sequence[Axis]) -> Axis | None:
        points = self.cuts.get(key)
        if points is None:
            return None
        bounds = [0, *points, size]
        return axes.sum([_family_of_atoms(axes, end - start, outers) for start, end in itertools.pairwise(bounds)])

    def cuts_seen(self, axes: Axes, *, within: bool = False) -> dict[FactorKey, tuple[int, ...]]:
        """Where factors have been cut since they were made, and those of earlier runs.

        With `within`, what was cut in any member of a family counts as cut in all of them.
        """
        seen = dict(self.cuts)
        for key, axis in self._made:
            points = _points(axes, axis, within)
            if points:
                seen[key] = tuple(sorted(points | set(seen.get(key, ()))))
        return seen


def _family_of_atoms(axes: Axes, size: int, outers: Sequence[Axis]) -> Axis:
    if not outers:
        return axes.atom(size)
    outer, rest = outers[0], outers[1:]
    assert outer.index is not None
    return axes.family(outer.index, [_family_of_atoms(axes, size, rest) for _ in outer.children])


def _points(axes: Axes, axis: Axis, within: bool) -> set[int]:
    axis = axes.resolve(axis)
    if within and axis.kind is Kind.FAMILY:
        return set().union(*(_points(axes, member, within) for member in axis.children))
    if axis.kind is not Kind.SUM:
        return set()
    return set(itertools.accumulate(part.size for part in axes.parts(axis)[:-1]))
