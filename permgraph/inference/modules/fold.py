"""Families of modules written into a spec: k modules become one, whose tensors have k as their first dimension.

The groups inside the first module become groups fibred over that of the modules, and stand for those of all; where
parts of other weights change places along, ``[a + b + c]`` becomes ``(modules a)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from permgraph.errors import SpecError
from permgraph.inference.modules.families import Family, Found
from permgraph.inference.modules.moves import IntArray, Refused
from permgraph.inference.modules.structures import Folding
from permgraph.spec.binding import Group
from permgraph.spec.expressions import Axis, Fixed, Product, Ref, Sum, children, refs, rename, size_of
from permgraph.spec.provenance import Pin, Refusal, Unread
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.stacks import Names, dimensions
from permgraph.structures import Structure

Entry = TypeVar("Entry", Pin, Unread)

MOST_REFUSALS = 200
"""So many reasons why modules do not change places are kept with a spec."""

LONGEST = 32
"""Letters that the words of several modules may have together, to stand in the name of their group."""


def fold(spec: PermutationSpec, found: Found) -> PermutationSpec:
    """The same spec with groups of modules, and a note for each family that it cannot hold."""
    if not found.families and not found.refused:
        return spec
    inside: dict[str, str] = {}  # for the name of a weight of an outer family's first module, that of its stack
    notes, refusals = [], found.refusals()
    for family in found.families:
        try:
            spec = _Fold(spec, family, inside).folded()
        except Refused as refused:
            first, second = (", ".join(member[:1]) for member in family.members[:2])
            notes.append(f"the modules of {first} and {second} could change places, but stay put: {refused}")
            refusals += [
                Refusal(f"the spec cannot say so: {refused}", names) for names in zip(*family.members, strict=True)
            ]
    known = [r for r in refusals if all(name in spec.tensors for name in r.parameters)]
    return replace(spec, notes=(*spec.notes, *notes), refusals=tuple(known[:MOST_REFUSALS]))


@dataclass
class _Fold:
    """One family, and the spec that it is written into.

    Attributes:
        renamed: for each module, the names of its groups by those of the first one's.
        parents: what a group is fibred over, where that is more in some modules than in others.
    """

    spec: PermutationSpec
    family: Family
    inside: dict[str, str]
    renamed: list[dict[str, str]] = field(default_factory=list)
    parents: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def folded(self) -> PermutationSpec:
        """The spec with this family.

        Raises Refused where it cannot hold it.
        """
        spec = self.spec
        members = [[self.inside.get(name, name) for name in member] for member in self.family.members]
        first = members[0]
        missing = [name for member in members for name in member if name not in spec.axes]
        if missing:
            raise Refused(f"the spec says nothing of {missing[0]}")
        tied = {*spec.aliases.values()}.intersection(name for member in members for name in member)
        if tied:
            raise Refused(f"{min(tied)} has several names")
        self.renamed = [{} for _ in members]
        for number, member in enumerate(members):
            for name, other in zip(first, member, strict=True):
                for mine, its in zip(spec.axes[name], spec.axes[other], strict=True):
                    self._match(mine, its, number)
        blocks = {(self.inside.get(n, n), d + self._depth(n)): parts for (n, d), parts in self.family.blocks.items()}
        self._inner_names(blocks)
        own = self._own_groups()
        depth = min(len(dimensions(spec.stacks[name])) if name in spec.stacks else 0 for name in first)
        above = [axis.group for axis in spec.axes[first[0]][:depth] if isinstance(axis, Ref)]
        modules = self._name(members)
        axes = dict(spec.axes)
        for (name, dim), parts in blocks.items():
            changed = list(axes[name])
            changed[dim] = self._with_blocks(changed[dim], parts, modules)
            axes[name] = tuple(changed)
        stacks, folded, shapes = dict(spec.stacks), {}, dict(spec.shapes)
        stack_names: dict[str, str] = {}
        for i, name in enumerate(first):
            stack_names[name] = self._stack_name([member[i] for member in members], stack_names.values())
        for i, name in enumerate(first):
            parts_of = [member[i] for member in members]
            stacks[stack_names[name]] = _stacked([stacks.pop(part, part) for part in parts_of], depth)
            lead = spec.axes[name][:depth]
            folded[name] = (*lead, Ref(modules), *axes[name][depth:])
            shapes[stack_names[name]] = (*spec.shapes[name][:depth], len(members), *spec.shapes[name][depth:])
        gone = {name for member in members for name in member}
        dropped = {its for renaming in self.renamed[1:] for mine, its in renaming.items() if mine != its}
        new_axes = {}
        for name, given in axes.items():
            if name in folded:
                new_axes[stack_names[name]] = folded[name]
            elif name not in gone:
                self._require_free(name, given, own | dropped, blocks)
                new_axes[name] = given
        for name, given in spec.outputs.items():
            self._require_free(f"the output {name}", given, own | dropped, {})
        groups = self._groups(own, dropped, modules, above, len(members))
        folding = Folding(spec, members, stack_names, modules, depth, blocks, self.renamed)
        return self._made(groups, new_axes, {n: shapes[n] for n in new_axes}, stacks, folding, gone)

    # -- groups --------------------------------------------------------------------------------------------------------

    def _match(self, mine: Axis, its: Axis, number: int) -> None:
        """Note which group of a module stands where one of the first module does."""
        if type(mine) is not type(its):
            raise Refused("their spec differs")
        if isinstance(mine, Ref) and isinstance(its, Ref):
            if self.renamed[number].setdefault(mine.group, its.group) != its.group:
                raise Refused("their groups do not correspond")
            a, b = self.spec.groups[mine.group], self.spec.groups[its.group]
            if a.size != b.size or a.fixed != b.fixed:
                raise Refused("their groups differ in size")
            if a.structure != b.structure:
                raise Refused(f"on a group of theirs acts {a.structure}, and {b.structure} on another one's")
            # As of an expert that no pass sent a token to: what is less holds of all.
            if len(a.parents) != len(b.parents):
                kept = self.parents.get(mine.group, a.parents)
                self.parents[mine.group] = tuple(parent for parent in kept if parent in b.parents)
        elif isinstance(mine, Fixed) and mine != its:
            raise Refused("their spec differs")
        else:
            a_parts, b_parts = children(mine), children(its)
            if len(a_parts) != len(b_parts):
                raise Refused("their spec differs")
            for a_part, b_part in zip(a_parts, b_parts, strict=True):
                self._match(a_part, b_part, number)

    def _own_groups(self) -> set[str]:
        """The groups of the first module that each of the others has one of its own for.

        Raises Refused where some of the modules share a group, or it is one's in the place of another's.
        """
        first = self.renamed[0]
        own = {name for name in first if any(renaming.get(name) != name for renaming in self.renamed[1:])}
        theirs = [renaming.get(name, "") for renaming in self.renamed for name in own]
        if len({*theirs}) != len(theirs) or own.symmetric_difference(first).intersection(theirs):
            raise Refused("a group is shared by some of the modules")
        return own

    def _inner_names(self, blocks: Mapping[tuple[str, int], Sequence[IntArray]]) -> None:
        """Note the groups in parts of other weights, too, as those of a head's values that meet its output alone."""
        for (name, dim), parts in blocks.items():
            pieces = [_piece(self.spec.axes[name][dim], part, self.spec) for part in parts]
            for number, piece in enumerate(pieces):
                self._match(pieces[0], piece, number)

    def _groups(
        self, own: set[str], dropped: set[str], modules: str, above: Sequence[str], size: int
    ) -> dict[str, Group]:
        groups = {name: g for name, g in self.spec.groups.items() if name not in dropped}
        for name in own:
            group = replace(groups[name], parents=self.parents.get(name, groups[name].parents))
            if [p for p in group.parents if p in above] != list(above):
                raise Refused(f"{name} is not fibred over the modules around these")
            inner = [p for p in group.parents if p not in above]
            groups[name] = replace(group, parents=(*above, modules, *inner))
        made = Group(modules, size, tuple(above))
        inner_ones = {n: g for n, g in groups.items() if n in own}
        outer_ones = {n: g for n, g in groups.items() if n not in own}
        return {**outer_ones, modules: made, **inner_ones}

    def _require_free(
        self, name: str, given: Sequence[Axis], groups: set[str], blocks: Mapping[tuple[str, int], object]
    ) -> None:
        """Raise Refused where another tensor has groups of the modules, but for the parts that go along."""
        for dim, axis in enumerate(given):
            if (name, dim) not in blocks and groups.intersection(refs(axis)):
                raise Refused(f"their units are seen in {name}")

    # -- parts of other weights ----------------------------------------------------------------------------------------

    def _with_blocks(self, axis: Axis, parts: Sequence[IntArray], modules: str) -> Axis:
        """An axis of which equal parts go with the modules: their first part, for each module."""
        whole = [np.arange(part.min(), part.max() + 1) for part in parts]
        if all(np.array_equal(part, run) for part, run in zip(parts, whole, strict=True)):
            joined = np.concatenate(parts)
            if not np.array_equal(joined, np.arange(joined.min(), joined.max() + 1)):
                raise Refused("the parts that go with them do not lie side by side, in one order")
            return _replaced(
                axis,
                int(joined.min()),
                int(joined.max()) + 1,
                self.spec,
                lambda piece: self._block(piece, parts, modules),
            )
        raise Refused("the parts that go with them are interleaved")

    def _block(self, piece: Axis, parts: Sequence[IntArray], modules: str) -> Axis:
        size = len(parts[0])
        first = _piece(piece, np.arange(size), self.spec)
        for number in range(1, len(parts)):
            other = _piece(piece, np.arange(number * size, (number + 1) * size), self.spec)
            renaming = self.renamed[number]
            if rename(first, lambda name, r=renaming: r.get(name, name)) != other:  # type: ignore[misc]
                raise Refused("the parts that go with them differ")
        return Ref(modules) if size == 1 else Product((Ref(modules), first))

    # -- names ---------------------------------------------------------------------------------------------------------

    def _depth(self, name: str) -> int:
        stack = self.inside.get(name)
        return 0 if stack is None else len(dimensions(self.spec.stacks[stack]))

    def _stack_name(self, names: Sequence[str], others: Collection[str]) -> str:
        """One name for the same weight of all modules: what they have in common, ``*`` where they differ."""
        pattern = _pattern(names)
        taken = {*self.spec.axes, *self.spec.aliases}.difference(names).union(others)
        while pattern in taken:
            pattern += "'"
        return pattern

    def _name(self, members: Sequence[Sequence[str]]) -> str:
        """The name of the group of modules: what the names of their weights have in common up to where they differ."""
        words = [name.split(".") for name in (_pattern(names) for names in zip(*members, strict=True))]
        common = _common(words)
        while any(map(_differs, common)) and not _differs(common[-1]):
            common.pop()
        name = ".".join(common) or "modules"
        while name in self.spec.groups:
            name += "'"
        return name

    def _made(
        self,
        groups: dict[str, Group],
        axes: dict[str, tuple[Axis, ...]],
        shapes: dict[str, tuple[int, ...]],
        stacks: dict[str, Names],
        folding: Folding,
        gone: Set[str],
    ) -> PermutationSpec:
        spec, stack_names = self.spec, folding.stack_names

        def kept(name: str) -> bool:
            return name in stack_names or name not in gone

        def placed(entry: Entry) -> Entry:
            """What is said of a dimension of the first module's weight, of that of the stack."""
            name, dim = entry.parameter, entry.dim
            inner = name in stack_names and dim >= folding.depth
            return replace(entry, parameter=stack_names.get(name, name), dim=dim + inner)

        pins = tuple(placed(p) for p in spec.pins if kept(p.parameter) and (p.parameter, p.dim) not in folding.blocks)
        unread = tuple(placed(u) for u in spec.unread if kept(u.parameter))
        changed: dict[str, Any] = {"axes": axes, "shapes": shapes, "stacks": stacks, "pins": pins, "unread": unread}
        try:
            if spec.general is not None:
                plain = {name: replace(group, structure=Structure()) for name, group in groups.items()}
                changed["general"] = folding.general(replace(spec, groups=plain, general=None, **changed))
            made = replace(spec, groups=groups, **changed)
        except SpecError as error:
            raise Refused(str(error)) from None
        for inner, stack in list(self.inside.items()):
            if stack in stack_names:
                self.inside[inner] = stack_names[stack]
        self.inside.update(stack_names)
        return made


