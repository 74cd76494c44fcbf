"""Searches for largest elements: axes whose order decides which of several equals is found, or in which order."""

from __future__ import annotations

from collections.abc import Sequence

from permgraph.algebra import Axis, Kind
from permgraph.inference.solution import Solution, tensors_in
from permgraph.rules.call import EQUAL

UNSORTED = "it was searched for its largest elements, whose order was left open"


def pin_mirrored(solution: Solution) -> None:
    """Pin axes that meet themselves where a largest element is looked for: (i, j) and (j, i) may be the same."""
    for call in solution.calls:
        for tensor, dims, number in call.ledger.searched:
            if _meets_itself(solution, [tensor.dims[d] for d in dims]):
                solution.pin(number, tensor, EQUAL, free=frozenset(range(tensor.ndim)) - frozenset(dims))


def pin_unsorted(solution: Solution) -> None:
    """Pin what was searched where the order in which the largest elements came out is seen by anything."""
    found = [entry for call in solution.calls for entry in call.ledger.unsorted]
    before = -1
    while found and before != solution.axes.changes:
        before = solution.axes.changes
        placeholders = (value for node, value in solution.values.items() if node.op == "placeholder")
        written = {a for t in tensors_in(list(placeholders)) for axis in t.dims for a in solution.axes.atoms(axis)}
        for searched, ranked, dim, number in found:
            rank = solution.axes.resolve(ranked.dims[dim])
            if rank.kind is not Kind.ATOM or rank.pinned is not None or rank in written:
                solution.pin(number, ranked, UNSORTED, free=frozenset(range(ranked.ndim)) - {dim})
                solution.pin(number, searched, UNSORTED, free=frozenset(range(searched.ndim)) - {dim})


def _meets_itself(solution: Solution, axes: Sequence[Axis]) -> bool:
    """Whether one unpinned axis stands twice in the product of these."""
    axis = solution.axes.resolve(axes[0]) if len(axes) == 1 else None
    if axis is not None and axis.kind is not Kind.PRODUCT:
        return any(_meets_itself(solution, [child]) for child in axis.children)
    factors = [factor for axis in axes for factor in solution.axes.factors(axis)]
    atoms = [a for factor in factors for a in dict.fromkeys(solution.axes.atoms(factor)) if a.pinned is None]
    return len(set(atoms)) < len(atoms) or any(_meets_itself(solution, [f]) for f in factors if f.children)
