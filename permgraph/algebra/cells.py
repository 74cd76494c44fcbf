"""Cells of one size along an axis whose seams, or whose own groups, do not lie on the borders of the cells.

GroupNorm over a concatenation is such a case: 960 channels in cells of 30, of which 640 come from a tensor that had a
GroupNorm with cells of 20. What remains free is the common refinement: the pieces between all seams and borders, each
within itself, and stretches of whole cells that are made up alike, which change places.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from permgraph.algebra.axis import Axis, Kind

if TYPE_CHECKING:
    from permgraph.algebra.store import Axes


def fits(axes: Axes, axis: Axis, size: int) -> bool:
    """Whether an axis can be written as rows of cells of this size without cutting anything more than once."""
    axis = axes.resolve(axis)
    if axis.kind is Kind.ATOM or size in (1, axis.size):
        return True
    if axis.kind is Kind.FAMILY:
        return all(fits(axes, member, size) for member in axis.children)
    if axis.kind is Kind.SUM:
        return all(part.size % size == 0 and fits(axes, part, size) for part in axis.children)
    within = 1
    for factor in reversed(axes.factors(axis)):
        if within * factor.size > size or size % (within * factor.size):
            return size % within == 0 and factor.size % (size // within) == 0 and fits(axes, factor, size // within)
        within *= factor.size
        if within == size:
            return True
    return True


class Stretch(NamedTuple):
    """Indices `start` to `end` of an axis: a piece of a cell, one whole cell, or rows of `period` indices."""

    start: int
    end: int
    period: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return (self.end - self.start) // self.period


def stretches(axes: Axes, axis: Axis, size: int) -> list[Stretch]:
    """The pieces of an axis between its seams and the borders of cells of this size, in order.

    Whole cells that follow one another are rows, where they are groups that the axis has, or cut each of these into as
    many. Others are single cells.
    """
    found = []
    seams = [0, *itertools.accumulate(part.size for part in axes.parts(axis))]
    for start, end in itertools.pairwise(seams):
        first, last = -(-start // size) * size, end // size * size
        if first > last:  # within one cell
            found.append(Stretch(start, end, end - start))
            continue
        if start < first:
            found.append(Stretch(start, first, first - start))
        if first < last:
            unit = _unit(axes, axes.slice(axis, first, last)[0])
            period = math.lcm(size, unit)
            # Rows are all made up alike: where cells cut groups of another size, they would cut every one of them.
            if period == max(size, unit) and (rows := (last - first) // period) > 1:
                found.append(Stretch(first, first + rows * period, period))
                first += rows * period
            found += [Stretch(low, low + size, size) for low in range(first, last, size)]
        if last < end:
            found.append(Stretch(last, end, end - last))
    return found


def _unit(axes: Axes, axis: Axis) -> int:
    """The size of the groups that an axis has already; of one that has none, one."""
    return math.prod(factor.size for factor in axes.factors(axis)[1:])
