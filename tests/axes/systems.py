"""Small systems of constraints on permutations: solved by the algebra, and by brute force.

Each slot of a system is one permutation. A constraint says that two are equal, that a product of some is a product of
others (a view), that one maps a range to itself as another says (a slice), is a concatenation, or the identity.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from permgraph.algebra import Axes, Axis, Index, Kind, Pinned
from permgraph.rules.typed_tensor import loose_families

Perm = tuple[int, ...]
Element = tuple[Perm, ...]


@dataclass(frozen=True)
class Tie:
    a: int
    b: int

    def impose(self, axes: Axes, slots: Sequence[Axis], index: Index) -> None:
        axes.unify(slots[self.a], slots[self.b])

    def holds(self, element: Element) -> bool:
        return element[self.a] == element[self.b]


@dataclass(frozen=True)
class View:
    """The row-major product of some slots is that of others."""

    left: tuple[int, ...]
    right: tuple[int, ...]

    def impose(self, axes: Axes, slots: Sequence[Axis], index: Index) -> None:
        merged = axes.product([slots[i] for i in self.left])
        for factor, i in zip(axes.split(merged, [slots[i].size for i in self.right]), self.right, strict=True):
            axes.unify(slots[i], factor)

    def holds(self, element: Element) -> bool:
        return product([element[i] for i in self.left]) == product([element[i] for i in self.right])


@dataclass(frozen=True)
class Slice:
    """A range of one slot is another slot; what stands before the range and behind it is not mixed."""

    whole: int
    start: int
    part: int

    def impose(self, axes: Axes, slots: Sequence[Axis], index: Index) -> None:
        end = self.start + slots[self.part].size
        axes.unify(slots[self.part], axes.slice(slots[self.whole], self.start, end)[0])

    def holds(self, element: Element) -> bool:
        part = element[self.part]
        whole = element[self.whole]
        cut = whole[self.start : self.start + len(part)] == tuple(self.start + i for i in part)
        return cut and all(i < self.start for i in whole[: self.start])


@dataclass(frozen=True)
class Join:
    """One slot is a concatenation of others."""

    parts: tuple[int, ...]
    whole: int

    def impose(self, axes: Axes, slots: Sequence[Axis], index: Index) -> None:
        axes.unify(slots[self.whole], axes.sum([slots[i] for i in self.parts], index))

    def holds(self, element: Element) -> bool:
        return element[self.whole] == concatenation([element[i] for i in self.parts])


@dataclass(frozen=True)
class Pin:
    slot: int

    def impose(self, axes: Axes, slots: Sequence[Axis], index: Index) -> None:
        axes.pin(slots[self.slot], Pinned("by the test"))

    def holds(self, element: Element) -> bool:
        return element[self.slot] == tuple(range(len(element[self.slot])))


Constraint = Tie | View | Slice | Join | Pin


def product(perms: Sequence[Perm]) -> Perm:
    """Of permutations, row-major."""
    found: Perm = (0,)
    for perm in perms:
        found = tuple(i * len(perm) + j for i in found for j in perm)
    return found


def concatenation(perms: Sequence[Perm]) -> Perm:
    found: list[int] = []
    for perm in perms:
        start = len(found)
        found.extend(start + i for i in perm)
    return tuple(found)


# -- by the algebra --------------------------------------------------------------------------------------------------


@dataclass
class Solved:
    axes: Axes
    slots: list[Axis]
    indices: dict[Constraint, Index]

    def impose(self, constraints: Sequence[Constraint]) -> None:
        for number, constraint in enumerate(constraints):
            self.axes.start_node(number)
            constraint.impose(self.axes, self.slots, self.indices.setdefault(constraint, Index()))

    def text(self) -> str:
        """Every slot's type, atoms numbered by first appearance: equal exactly for equal structure and sharing."""
        numbers: dict[Axis, int] = {}
        return " ; ".join(self._text(slot, numbers) for slot in self.slots)

    def _text(self, axis: Axis, numbers: dict[Axis, int]) -> str:
        axis = self.axes.resolve(axis)
        if axis.kind is Kind.ATOM:
            return (
                f".{axis.size}"
                if axis.pinned or axis.size == 1
                else f"{numbers.setdefault(axis, len(numbers))}:{axis.size}"
            )
        if all(atom.pinned for atom in self.axes.atoms(axis)):
            return f".{axis.size}"  # in how many pieces does not matter
        if axis.kind is Kind.PRODUCT:
            factors = merged([self._text(f, numbers) for f in self.axes.factors(axis)], operator.mul)
            return f"({' '.join(factors)})"
        assert axis.kind is Kind.SUM, "a slot by itself cannot be a family"
        parts = [self._text(part, numbers) for part in self.axes.parts(axis)]
        parts = merged(parts, operator.add)
        return parts[0] if len(parts) == 1 else f"[{' + '.join(parts)}]"

    def atoms(self) -> list[Axis]:
        return list(dict.fromkeys(a for slot in self.slots for a in self.axes.atoms(slot) if a.pinned is None))

    def elements(self) -> Iterator[Element]:
        """All elements of the group."""
        atoms = self.atoms()
        for perms in itertools.product(*(itertools.permutations(range(a.size)) for a in atoms)):
            chosen = dict(zip(atoms, perms, strict=True))
            yield tuple(self._act(slot, chosen.get) for slot in self.slots)

    def _act(self, axis: Axis, chosen: Callable[[Axis], Perm | None]) -> Perm:
        axis = self.axes.resolve(axis)
        if axis.kind is Kind.ATOM:
            return chosen(axis) or tuple(range(axis.size))
        if axis.kind is Kind.PRODUCT:
            return product([self._act(f, chosen) for f in self.axes.factors(axis)])
        return concatenation([self._act(part, chosen) for part in self.axes.parts(axis)])

    def gave_up(self) -> bool:
        """Whether something was pinned because the algebra has no word for it."""
        atoms = (a for slot in self.slots for a in self.axes.atoms(slot))
        reasons = [a.pinned.reason for a in atoms if a.pinned is not None]
        return any("no product refines" in reason or "ever new places" in reason for reason in reasons)


