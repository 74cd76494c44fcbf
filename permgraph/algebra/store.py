"""The axis algebra: what is known of a dimension, as a type that unification refines.

An axis is one of

- an *atom* of n indices that nothing distinguishes so far; pinned, with a reason, once something does;
- a *product*, the row-major flattening of its factors: ``(head channel)``, ``(C 7 7)``;
- a *sum*, the concatenation of its parts: what `cat`, `chunk` and slices make and see;
- a *family* over a sum: the axis is ``members[i]`` wherever the index into that sum lies in part i. The query, key
  and value of a fused projection are families over the axis of three from which they are selected.

Unifying two axes says that every permutation of one must be made on the other. Atoms are union-find nodes, so a
refinement found at the last layer is seen at the first. Every operation is *monotone*: it only ever ties axes
together, cuts them or pins them. Hence the order of constraints does not matter to what a type comes to stand for, and
running all of them again until nothing changes is a fixed point.

Three normal forms keep types comparable. A sum that is followed by other factors is distributed over them,
``([a + b] c)`` becoming ``[(a c) + (b c)]``; a family whose members have become the same axis is that axis; and a sum
of pinned parts is one pinned atom.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from permgraph.errors import ConflictError

TOO_INTRICATE = "its axes are cut in too intricate a way to follow"

MAX_DEPTH = 64
"""How many refinements may need one another: in a network that skews nothing up to 23 do (in Longformer)."""

MAX_NESTING = 160
"""How deep types may be: each concatenation of one with something else adds to that."""

MAX_SKEW = 8
"""How often rows may be cut off the joints of a concatenation within one another: a matrix that is padded and viewed
with longer rows, so that each is shifted against the one before, would be cut once more for every row."""


class TooIntricateError(ConflictError):
    """Types would be nested, or refinements need one another, beyond a limit: a padded matrix was skewed too often.

    The limits are counted here rather than left to Python's own, which is met the sooner the deeper the caller's stack.
    """


class Kind(Enum):
    """The four forms that an axis can take."""

    ATOM = "atom"
    PRODUCT = "product"
    SUM = "sum"
    FAMILY = "family"

    __hash__ = object.__hash__  # not that of its name, which Python code computes: types are looked up by their form


class Index:
    """Identity of a sum's list of parts, by which families refer to it; merged by union-find, into the older one."""

    __slots__ = ("age", "link")
    _ages = itertools.count()

    def __init__(self) -> None:
        self.age = next(Index._ages)
        self.link: Index | None = None

    def find(self) -> Index:
        root = self
        while root.link is not None:
            root = root.link
        return root


@dataclass(frozen=True)
class Pinned:
    """Why an axis must stay put, and the number of the graph node whose rule said so (-1: none)."""

    reason: str
    node: int = -1


class Axis:
    """A node of the type graph. Read it through `Axes.resolve`, never directly: it may have been bound since."""

    __slots__ = ("children", "index", "kind", "link", "nesting", "pinned", "size", "stamp")

    def __init__(
        self,
        kind: Kind,
        size: int,
        children: tuple[Axis, ...] = (),
        index: Index | None = None,
        pinned: Pinned | None = None,
    ) -> None:
        self.kind = kind
        self.size = size
        self.children = children
        self.index = index
        self.nesting: int = 1 + max([child.nesting for child in children]) if children else 0
        self.pinned = pinned
        self.link: Axis | None = None
        self.stamp = -1

    def find(self) -> Axis:
        root = self
        while root.link is not None:
            root = root.link
        while self.link is not None and self.link is not root:
            self.link, self = root, self.link
        return root

    def __repr__(self) -> str:
        return show(self)


# What selecting part of one axis does to the other axes of the same tensor: families over an index become the member
# of that part (an int), or families over a shorter sum (its index, and the parts that are left).
Restriction = Mapping[Index, "int | tuple[Index, tuple[int, ...]]"]
BirthKey = tuple[object, ...]


