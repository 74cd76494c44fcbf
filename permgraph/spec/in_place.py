"""The part of a spec's group that leaves whole modules where they are: each tensor by itself again, under its own name.

What folded k modules into one stack is undone: the groups inside them become k groups, one for each module, and
``(modules a)`` becomes ``[a of the first + a of the second + ...]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from permgraph.spec.binding import Group
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Path, Product, Ref, Sum, refs
from permgraph.spec.general import Action, General, NullDirection
from permgraph.spec.provenance import Pin, Unread
from permgraph.spec.stacks import dimensions, places

At = Mapping[str, int]
"""For groups of modules, which of them."""


def with_modules_in_place(spec: SpecData) -> dict[str, Any]:
    """The fields in which the spec without groups of modules differs from this one; none if it has no stacks.

    Raises SpecError where it cannot be written: a weight has units of several modules in one of its rows.
    """
    return _InPlace(spec).fields() if spec.stacks else {}


@dataclass
class _InPlace:
    """A spec, and the names of the groups that each group inside modules becomes."""

    spec: SpecData
    names: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        spec = self.spec
        axes: dict[str, tuple[Axis, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        actions: dict[str, tuple[Action, ...]] = {}
        tensors = list(self._tensors())
        self._name_groups()
        for name, own, at in tensors:
            depth = len(spec.axes[own]) - len(spec.tensors[name])
            made = [_Part(self, own, dim).of(axis, at) for dim, axis in enumerate(spec.axes[own][depth:], depth)]
            axes[name] = tuple(axis for axis, _ in made)
            shapes[name] = spec.tensors[name]
            if spec.general is not None and own in spec.general.actions:
                actions[name] = tuple(action for _, several in made for action in several)
        groups = {}
        for name, group in spec.groups.items():
            if name not in self.modules:
                rest = tuple(parent for parent in group.parents if parent not in self.modules)
                for at in self._places_of(group):
                    own_name = self.name(name, at)
                    parents = tuple(self.name(parent, at) for parent in rest)
                    groups[own_name] = replace(group, name=own_name, parents=parents)
        outputs = {
            name: tuple(_Part(self, None, dim).of(axis, {})[0] for dim, axis in enumerate(own))
            for name, own in spec.outputs.items()
        }
        return {
            "groups": groups,
            "axes": axes,
            "shapes": shapes,
            "stacks": {},
            "outputs": outputs,
            "pins": tuple(self._entries(spec.pins)),
            "unread": tuple(self._entries(spec.unread)),
            "refusals": (),
            "general": spec.general and self._general(spec.general, actions),
        }

    @property
    def modules(self) -> Collection[str]:
        """The groups that exchange modules."""
        return self.spec.groups_of_modules

    def _tensors(self) -> Iterator[tuple[str, str, At]]:
        """Each tensor with its name among the axes, and which module of each group it is of."""
        for name, axes in self.spec.axes.items():
            if name not in self.spec.stacks:
                yield name, name, {}
                continue
            for place, member in places(self.spec.stacks[name]):
                leading = (axis.group for axis in axes if isinstance(axis, Ref))
                yield member, name, dict(zip(leading, place, strict=False))

    # -- names ---------------------------------------------------------------------------------------------------------

    def _places_of(self, group: Group) -> Iterator[At]:
        above = [parent for parent in group.parents if parent in self.modules]
        for place in itertools.product(*(range(self.spec.groups[parent].size) for parent in above)):
            yield dict(zip(above, place, strict=True))

    def name(self, group: str, at: At) -> str:
        """What a group is called in these modules."""
        above = [parent for parent in self.spec.groups[group].parents if parent in self.modules]
        return self.names[group, tuple(at[parent] for parent in above)]

    def _name_groups(self) -> None:
        """Name the groups: those of the first module as they were, others as their module's tensors differ from its."""
        taken = set(self.spec.groups)
        for group, given in self.spec.groups.items():
            if group in self.modules:
                continue
            for at in self._places_of(given):
                name = group
                if any(at.values()):
                    name = self._renamed(group, at)
                    while name in taken:
                        name += "'"
                    taken.add(name)
                self.names[group, tuple(at.values())] = name

    def _renamed(self, group: str, at: At) -> str:
        words = group.partition("#")[0].split(".")
        for stack, names in self.spec.stacks.items():
            axes = self.spec.axes[stack]
            leading = [axis.group for axis in axes[: len(dimensions(names))] if isinstance(axis, Ref)]
            if [*at] != [one for one in leading if one in at] or not any(group in refs(axis) for axis in axes):
                continue
            by_place = dict(places(names))
            first = by_place[(0,) * len(leading)].split(".")
            other = by_place[tuple(at.get(one, 0) for one in leading)].split(".")
            if len(first) == len(other) and any(a != b for a, b in zip(first, other, strict=True)):
                new = [b if a == word else word for word, a, b in zip(words, first, other, strict=False)]
                renamed = ".".join([*new, *words[len(new) :]])
                if renamed != ".".join(words):
                    return renamed + group[len(group.partition("#")[0]) :]
        return f"{group}@{'.'.join(map(str, at.values()))}"

    # -- what is said of tensors ---------------------------------------------------------------------------------------

    def _of_stack(self, name: str, dim: int) -> Iterator[tuple[str, int]]:
        """The dimensions of tensors of which something is said of a stack's, or of that of a tensor in none."""
        if name not in self.spec.stacks:
            yield name, dim
            return
        depth = len(dimensions(self.spec.stacks[name]))
        if dim >= depth:
            yield from ((member, dim - depth) for member in self.spec.tensors_of(name))

    def _entries(self, entries: Sequence[Pin] | Sequence[Unread]) -> Iterator[Any]:
        for entry in entries:
            for name, dim in self._of_stack(entry.parameter, entry.dim):
                changed: dict[str, Any] = {"parameter": name, "dim": dim}
                if isinstance(entry, Unread):
                    several = [g for g in entry.groups if g not in self.modules]
                    changed["groups"] = tuple(
                        self.name(g, at) for g in several for at in self._places_of(self.spec.groups[g])
                    )
                yield replace(entry, **changed)

    def _general(self, general: General, actions: Mapping[str, tuple[Action, ...]]) -> General:
        reasons = {
            self.name(group, at): why
            for group, why in general.reasons.items()
            if group not in self.modules
            for at in self._places_of(self.spec.groups[group])
        }
        nulls = tuple(one for direction in general.null_directions for one in self._nulls(direction))
        return replace(general, actions=actions, reasons=reasons, null_directions=nulls)

    def _nulls(self, direction: NullDirection) -> Iterator[NullDirection]:
        """The null directions of the tensors of a stack: such as are the same along modules are none of one alone."""
        name = direction.parameter
        depth = len(dimensions(self.spec.stacks[name])) if name in self.spec.stacks else 0
        along = {*direction.uniform, *([] if direction.part is None else [direction.part[0]])}
        if any(dim < depth for dim in along):
            return
        uniform = tuple(dim - depth for dim in direction.uniform)
        part = direction.part and (direction.part[0] - depth, *direction.part[1:])
        for member in self.spec.tensors_of(name):
            yield replace(direction, parameter=member, uniform=uniform, part=part)