def _pattern(names: Sequence[str]) -> str:
    """What names have in common, word by word; where they differ ``*``, or all of a few short words, ``left/right``."""
    words = [name.split(".") for name in names]
    if len({len(one) for one in words}) != 1:
        head = _common(words)
        tail = _common([one[len(head) :][::-1] for one in words])[::-1]
        return ".".join([*head, "*", *tail])
    return ".".join(_word(list(dict.fromkeys(column))) for column in zip(*words, strict=True))


def _common(words: Sequence[Sequence[str]]) -> list[str]:
    """The words with which all begin."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    return [column[0] for column in columns]


def _word(words: Sequence[str]) -> str:
    """One word for several: itself if there is but one."""
    if len(words) == 1:
        return words[0]
    joined = "/".join(words)
    return "*" if len(joined) > LONGEST or all(map(str.isdecimal, words)) or "*" in words else joined


def _differs(word: str) -> bool:
    """Whether a word of a pattern stands for several."""
    return word == "*" or "/" in word


def _stacked(names: Sequence[Names], depth: int) -> Names:
    """Stacks of `depth` dimensions as one, with one more dimension inside these."""
    if depth == 0:
        return tuple(names)
    return tuple(_stacked([one[i] for one in names], depth - 1) for i in range(len(names[0])))


def _parts(axis: Axis, spec: PermutationSpec) -> Iterator[tuple[int, int, Axis]]:
    """The parts of a concatenation, each with where it begins and ends."""
    start = 0
    for part in axis.parts if isinstance(axis, Sum) else (axis,):
        end = start + size_of(part, spec.groups)
        yield start, end, part
        start = end


def _piece(axis: Axis, indices: IntArray, spec: PermutationSpec) -> Axis:
    """The expression of a range of indices of an axis.

    Raises Refused where the axis is not cut there.
    """
    found: list[Axis] = []

    def keep(piece: Axis) -> Axis:
        found.append(piece)
        return piece

    _replaced(axis, int(indices.min()), int(indices.max()) + 1, spec, keep)
    return found[0]


def _replaced(axis: Axis, start: int, end: int, spec: PermutationSpec, new: Callable[[Axis], Axis]) -> Axis:
    """An axis with another expression in the place of a range of its indices.

    Raises Refused where the axis is not cut there.
    """
    size = size_of(axis, spec.groups)
    if (start, end) == (0, size):
        return new(axis)
    if isinstance(axis, Fixed):
        inner = new(Fixed(end - start))
        return _summed([Fixed(start), inner, Fixed(size - end)])
    if isinstance(axis, Product):
        head, *rest = axis.factors
        inner_size = math.prod(size_of(f, spec.groups) for f in rest)
        if end <= inner_size:  # within the first of several modules, which stands for all of them
            tail = rest[0] if len(rest) == 1 else Product(tuple(rest))
            return Product((head, _replaced(tail, start, end, spec, new)))
        if isinstance(head, Fixed) and start % inner_size == 0 and end % inner_size == 0:
            before, among, after = (n // inner_size for n in (start, end - start, size - end))
            tails = [Product((Fixed(n), *rest)) if n > 1 else _tail(rest) for n in (before, among, after)]
            return _summed(
                [
                    t if n else Fixed(0)
                    for n, t in zip((before, 1, after), (tails[0], new(tails[1]), tails[2]), strict=True)
                ]
            )
    if isinstance(axis, Sum):
        parts = list(_parts(axis, spec))
        inside = [(a, b, part) for a, b, part in parts if a < end and b > start]
        if len(inside) == 1:
            a, _, part = inside[0]
            return _summed(
                [_replaced(p, start - a, end - a, spec, new) if p is part and s == a else p for s, _, p in parts]
            )
        if inside and inside[0][0] == start and inside[-1][1] == end:
            within = new(Sum(tuple(part for *_, part in inside)))
            return _summed([
                *(p for _, b, p in parts if b <= start), within, *(p for a, _, p in parts if a >= end),
            ])  # fmt: skip
        raise Refused("the parts that go with them are not cut where the modules are")
    raise Refused("the parts that go with them are not cut where the modules are")


def _tail(rest: Sequence[Axis]) -> Axis:
    return rest[0] if len(rest) == 1 else Product(tuple(rest))


def _summed(parts: Sequence[Axis]) -> Axis:
    """The concatenation of parts, empty ones left out."""
    flat = [p for part in parts for p in (part.parts if isinstance(part, Sum) else (part,)) if p != Fixed(0)]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))
