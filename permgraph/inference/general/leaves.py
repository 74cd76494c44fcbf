"""Where an atom stands at one element of a tensor: the unknowns of the equations of structure.

An axis is a tree of products, sums and families over atoms. At one element of a tensor, given by its coordinates, a sum
is at one part and a family at one member, so that a few *leaves* are left, in order. Two elements with the same leaves
are alike in all that concerns structure; so a few elements of each tensor, its *representatives*, stand for all. What
a matrix on an atom does there is one unknown for each leaf of each tensor, for each way that the rest of the element
can stand: the queries and the keys of a fused projection are parts of one dimension, and each has unknowns of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from permgraph.algebra import Axes, Axis, Index, Kind
from permgraph.rules.typed_tensor import TypedTensor

MAX_ELEMENTS = 4096
"""So many representatives a tensor may have; what has more keeps permutations."""

Place = tuple[int, tuple[int, ...]]
"""A dimension, and the way to a leaf in its tree."""


class UnreadableError(Exception):
    """A tensor has more representatives than are looked at, or a family in it has no sum to choose its member."""


class Leaves:
    """The unknowns of one graph: numbers, each with its atom and tensor.

    Args:
        axes: the types, at rest.
        movable: the atoms whose structure is asked for.
    """

    def __init__(self, axes: Axes, movable: frozenset[Axis]) -> None:
        self.axes = axes
        self.movable = movable
        self.atoms: list[Axis] = []
        self.tensors: list[TypedTensor] = []
        self.dims: list[int] = []
        self._known: dict[tuple[int, tuple[Place, ...]], dict[int, tuple[int, ...]]] = {}
        self._representatives: dict[Axis, tuple[int, ...]] = {}
        self._alive: list[TypedTensor] = []  # so that an identity is not used twice

    def concerns(self, tensor: TypedTensor) -> bool:
        """Whether an atom whose structure is asked for stands in this tensor."""
        return any(atom in self.movable for axis in tensor.dims for atom in self.axes.atoms(axis))

    def movable_in(self, *tensors: TypedTensor) -> set[Axis]:
        """The atoms in these tensors whose structure is asked for."""
        return {a for t in tensors for axis in t.dims for a in self.axes.atoms(axis) if a in self.movable}

    def at(self, tensor: TypedTensor, index: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """For each dimension the unknowns at one element, in order."""
        found = self._descend(tensor.dims, index)
        key = id(tensor), tuple((dim, path) for dim, path, _ in found)
        known = self._known.get(key)
        if known is None:
            self._alive.append(tensor)
            known = {}
            for dim, _, atom in found:
                if atom in self.movable:
                    known[dim] = (*known.get(dim, ()), len(self.atoms))
                    self.atoms.append(atom)
                    self.tensors.append(tensor)
                    self.dims.append(dim)
            self._known[key] = known
        return known

    def atoms_along(self, axis: Axis, coordinate: int, tensor: TypedTensor, index: Sequence[int]) -> list[Axis]:
        """The atoms whose structure is asked for in one factor of a dimension, at a coordinate along that factor."""
        found = self._descend([*tensor.dims, axis], [*index, coordinate])
        return [atom for dim, _, atom in found if dim == tensor.ndim and atom in self.movable]

    def representatives(self, axis: Axis) -> tuple[int, ...]:
        """Coordinates along an axis that stand for all: one for each way to pass through its sums."""
        axis = self.axes.resolve(axis)
        found = self._representatives.get(axis)
        if found is None:
            found = self._representatives[axis] = tuple(sorted(self._find_representatives(axis)))
        return found

    def _find_representatives(self, axis: Axis) -> set[int]:
        if axis.kind is Kind.ATOM:
            return {0} if axis.size else set()
        parts = [self.representatives(child) for child in axis.children]
        if axis.kind is Kind.FAMILY:
            return set().union(*parts)
        found: set[int] = set()
        if axis.kind is Kind.SUM:
            start = 0
            for child, inner in zip(axis.children, parts, strict=True):
                found.update(start + i for i in inner)
                start += child.size
            return found
        for combination in itertools.product(*parts):
            at = 0
            for child, i in zip(axis.children, combination, strict=True):
                at = at * child.size + i
            found.add(at)
            if len(found) > MAX_ELEMENTS:
                raise UnreadableError
        return found

    def elements(self, tensor: TypedTensor) -> Iterator[tuple[int, ...]]:
        """The representatives of a tensor.

        Raises UnreadableError if there are more than are looked at.
        """
        along = [self.representatives(axis) for axis in tensor.dims]
        count = 1
        for coordinates in along:
            count *= len(coordinates)
        if count > MAX_ELEMENTS:
            raise UnreadableError
        return itertools.product(*along)

    def _descend(self, dims: Sequence[Axis], index: Sequence[int]) -> list[tuple[int, tuple[int, ...], Axis]]:
        """The leaves at one element, in order; those of one index are left out, as they hold no atom."""
        chosen: dict[Index, int] = {}
        while True:  # a family needs the part of a sum that may stand behind it
            leaves: list[tuple[int, tuple[int, ...], Axis]] = []
            waiting, before = False, len(chosen)
            for dim, (axis, i) in enumerate(zip(dims, index, strict=True)):
                waiting |= self._walk(axis, i, dim, (), chosen, leaves)
            if not waiting:
                return leaves
            if len(chosen) == before:
                raise UnreadableError

    def _walk(
        self,
        axis: Axis,
        at: int,
        dim: int,
        path: tuple[int, ...],
        chosen: dict[Index, int],
        leaves: list[tuple[int, tuple[int, ...], Axis]],
    ) -> bool:
        """Follow one coordinate down; whether a family on the way waits for its sum."""
        axis = self.axes.resolve(axis)
        if axis.kind is Kind.ATOM:
            leaves.append((dim, path, axis))
            return False
        if axis.kind is Kind.PRODUCT:
            waiting = False
            rest = axis.size
            for step, child in enumerate(axis.children):
                rest //= child.size
                waiting |= self._walk(child, at // rest, dim, (*path, step), chosen, leaves)
                at %= rest
            return waiting
        assert axis.index is not None
        index = axis.index.find()
        if axis.kind is Kind.SUM:
            for step, child in enumerate(axis.children):
                if at < child.size:
                    chosen[index] = step
                    return self._walk(child, at, dim, (*path, step), chosen, leaves)
                at -= child.size
        if index not in chosen:
            return True
        step = chosen[index]
        return self._walk(axis.children[step], at, dim, (*path, step), chosen, leaves)