class _Part:
    """One dimension of a tensor: writes its axis with modules in place, and says how what is left in it acts."""

    def __init__(self, whole: _InPlace, name: str | None, dim: int) -> None:
        self.whole, self.spec = whole, whole.spec
        self.actions: dict[Path, Action] = {}
        general = self.spec.general
        if name is not None and general is not None and name in general.actions:
            standing = zip(self.spec.occurrences(name), general.actions[name], strict=True)
            self.actions = {occurrence.path: action for occurrence, action in standing if occurrence.dim == dim}

    def of(self, axis: Axis, at: At, path: Path = ()) -> tuple[Axis, list[Action]]:
        """The axis in these modules, and the action at each group in it, in the order of the text."""
        match axis:
            case Ref(group):
                if group in self.whole.modules:
                    return Fixed(self.spec.groups[group].size), []
                return Ref(self.whole.name(group, at)), [self.actions.get(path, Action())]
            case Product(factors):
                return self._product(factors, at, path, 0)
            case Sum(parts):
                made = [self.of(part, at, (*path, number)) for number, part in enumerate(parts)]
                return Sum(tuple(part for part, _ in made)), [a for _, several in made for a in several]
            case Family(on, members):
                made = [self.of(member, at, (*path, number)) for number, member in enumerate(members)]
                return Family(on, tuple(part for part, _ in made)), [a for _, several in made for a in several]
            case Label(name, inner):
                new, several = self.of(inner, at, (*path, 0))
                return Label(name, new), several
        return axis, []

    def _product(self, factors: Sequence[Axis], at: At, path: Path, number: int) -> tuple[Axis, list[Action]]:
        """The factors from one on; those after modules stand once for each of these."""
        factor = factors[number]
        if number + 1 == len(factors):
            return self.of(factor, at, (*path, number))
        if isinstance(factor, Ref) and factor.group in self.whole.modules:
            each = [
                self._product(factors, {**at, factor.group: i}, path, number + 1)
                for i in range(self.spec.groups[factor.group].size)
            ]
            return Sum(tuple(part for part, _ in each)), [a for _, several in each for a in several]
        first, own = self.of(factor, at, (*path, number))
        second, others = self._product(factors, at, path, number + 1)
        return Product((first, second)), [*own, *others]
