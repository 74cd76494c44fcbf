"""The store of axes: makes each type once, keeps it in normal form, and answers questions about it.

Three normal forms keep types comparable. A sum that is followed by other factors is distributed over them,
``([a + b] c)`` becoming ``[(a c) + (b c)]``; a family whose members have become the same axis is that axis; and a sum
of pinned parts is one pinned atom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from permgraph.algebra import refine
from permgraph.algebra import unify as constraints
from permgraph.algebra.axis import Axis, FactorKey, Index, Kind, Pinned, Restriction, TooIntricateError
from permgraph.algebra.factors import Cuts, Factors
from permgraph.algebra.limits import MAX_DEPTH, MAX_NESTING, RESTLESS, TOO_INTRICATE


class Depth:
    """How many refinements are being made, each for the sake of the one before: entered by each."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0

    def __enter__(self) -> None:
        if self.now == MAX_DEPTH:
            raise TooIntricateError(f"{MAX_DEPTH} refinements for the sake of one another")
        self.now += 1

    def __exit__(self, *error: object) -> None:
        self.now -= 1


class Axes:
    """All axes of one run. Its words are in three files: making and reading here, `unify`, and `refine`.

    `cuts` says where factors will be cut, by their names; see `Factors`.
    """

    def __init__(self, cuts: Mapping[FactorKey, Cuts] | None = None) -> None:
        self.changes = 0
        self.scope: int = -1  # the graph node whose rule is running
        self.has_families = False
        self.may_cut = True  # False: axes are pinned where they would be cut, so that a run comes to an end
        self.one = Axis(Kind.ATOM, 1)
        self.empty = Axis(Kind.ATOM, 0)
        self.named = Factors(cuts)
        self.depth = Depth()
        self.skew = 0  # how many concatenations are being split, each off its joints, within one another
        self.splits: dict[tuple[object, ...], list[Axis]] = {}
        self.slices: dict[tuple[Axis, int, int], tuple[Axis, Restriction]] = {}
        self.opaque: set[Axis] = set()  # pinned atoms that were seen as products which have no common refinement
        self._interned: dict[tuple[Kind, Index | None, tuple[Axis, ...]], Axis] = {}
        self._pinned_sums: dict[Axis, Axis] = {}
        self._contains: dict[Axis, tuple[int, bool]] = {}
        self._family_indices: set[Index] = set()

    def start_node(self, number: int) -> None:
        """Start (again) on the constraints of one graph node."""
        self.scope = number
        self.named.start_node()

    # -- making axes -------------------------------------------------------------------------------------------------

    def atom(self, size: int) -> Axis:
        """A new axis of interchangeable indices; that of one index and that of none are always the same."""
        return Axis(Kind.ATOM, size) if size > 1 else self.one if size else self.empty

    def pinned(self, size: int, reason: Pinned) -> Axis:
        """A new axis that stays put."""
        return Axis(Kind.ATOM, size, pinned=reason) if size > 1 else self.atom(size)

    def product(self, factors: Sequence[Axis]) -> Axis:
        """The row-major flattening of `factors`, outermost first."""
        size = math.prod(f.size for f in factors)
        return self.resolve(self._intern(Kind.PRODUCT, size, factors)) if size else self.empty

    def sum(self, parts: Sequence[Axis], index: Index | None = None) -> Axis:
        """The concatenation of `parts`, empty ones dropped; without an index, the same one for the same parts."""
        parts = tuple(part for part in parts if part.size)
        if len(parts) < 2:
            return self.resolve(parts[0]) if parts else self.empty
        return self._intern(Kind.SUM, sum(part.size for part in parts), parts, index)

    def family(self, index: Index, members: Sequence[Axis]) -> Axis:
        """The axis that is ``members[i]`` at part i of the sum known by `index`; all members have one size."""
        if members[0].size < 2:
            return self.atom(members[0].size)
        self.has_families = True
        self._family_indices.add(index)
        return self.resolve(self._intern(Kind.FAMILY, members[0].size, members, index))

    def _intern(self, kind: Kind, size: int, children: Sequence[Axis], index: Index | None = None) -> Axis:
        """The node of this kind over these children: made once, so that repeating a constraint changes nothing."""
        root = None if index is None else index.find()
        key = (kind, root, tuple([self.resolve(child) for child in children]))
        found = self._interned.get(key)
        if found is None:
            found = Axis(kind, size, key[2], Index() if kind is Kind.SUM and root is None else root)
            if found.nesting > MAX_NESTING:
                raise TooIntricateError(f"types nested in one another {found.nesting} times")
            self._interned[key] = found
        return found.find()

    # -- reading axes ------------------------------------------------------------------------------------------------

    def resolve(self, axis: Axis) -> Axis:
        """The axis in normal form, as far as it is known now."""
        if axis.link is not None:
            axis = axis.find()
        kind = axis.kind
        if kind is Kind.ATOM or axis.stamp == self.changes:
            return axis
        if kind is Kind.PRODUCT:
            return self._normal_product(axis)
        if axis.kind is Kind.FAMILY:
            members = [self.resolve(child) for child in axis.children]
            if all(atom.pinned for m in members for atom in self.atoms(m)):
                for member in members[1:]:
                    self.unify(members[0], member)
            if all(self.same(members[0], member) for member in members[1:]):
                self.link(axis, members[0])
                return self.resolve(members[0])
        if axis.kind is Kind.SUM:
            parts: list[Axis] = []
            for child in axis.children:  # a comprehension would take one more frame of Python's stack at each level
                parts.append(self.resolve(child))
            still = all(p.kind is Kind.ATOM and (p.pinned or p.size == 1) for p in parts)
            if still and (axis.size > len(parts) or not (self.may_cut or self.tells_members(axis))):
                why = next((p.pinned for p in parts if p.pinned), Pinned(RESTLESS, self.scope))
                self.link(axis, self._pinned_sums.setdefault(axis, self.pinned(axis.size, why)))
                return axis.find()
        axis.stamp = self.changes
        return axis

    def tells_members(self, total: Axis) -> bool:
        """Whether there is a family over a sum."""
        assert total.index is not None
        return total.index.find() in {index.find() for index in self._family_indices}

    def factors(self, axis: Axis) -> list[Axis]:
        """The factors of an axis in normal form, outermost first; an axis that is no product is its own factor."""
        axis = self.resolve(axis)
        if axis.kind is Kind.PRODUCT:
            return [self.resolve(child) for child in axis.children]
        return [axis]

    def parts(self, axis: Axis) -> list[Axis]:
        """The parts of an axis in normal form, flattened; an axis that is no sum is its own part."""
        axis = self.resolve(axis)
        if axis.kind is not Kind.SUM:
            return [axis]
        found: list[Axis] = []
        stack = [axis]
        while stack:
            axis = self.resolve(stack.pop())
            if axis.kind is Kind.SUM:
                stack.extend(reversed(axis.children))
            else:
                found.append(axis)
        return found

    def atoms(self, axis: Axis) -> Iterator[Axis]:
        """Every atom in an axis, in order, with repetitions; axes of one index are left out."""
        stack = [axis]
        while stack:
            axis = self.resolve(stack.pop())
            if axis.kind is not Kind.ATOM:
                stack.extend(reversed(axis.children))
            elif axis.size > 1:
                yield axis

    def still(self, axis: Axis) -> bool:
        """Whether every atom in an axis stays put."""
        return all(atom.pinned for atom in self.atoms(axis))

    def form(self, axes: Iterable[Axis]) -> list[object]:
        """What these axes say: equal for two lists that differ only in names and in how what stays put is made up."""
        numbers: dict[Axis | Index, int] = {}

        def said(axis: Axis) -> object:
            axis = self.resolve(axis)
            if self.still(axis):
                return axis.size
            if axis.kind is Kind.ATOM:
                return axis.kind, numbers.setdefault(axis, len(numbers))
            index = None if axis.index is None else numbers.setdefault(axis.index.find(), len(numbers))
            return axis.kind, index, tuple(said(child) for child in axis.children)

        return [said(axis) for axis in axes]

    def contains_family(self, axis: Axis) -> bool:
        """Whether there is a family anywhere in an axis."""
        axis = self.resolve(axis)
        if axis.kind is Kind.ATOM or not self.has_families:
            return False
        if axis.kind is Kind.FAMILY:
            return True
        known = self._contains.get(axis)
        if known is None or known[0] != self.changes:
            known = self._contains[axis] = self.changes, any(map(self.contains_family, axis.children))
        return known[1]

    def families_within_themselves(self, axis: Axis) -> Iterator[Axis]:
        """The families one of whose members has a sum of the very index by which they are told apart.

        Two sums have become one there, as where channels are shuffled again and again: which of the two places says
        which member is meant is then not known.
        """
        if not self.contains_family(axis):
            return
        axis = self.resolve(axis)
        for child in axis.children:
            yield from self.families_within_themselves(child)
        if axis.kind is Kind.FAMILY and axis.index is not None and self._has_sum(axis.children, axis.index.find()):
            yield axis

    def _has_sum(self, axes: Iterable[Axis], index: Index) -> bool:
        stack = list(axes)
        while stack:
            axis = self.resolve(stack.pop())
            if axis.kind is Kind.SUM and axis.index is not None and axis.index.find() is index:
                return True
            stack.extend(axis.children)
        return False

    def same(self, a: Axis, b: Axis) -> bool:
        """Whether two axes are the same type, structure and atoms alike."""
        a, b = self.resolve(a), self.resolve(b)
        if a is b:
            return True
        if a.kind is not b.kind or a.size != b.size or a.kind is Kind.ATOM:
            return False
        if a.kind is Kind.FAMILY and a.index and b.index and a.index.find() is not b.index.find():
            return False
        left, right = (self.parts(a), self.parts(b)) if a.kind is Kind.SUM else (a.children, b.children)
        return len(left) == len(right) and all(map(self.same, left, right))

    def _normal_product(self, axis: Axis) -> Axis:
        factors: list[Axis] = []
        for child in axis.children:
            factors.extend(f for f in self.factors(child) if f.size != 1)
        for i in range(len(factors) - 2, -1, -1):
            if factors[i].kind is Kind.SUM:
                factors[i:] = [self._distribute(factors[i], factors[i + 1 :])]
        if len(factors) < 2:
            normal = factors[0] if factors else self.one
        elif len(factors) == len(axis.children) and all(f is c for f, c in zip(factors, axis.children, strict=True)):
            axis.stamp = self.changes
            return axis
        else:
            normal = self._intern(Kind.PRODUCT, axis.size, factors)
        if normal is axis:
            axis.stamp = self.changes
            return axis
        self.link(axis, normal)
        normal.stamp = self.changes
        return normal

    def _distribute(self, outer: Axis, rest: Sequence[Axis]) -> Axis:
        assert outer.index is not None
        index = outer.index.find()
        parts = [
            self.product([part, *(self.restrict(factor, {index: i}) for factor in rest)])
            for i, part in enumerate(outer.children)
        ]
        return self.sum(parts, index)

    @staticmethod
    def link(axis: Axis, other: Axis) -> None:
        """Let one node stand for another; by way of their roots, for either may have been bound in between."""
        a, b = axis.find(), other.find()
        if a is not b:
            a.link = b

    def too_intricate(self) -> Pinned:
        return Pinned(TOO_INTRICATE, self.scope)

    # -- constraints and refinements, each a function of the axes in a file of its own ---------------------------------

    pin = constraints.pin
    unify = constraints.unify
    collapse = constraints.collapse
    split = refine.split
    slice = refine.slice_
    restrict = refine.restrict