def merged(parts: Sequence[str], combine: Callable[[int, int], int]) -> list[str]:
    """Neighbouring parts or factors that stay put are one."""
    found: list[str] = []
    for part in parts:
        if part.startswith(".") and found and found[-1].startswith("."):
            found[-1] = f".{combine(int(found[-1][1:]), int(part[1:]))}"
        else:
            found.append(part)
    return found


def solve(sizes: Sequence[int], constraints: Sequence[Constraint], limit: int = 30) -> Solved:
    """Impose the constraints over and over until nothing changes, as the solver does."""
    axes = Axes()
    solved = Solved(axes, [axes.atom(size) for size in sizes], {})
    for visit in range(limit):
        axes.may_cut = visit < limit // 2
        before = axes.changes
        solved.impose(constraints)
        for slot in solved.slots:  # a slot by itself has no other axis that could say which member is meant
            for family, _ in list(loose_families(axes, slot)):
                axes.collapse(family)
        if axes.changes == before:
            return solved
    raise AssertionError(f"no fixed point after {limit} rounds")


# -- by brute force --------------------------------------------------------------------------------------------------


def brute_force(sizes: Sequence[int], constraints: Sequence[Constraint]) -> set[Element]:
    candidates = itertools.product(*(itertools.permutations(range(size)) for size in sizes))
    return {element for element in candidates if all(c.holds(element) for c in constraints)}


@st.composite
def systems(draw: st.DrawFn, most: int = 4, largest: int = 30_000) -> tuple[list[int], list[Constraint]]:
    """Slots so small that brute force can try everything, and constraints that fit their sizes."""
    sizes = draw(
        st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=4).filter(
            lambda s: math.prod(map(math.factorial, s)) <= largest
        )
    )
    numbers = range(len(sizes))
    groups = [g for n in (1, 2) for g in itertools.permutations(numbers, n)]
    possible: list[Constraint] = [Pin(i) for i in numbers]
    possible += [Tie(a, b) for a, b in itertools.combinations(numbers, 2) if sizes[a] == sizes[b]]
    possible += [
        View(a, b)
        for a, b in itertools.product(groups, groups)
        if a != b and math.prod(sizes[i] for i in a) == math.prod(sizes[i] for i in b) and len(a) + len(b) > 2
    ]
    possible += [
        Slice(whole, start, part)
        for whole, part in itertools.permutations(numbers, 2)
        for start in range(sizes[whole] - sizes[part] + 1)
        if sizes[part] < sizes[whole]
    ]
    possible += [
        Join(parts, whole)
        for parts in groups
        for whole in numbers
        if len(parts) == 2 and whole not in parts and sum(sizes[i] for i in parts) == sizes[whole]
    ]
    return sizes, draw(st.lists(st.sampled_from(possible), min_size=1, max_size=most, unique=True))