def show(axis: Axis) -> str:
    """A short text of a type, for error messages and debugging: atoms as ``a3`` or ``.3`` (pinned) by size."""
    axis = axis.find()
    inner = [show(child) for child in axis.children]
    if axis.kind is Kind.ATOM:
        return f"{'.' if axis.pinned else 'a'}{axis.size}"
    if axis.kind is Kind.PRODUCT:
        return f"({' '.join(inner)})"
    if axis.kind is Kind.SUM:
        return f"[{' + '.join(inner)}]"
    return f"{{{' | '.join(inner)}}}"


class Axes:
    """The solver: makes axes, refines them and ties them together.

    `cuts` says, for factors that an earlier run saw being cut, where: such a factor is made as a sum from the start,
    and the factors beside it as families over it. That is how the head channels of a fused query-key-value projection
    come to be three axes rather than one, although the cut is met only after the view that made them.
    """

    def __init__(self, cuts: Mapping[BirthKey, tuple[int, ...]] | None = None) -> None:
        self.cuts = dict(cuts or {})
        self.changes = 0
        self.scope: int = -1  # the graph node whose rule is running
        self.has_families = False
        self.may_cut = True  # False: axes are pinned where they would be cut, so that a run comes to an end
        self.one = Axis(Kind.ATOM, 1)
        self.empty = Axis(Kind.ATOM, 0)
        self._births: list[tuple[BirthKey, Axis]] = []
        self._born_in_scope: dict[BirthKey, int] = {}
        self._depth = 0  # how many refinements are being made, each for the sake of the one before
        self._skew = 0  # how many concatenations are being split, each off its joints, within one another
        self._splits: dict[tuple[object, ...], list[Axis]] = {}
        self._slices: dict[tuple[Axis, int, int], tuple[Axis, Restriction]] = {}
        self._interned: dict[tuple[Kind, Index | None, tuple[Axis, ...]], Axis] = {}
        self._opaque: set[Axis] = set()  # pinned atoms that were seen as products which have no common refinement
        self._pinned_sums: dict[Axis, Axis] = {}
        self._contains: dict[Axis, tuple[int, bool]] = {}
        self._family_indices: set[Index] = set()

    # -- making axes ---------------------------------------------------------------------------------------------

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

    # -- reading axes --------------------------------------------------------------------------------------------

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
                self._link(axis, members[0])
                return self.resolve(members[0])
        if axis.kind is Kind.SUM:
            parts: list[Axis] = []
            for child in axis.children:  # a comprehension would take one more frame of Python's stack at each level
                parts.append(self.resolve(child))
            still = all(p.kind is Kind.ATOM and (p.pinned or p.size == 1) for p in parts)
            if still and (axis.size > len(parts) or not (self.may_cut or self._tells_members(axis))):
                why = next((p.pinned for p in parts if p.pinned), Pinned("cut at ever new places", self.scope))
                self._link(axis, self._pinned_sums.setdefault(axis, self.pinned(axis.size, why)))
                return axis.find()
        axis.stamp = self.changes
        return axis

    def _tells_members(self, total: Axis) -> bool:
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
        self._link(axis, normal)
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

    def restrict(self, axis: Axis, restriction: Restriction) -> Axis:
        """The axis as seen where another axis of its tensor was restricted to some of its parts."""
        axis = self.resolve(axis)
        if not restriction or axis.kind is Kind.ATOM:
            return axis
        children = [self.restrict(child, restriction) for child in axis.children]
        if axis.kind is Kind.FAMILY:
            assert axis.index is not None
            for index, kept in restriction.items():
                if index.find() is axis.index.find():
                    if isinstance(kept, int):
                        return children[kept]
                    return self.family(kept[0], [children[i] for i in kept[1]])
        if all(new is old for new, old in zip(children, axis.children, strict=True)):
            return axis
        if axis.kind is Kind.PRODUCT:
            return self.product(children)
        if axis.kind is Kind.SUM:
            return self.sum(children, axis.index)
        assert axis.index is not None
        return self.family(axis.index, children)

    # -- constraints ---------------------------------------------------------------------------------------------

    def pin(self, axis: Axis, why: Pinned) -> None:
        """Say that the axis must stay put."""
        for atom in list(self.atoms(axis)):
            if atom.pinned is None:
                atom.pinned = why
                self.changes += 1

    def collapse(self, family: Axis) -> None:
        """Tie the members of a family together: it stands where nothing says which member is meant."""
        members = family.find().children
        if len({member.size for member in members}) > 1:  # rows of a skewed matrix were taken for parts of one axis
            for member in members:
                self.pin(member, self._too_intricate())
            return
        for member in members[1:]:
            self.unify(members[0], member)

    def unify(self, a: Axis, b: Axis) -> None:
        """Say that whatever permutes one axis permutes the other alike.

        Raises `ConflictError` when the sizes differ.
        """
        a, b = self.resolve(a), self.resolve(b)
        if a is b or a.size == b.size < 2:
            return
        if a.size != b.size:
            raise ConflictError(f"cannot tie an axis of {a.size} {show(a)} to one of {b.size} {show(b)}")
        if b.kind is Kind.ATOM:
            a, b = b, a
        if a.kind is Kind.ATOM:
            self._bind(a, b)
            return
        if a.kind is Kind.SUM and b.kind is Kind.SUM and [c.size for c in a.children] == [c.size for c in b.children]:
            self._merge_indices(a, b)
        if not self.same(a, b):
            try:
                with self._deeper():
                    self._unify_composites(a, b)
            except TooIntricateError:
                if self._depth:
                    raise
                self.pin(a, self._too_intricate())
                self.pin(b, self._too_intricate())
        a, b = self.resolve(a), self.resolve(b)
        if a is not b and a.kind is b.kind and len(a.children) == len(b.children) and self.same(a, b):
            self._link(a, b)

    def _bind(self, atom: Axis, other: Axis) -> None:
        if atom.pinned is not None:
            self.pin(other, atom.pinned)
        if atom in self._opaque:
            if other.kind is not Kind.ATOM:
                return
            atom, other = other, atom
        if other.kind is Kind.FAMILY and self._is_member(atom, other):
            self.collapse(other)
            return
        self._link(atom, other)
        self.changes += 1

    @staticmethod
    def _link(axis: Axis, other: Axis) -> None:
        """Let one node stand for another; by way of their roots, for either may have been bound in between."""
        a, b = axis.find(), other.find()
        if a is not b:
            a.link = b

    def _is_member(self, atom: Axis, family: Axis) -> bool:
        members = [self.resolve(child) for child in family.children]
        return any(m is atom or (m.kind is Kind.FAMILY and self._is_member(atom, m)) for m in members)

    def _unify_composites(self, a: Axis, b: Axis) -> None:
        if a.kind is Kind.FAMILY or b.kind is Kind.FAMILY:
            if b.kind is not Kind.FAMILY:
                a, b = b, a
            if a.kind is Kind.FAMILY:
                assert a.index is not None and b.index is not None
                if a.index.find() is b.index.find() and len(a.children) == len(b.children):
                    for x, y in zip(a.children, b.children, strict=True):
                        self.unify(x, y)
                else:
                    self.collapse(a)
                    self.collapse(b)
                    self.unify(a, b)
            elif a.kind is Kind.PRODUCT:
                self._unify_each(self.split(b, [f.size for f in a.children]), a.children)
            else:
                self._unify_slices(b, a)
        elif a.kind is Kind.SUM and b.kind is Kind.SUM:
            self._unify_sums(a, b)
        elif a.kind is Kind.PRODUCT and b.kind is Kind.PRODUCT:
            self._unify_each(self.split(a, [f.size for f in b.children]), b.children)
        else:
            total, product = (a, b) if a.kind is Kind.SUM else (b, a)
            head, tail = product.children[0], product.children[1:]
            outer, inner = self.split(total, [head.size, product.size // head.size])
            self.unify(outer, head)
            self.unify(inner, self.product(tail))

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        """One refinement within another; the outermost pins its axes where this refuses."""
        if self._depth == MAX_DEPTH:
            raise TooIntricateError(f"{MAX_DEPTH} refinements for the sake of one another")
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def _too_intricate(self) -> Pinned:
        return Pinned(TOO_INTRICATE, self.scope)

    def _unify_each(self, left: Sequence[Axis], right: Sequence[Axis]) -> None:
        for x, y in zip(left, right, strict=True):
            self.unify(x, y)

    def _unify_slices(self, axis: Axis, total: Axis) -> None:
        start = 0
        for part in total.children:
            self.unify(self.slice(axis, start, start + part.size)[0], part)
            start += part.size

    def _unify_sums(self, a: Axis, b: Axis) -> None:
        if [c.size for c in a.children] == [c.size for c in b.children]:
            self._unify_each(a.children, b.children)
        else:
            self._unify_slices(a, b)

    def _merge_indices(self, a: Axis, b: Axis) -> None:
        assert a.index is not None and b.index is not None
        older, younger = sorted((a.index.find(), b.index.find()), key=lambda index: index.age)
        if older is not younger:
            younger.link = older
            self.changes += 1

    # -- refinement ----------------------------------------------------------------------------------------------

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Write the axis as a product of factors of these sizes (outermost first), refining it where need be.

        What no common refinement of two products can express (4·6 against 6·4 beyond their common outer 2) is pinned.
        """
        if math.prod(sizes) != axis.size:
            raise ConflictError(f"cannot view an axis of {axis.size} {show(axis)} as {'x'.join(map(str, sizes))}")
        wanted = [size for size in sizes if size != 1]
        if axis.size == 0:  # nothing is known of factors beside one without an index
            return self._splits.setdefault((self.scope, *sizes), [self.atom(size) for size in sizes])
        if axis.size == 1:
            found: list[Axis] = []
        elif len(wanted) == 1:
            found = [self.resolve(axis)]
        else:
            try:
                with self._deeper():
                    found = self._split(self.resolve(axis), wanted)
            except TooIntricateError:
                if self._depth:
                    raise
                found = self._split(self._made_opaque(axis, self._too_intricate()), wanted)
        remaining = iter(found)
        return [self.one if size == 1 else next(remaining) for size in sizes]

    def _split(self, axis: Axis, sizes: list[int]) -> list[Axis]:
        if axis in self._opaque:
            assert axis.pinned is not None
            return self._splits.setdefault((axis, *sizes), [self.pinned(size, axis.pinned) for size in sizes])
        if axis.kind is Kind.ATOM:
            factors = self._split_atom(axis, sizes)
            self._link(axis, self.product(factors))
            self.changes += 1
            return factors
        if axis.kind is Kind.PRODUCT:
            return self._split_product(axis, sizes)
        if axis.kind is Kind.SUM:
            outer, inner = self._split_sum(axis, sizes[0], axis.size // sizes[0])
            return [outer, *self.split(inner, sizes[1:])]
        assert axis.index is not None
        columns = zip(*(self.split(member, sizes) for member in axis.children), strict=True)
        return [self.family(axis.index, column) for column in columns]

    def _split_atom(self, axis: Axis, sizes: list[int]) -> list[Axis]:
        if axis.pinned is not None:
            return [self.pinned(size, axis.pinned) for size in sizes]
        shape = (self.scope, axis.size, tuple(sizes))
        again = self._born_in_scope[shape] = self._born_in_scope.get(shape, -1) + 1
        return self.born((*shape, again), sizes)

    def born(self, name: BirthKey, sizes: Sequence[int]) -> list[Axis]:
        """New axes that stand side by side, known by a name: where one was cut in an earlier run, it is a sum now."""
        keys = [(*name, position) for position in range(len(sizes))]
        outers: list[Axis] = []
        cut = []
        for key, size in zip(keys, sizes, strict=True):
            cut.append(self._born_cut(key, size, outers))  # its parts differ from part to part of those before it
            outers += [axis for axis in cut[-1:] if axis is not None]
        result = [axis or self._family_of_atoms(size, outers) for axis, size in zip(cut, sizes, strict=True)]
        self._births.extend(zip(keys, result, strict=True))
        return result

    def _born_cut(self, key: BirthKey, size: int, outers: Sequence[Axis]) -> Axis | None:
        points = self.cuts.get(key)
        if points is None:
            return None
        bounds = [0, *points, size]
        return self.sum([self._family_of_atoms(end - start, outers) for start, end in itertools.pairwise(bounds)])

    def _family_of_atoms(self, size: int, outers: Sequence[Axis]) -> Axis:
        if not outers:
            return self.atom(size)
        outer, rest = outers[0], outers[1:]
        assert outer.index is not None
        return self.family(outer.index, [self._family_of_atoms(size, rest) for _ in outer.children])

    def _split_product(self, axis: Axis, sizes: list[int]) -> list[Axis]:
        queue = self.factors(axis)
        found = []
        for size in sizes:
            taken: list[Axis] = []
            need = size
            while need > 1:
                factor = self.resolve(queue.pop(0))
                if factor.kind is Kind.PRODUCT:
                    queue[:0] = factor.children
                    continue
                common = math.gcd(need, factor.size)
                if common == 1:
                    return self._unsplittable(axis, sizes)
                if common < factor.size:
                    factor, left = self.split(factor, [common, factor.size // common])
                    queue.insert(0, left)
                taken.append(factor)
                need //= common
            found.append(self.product(taken))
        return found

    def _unsplittable(self, axis: Axis, sizes: list[int]) -> list[Axis]:
        """Pin an axis that is viewed in a way which these types cannot express."""
        shape = "x".join(map(str, sizes))
        why = Pinned(f"{show(axis)[:80]} was viewed as {shape}, which no product refines", self.scope)
        return self._split(self._made_opaque(axis, why), sizes)

    def _made_opaque(self, axis: Axis, why: Pinned) -> Axis:
        """Pin an axis, and forget what it was made of."""
        self.pin(axis, why)
        opaque = self.pinned(axis.size, why)
        self._opaque.add(opaque)
        self._link(axis, opaque)
        self.changes += 1
        return opaque

    def _split_sum(self, axis: Axis, outer: int, inner: int) -> list[Axis]:
        """Rows and columns of a concatenation: rows are cut at its joints, and columns differ from row to row."""
        key = (axis, outer, inner)
        if key in self._splits:
            return self._splits[key]
        joints, at = [], 0
        for part in axis.children[:-1]:
            at += part.size
            joints.append(at)
        aligned = all(joint % inner == 0 for joint in joints)
        if not aligned and self._skew >= MAX_SKEW:
            return self._unsplittable(axis, [outer, inner])
        rows = sorted({0, outer} | {row for j in joints for row in (j // inner, -(-j // inner))})
        heads, columns = [], []
        self._skew += not aligned
        try:
            for start, end in itertools.pairwise(rows):
                piece, _ = self.slice(axis, start * inner, end * inner)
                head, column = self.split(piece, [end - start, inner])
                heads.append(head)
                columns.append(column)
        finally:
            self._skew -= not aligned
        total = self.resolve(self.sum(heads, axis.index if aligned else None))
        if total.index is None:  # all of it is pinned: nothing tells the rows apart any more
            for column in columns[1:]:
                self.unify(columns[0], column)
            result = [total, columns[0]]
        else:
            result = [total, self.family(total.index, columns)]
        self._splits[key] = result
        return result

    def slice(self, axis: Axis, start: int, end: int) -> tuple[Axis, Restriction]:
        """Indices start..end of the axis, cutting it there; and what that says to the tensor's other axes."""
        axis = self.resolve(axis)
        if not 0 <= start <= end <= axis.size:
            raise ConflictError(f"cannot take {start}:{end} of an axis of {axis.size} {show(axis)}")
        if start == end:
            return self.empty, {}
        if (start, end) == (0, axis.size):
            return axis, {}
        if axis.kind is Kind.ATOM:
            if not self.may_cut:
                self.pin(axis, Pinned("cut at ever new places", self.scope))
            if axis.pinned is not None:
                if (axis, start, end) not in self._slices:
                    self._slices[axis, start, end] = self.pinned(end - start, axis.pinned), {}
                return self._slices[axis, start, end]
            bounds = sorted({0, start, end, axis.size})
            parts = [self.atom(stop - begin) for begin, stop in itertools.pairwise(bounds)]
            self._link(axis, self.sum(parts))
            self.changes += 1
            return self.slice(axis, start, end)
        try:
            with self._deeper():
                if axis.kind is Kind.SUM:
                    return self._slice_sum(axis, start, end)
                if axis.kind is Kind.PRODUCT:
                    return self._slice_product(axis, start, end)
                assert axis.index is not None
                return self.family(axis.index, [self.slice(member, start, end)[0] for member in axis.children]), {}
        except TooIntricateError:
            if self._depth:
                raise
            return self.slice(self._made_opaque(axis, self._too_intricate()), start, end)

    def _slice_sum(self, axis: Axis, start: int, end: int) -> tuple[Axis, Restriction]:
        assert axis.index is not None
        key = (axis, start, end)
        if key in self._slices:
            return self._slices[key]
        pieces, kept, at = [], [], 0
        for i, part in enumerate(axis.children):
            low, high = max(start - at, 0), min(end - at, part.size)
            if low < high:
                if start >= at and end <= at + part.size:  # inside one part: go on in it
                    piece, restriction = self.slice(part, low, high)
                    return piece, {axis.index.find(): i, **restriction}
                pieces.append(self.slice(part, low, high)[0])
                kept.append(i)
            at += part.size
        total = self.resolve(self.sum(pieces))
        self._slices[key] = total, {} if total.index is None else {axis.index.find(): (total.index, tuple(kept))}
        return self._slices[key]

    def _slice_product(self, axis: Axis, start: int, end: int) -> tuple[Axis, Restriction]:
        factors = self.factors(axis)
        head, inner = factors[0], axis.size // factors[0].size
        first, last = start // inner, -(-end // inner)
        if start % inner == 0 and end % inner == 0:
            rows, restriction = self.slice(head, first, last)
            rest = [self.restrict(factor, restriction) for factor in factors[1:]]
            return self.product([rows, *rest]), restriction
        if last - first == 1:
            _, restriction = self.slice(head, first, last)
            column = self.product([self.restrict(factor, restriction) for factor in factors[1:]])
            piece, more = self.slice(column, start - first * inner, end - first * inner)
            return piece, {**restriction, **more}
        key = (axis, start, end)
        if key not in self._slices:
            joints = sorted({start, -(-start // inner) * inner, end // inner * inner, end})
            pieces = [self.slice(axis, low, high)[0] for low, high in itertools.pairwise(joints)]
            self._slices[key] = self.sum(pieces), {}
        return self._slices[key]

    # -- what a later run should know ------------------------------------------------------------------------------

    def begin(self, scope: int) -> None:
        """Start (again) on the constraints of one graph node: births are numbered afresh."""
        self.scope = scope
        self._born_in_scope = {}

    def cuts_seen(self, *, within: bool = False) -> dict[BirthKey, tuple[int, ...]]:
        """Where factors that a split made have been cut since, for a second run to make them so from the start.

        With `within`, what was cut in any member of a family counts as cut in all of them.
        """
        seen = dict(self.cuts)
        for key, axis in self._births:
            points = self._points(axis, within)
            if points:
                seen[key] = tuple(sorted(points | set(seen.get(key, ()))))
        return seen

    def _points(self, axis: Axis, within: bool) -> set[int]:
        axis = self.resolve(axis)
        if within and axis.kind is Kind.FAMILY:
            return set().union(*(self._points(member, within) for member in axis.children))
        sizes = [part.size for part in self.parts(axis)] if axis.kind is Kind.SUM else []
        return {sum(sizes[:i]) for i in range(1, len(sizes))}
