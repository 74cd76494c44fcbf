"""`first_difference`: how two specifications differ as groups, whatever their groups are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Product, Ref, Sum, children
from permgraph.spec.general import Action


def first_difference(a: SpecData, b: SpecData, names: tuple[str, str] = ("A", "B")) -> str | None:
    """The first parameter and dimension on which two specs act differently, in words; None if they act alike.

    Groups are compared by where they stand, and may have other names. Shapes are not compared for their own sake, nor
    what was pinned why.

    >>> from permgraph.spec import PermutationSpec
    >>> a = PermutationSpec.parse("w 6x2 h . | v 3x6 . h | groups: h 6".replace(" | ", chr(10)))
    >>> b = PermutationSpec.parse("w 6x2 (h d) . | v 3x6 . (h d) | groups: h 2 · d 3 per h".replace(" | ", chr(10)))
    >>> first_difference(a, b)
    "'w', dimension 0, is h (6) in A but (h d) with h 2 · d 3 per h in B"
    """
    if (stacks := _stacks(a, b, names)) is not None:
        return stacks
    for key in dict.fromkeys((*a.axes, *a.aliases, *b.axes, *b.aliases)):
        for spec, other, whose, others in ((a, b, names[0], names[1]), (b, a, names[1], names[0])):
            if key not in spec.axes and key not in spec.aliases:
                return f"{others} has {key!r}, of axes {_text(other, key)}, and {whose} has not"
    if (tie := _ties(a, b, names)) is not None:
        return tie
    pairing = _Pairing(a, b, names)
    for key in a.axes:
        ours, theirs = a.axes[key], b.axes[b.canonical(key)]
        unread = ""
        for spec, whose in zip((a, b), names, strict=True):
            if key in spec.unused and key not in (b if spec is a else a).unused:
                unread = f"; the forward pass of {whose} does not read it"
        if len(ours) != len(theirs):
            return f"{key!r} has axes {_text(a, key)} in {names[0]} but {_text(b, key)} in {names[1]}{unread}"
        for dim, (one, its) in enumerate(zip(ours, theirs, strict=True)):
            clash = pairing.differ(one, its, f"{key!r}, dimension {dim}")
            if clash is not None:
                says = f"{key!r}, dimension {dim}, is {_shown(a, one)} in {names[0]} but {_shown(b, its)} in {names[1]}"
                return says + (f", where {clash}" if clash else "") + unread
        if (structures := _structures(a, b, key, names)) is not None:
            return structures
    return None


def _structures(a: SpecData, b: SpecData, key: str, names: tuple[str, str]) -> str | None:
    """How structures act differently on a parameter of two specs with general symmetries; None if they do not."""
    if a.general is None or b.general is None:
        return None
    ours, theirs = a.occurrences(key), b.occurrences(key)
    rows = [spec.general.actions.get(spec.canonical(key)) for spec in (a, b) if spec.general is not None]
    for at, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        structures = [spec.groups[o.group].structure for spec, o in ((a, one), (b, other))]
        if structures[0] != structures[1]:
            return (
                f"{key!r}, dimension {one.dim}, has the structure {structures[0]} in {names[0]} but {structures[1]} in "
                f"{names[1]}"
            )
        actions = [Action() if row is None else row[at] for row in rows]
        if actions[0] != actions[1]:
            return (
                f"{key!r}, dimension {one.dim}: {structures[0]} acts by {actions[0]} in {names[0]} but by "
                f"{actions[1]} in {names[1]}"
            )
    return None


@dataclass
class _Pairing:
    """Which group of the second spec each of the first is, as far as it is known, and from where."""

    a: SpecData
    b: SpecData
    names: tuple[str, str]
    forth: dict[str, str] = field(default_factory=dict)
    back: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def differ(self, one: Axis, other: Axis, place: str) -> str | None:
        """None if the two are the same; else why not, as far as the expressions do not say."""
        one, other = _plain(self.a, one), _plain(self.b, other)
        if isinstance(one, Ref) and isinstance(other, Ref):
            return self._groups_differ(one.group, other.group, place)
        if type(one) is not type(other) or isinstance(one, Fixed) or len(children(one)) != len(children(other)):
            return None if one == other else ""
        labels = [axis.on if isinstance(axis, Family) else getattr(axis, "name", "") for axis in (one, other)]
        tensor = place.rpartition(",")[0]  # what a label names is an axis of this tensor only
        if not self._same(f"{tensor} @{labels[0]}", f"{tensor} @{labels[1]}", place):
            return ""
        for inner, others in zip(children(one), children(other), strict=True):
            clash = self.differ(inner, others, place)
            if clash is not None:
                return clash
        return None

    def _same(self, one: str, other: str, place: str) -> bool:
        """Whether two names go with each other, and with no third."""
        self.places.setdefault(one, place)
        return self.forth.setdefault(one, other) == other and self.back.setdefault(other, one) == one

    def _groups_differ(self, one: str, other: str, place: str) -> str | None:
        ours, theirs = self.a.groups[one], self.b.groups[other]
        known = one in self.forth
        if not self._same(one, other, place):
            if known:
                return f"only {self.names[0]} ties it to {self.places[one]}"
            return f"only {self.names[1]} ties it to {self.places[self.back[other]]}"
        if known:
            return None
        if (ours.size, ours.fixed, len(ours.parents)) != (theirs.size, theirs.fixed, len(theirs.parents)):
            return ""
        for parent, its in zip(ours.parents, theirs.parents, strict=True):
            clash = self._groups_differ(parent, its, place)
            if clash is not None:
                return clash
        return None


def _plain(spec: SpecData, axis: Axis) -> Axis:
    """The axis itself; that of a group of which only the identity acts, and over which none is fibred, as fixed."""
    if isinstance(axis, Ref):
        group = spec.groups[axis.group]
        if (group.fixed or group.size == 1) and not any(axis.group in other.parents for other in spec.groups.values()):
            return Fixed(group.size)
    return axis


def _ties(a: SpecData, b: SpecData, names: tuple[str, str]) -> str | None:
    """The first tensor that is tied to another in one of the two only."""
    for spec, other, whose, others in ((a, b, names[0], names[1]), (b, a, names[1], names[0])):
        for alias, canonical in spec.aliases.items():
            if other.canonical(alias) != other.canonical(canonical):
                return f"{alias!r} is {canonical!r} itself in {whose}, and a tensor of its own in {others}"
    return None


def _stacks(a: SpecData, b: SpecData, names: tuple[str, str]) -> str | None:
    """The first tensor that changes places with others in one of the two only, or with others."""
    for spec, other, whose, others in ((a, b, names[0], names[1]), (b, a, names[1], names[0])):
        for name, (stack, place) in spec.in_stack.items():
            if name not in other.in_stack:
                if name in other.tensors:
                    return f"{name!r} changes places with others of {stack!r} in {whose}, and not in {others}"
                return f"{whose} has {name!r}, of the stack {stack!r}, and {others} has not"
            if other.in_stack[name] != (stack, place):
                its, at = other.in_stack[name]
                return f"{name!r} is at {place} of the stack {stack!r} in {whose}, but at {at} of {its!r} in {others}"
    return None


def _text(spec: SpecData, key: str) -> str:
    return (
        " ".join("." if isinstance(axis, Fixed) else str(axis) for axis in spec.axes[spec.canonical(key)]) or "scalar"
    )


def _shown(spec: SpecData, axis: Axis) -> str:
    """An expression, and what its groups are."""
    if isinstance(axis, Fixed):
        return f"fixed ({axis.size})"
    groups = [spec.groups[name] for name in dict.fromkeys(_named(axis))]
    if isinstance(axis, Ref) and not groups[0].parents:
        return f"{axis} ({groups[0].size}{' fixed' if groups[0].fixed else ''})"
    described = [
        f"{g.name} {g.size}{' fixed' if g.fixed else ''}{f' per {chr(32).join(g.parents)}' if g.parents else ''}"
        for g in groups
    ]
    return f"{axis} with {' · '.join(described)}" if described else str(axis)


def _named(axis: Axis) -> Iterator[str]:
    if isinstance(axis, Ref):
        yield axis.group
    if isinstance(axis, (Product, Sum, Label, Family)):
        for inner in children(axis):
            yield from _named(inner)
