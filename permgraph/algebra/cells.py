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

    Whole cells that follow one another are rows, of one cell or of several, where these are all made up alike. Others
    are single cells.
    """
    found = []
    seams = [0, *itertools.accumulate(part.size for part in axes.parts(axis))]
    for part, (start, end) in zip(axes.parts(axis), itertools.pairwise(seams), strict=True):
        first, last = -(-start // size) * size, end // size * size
        if first > last:  # within one cell
            found.append(Stretch(start, end, end - start))
            continue
        if start < first:
            found.append(Stretch(start, first, first - start))
        rows = _rows(axes, part, size, first - start, last - start)
        low, high = (first, first) if rows is None else (start + rows.start, start + rows.end)
        found += [Stretch(at, at + size, size) for at in range(first, low, size)]
        if rows is not None:
            found.append(Stretch(low, high, rows.period))
        found += [Stretch(at, at + size, size) for at in range(high, last, size)]
        if last < end:
            found.append(Stretch(last, end, end - last))
    return found


def _rows(axes: Axes, part: Axis, size: int, first: int, last: int) -> Stretch | None:
    """The rows of whole cells between two indices of a part that are made up alike, if there are several.

    Rows begin where a cell and a group that the part has begin together, and have as many indices as several of each
    have, or as several cells in one group: others would be tied to what they are not like.
    """
    head, *rest = axes.factors(part)
    unit = part.size // head.size
    low = next((at for at in range(first, min(last, first + math.lcm(size, unit)), size) if at % unit == 0), last)
    within = [period for period in range(size, unit, size) if unit % period == 0]
    period = next((p for p in within if fits(axes, axes.product(rest), p)), math.lcm(size, unit))
    rows = (last - low) // math.lcm(period, unit) * math.lcm(period, unit) // period
    return Stretch(low, low + rows * period, period) if rows > 1 else None
