"""What a spec says beyond permutations, of modules that have become stacks.

The modules' groups have structures of their own, and act in each module alike: then what is said of the first one is
said of the stack. The group of the modules has permutations alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from permgraph.inference.modules.moves import IntArray, Refused
from permgraph.spec.binding import coordinates
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Ref, walk
from permgraph.spec.general import Action, General, NullDirection
from permgraph.spec.spec import PermutationSpec

Place = tuple[int, int, int]
"""Where a group stands in a tensor: the dimension, its first index there, and how many others begin there too."""


@dataclass(frozen=True)
class Folding:
    """One family, as far as what is said of its tensors goes.

    Args:
        spec: the spec before it is folded.
        members: of each module the names of its tensors in that spec, the i-th of each in like places.
        stack_names: the names of the stacks, by those of the first module's tensors.
        modules: the name of the group of the modules.
        depth: the dimension of the stacks along which they lie.
        blocks: for dimensions of other tensors the indices that go along, for each module.
        renamed: for each module, the names of its groups by those of the first one's.
    """

    spec: PermutationSpec
    members: Sequence[Sequence[str]]
    stack_names: Mapping[str, str]
    modules: str
    depth: int
    blocks: Mapping[tuple[str, int], Sequence[IntArray]]
    renamed: Sequence[Mapping[str, str]]

    def general(self, made: SpecData) -> General:
        """What the spec with stacks says beyond permutations; `made` has its groups and axes.

        Raises Refused where the modules differ in it.
        """
        assert self.spec.general is not None
        old = self.spec.general
        gone = frozenset(name for member in self.members for name in member)
        read = {gain.name for several in old.actions.values() for action in several for gain, _ in action.gains}
        if not gone.isdisjoint(read):
            raise Refused(f"matrices act between their gains, such as {min(gone & read)}")
        if not gone.isdisjoint([*old.untied, *old.untied.values()]):
            raise Refused("weights of theirs are untied")
        for own in zip(*self.members, strict=True):
            if any(old.actions.get(name) != old.actions.get(own[0]) for name in own[1:]):
                raise Refused(f"what acts on {own[0]} beside permutations acts otherwise on another one's")
        for (name, dim), parts in self.blocks.items():
            self._require_alike(name, dim, parts)
        first_of = {stack: first for first, stack in self.stack_names.items()}
        actions = {}
        for name, axes in made.axes.items():
            before = first_of.get(name, name)
            if before in old.actions:
                actions[name] = tuple(self._carried(before, axes, made, is_stack=name in first_of))
        return replace(
            old,
            actions=actions,
            reasons={name: why for name, why in old.reasons.items() if name in made.groups},
            null_directions=tuple(self._nulls(gone)),
            gains_that_stay=tuple(name for name in old.gains_that_stay if name in made.axes),
        )

    def _carried(self, before: str, axes: tuple[Axis, ...], made: SpecData, *, is_stack: bool) -> Iterator[Action]:
        """The action at each place of a group in a tensor, from that at the place where it stood before."""
        known = self._actions(before)
        seen: dict[tuple[int, int], int] = {}
        for dim, start, group in _standing(axes, made):
            if group == self.modules:
                yield Action()
                continue
            dim -= is_stack and dim > self.depth
            rank = seen[dim, start] = seen.get((dim, start), -1) + 1
            own, action = known.get((dim, start, rank), ("", Action()))
            if own != group:
                raise Refused(f"where {group} stood in {before} is not to be told")
            yield action

    def _actions(self, name: str) -> dict[Place, tuple[str, Action]]:
        """The group at each place of a tensor, and its action there, before the modules were put together."""
        assert self.spec.general is not None
        standing = list(_standing(self.spec.axes[name], self.spec))
        given = self.spec.general.actions.get(name, (Action(),) * len(standing))
        found: dict[Place, tuple[str, Action]] = {}
        for (dim, start, group), action in zip(standing, given, strict=True):
            rank = sum(1 for place in found if place[:2] == (dim, start))
            found[dim, start, rank] = group, action
        return found

    def _require_alike(self, name: str, dim: int, parts: Sequence[IntArray]) -> None:
        """Raise Refused unless the same acts on all parts of a tensor that go with the modules."""
        first, *others = (
            {(start - int(part.min()), rank): entry for (d, start, rank), entry in self._actions(name).items()
             if d == dim and part.min() <= start <= part.max()}
            for part in parts
        )  # fmt: skip
        for number, other in enumerate(others, 1):
            renaming = self.renamed[number]
            if {place: (renaming.get(group, group), action) for place, (group, action) in first.items()} != other:
                raise Refused(f"what acts on the parts of {name} beside permutations differs")

    def _nulls(self, gone: Collection[str]) -> Iterator[NullDirection]:
        """The null directions: of the modules those that all of them have."""
        assert self.spec.general is not None
        directions = self.spec.general.null_directions
        yield from (direction for direction in directions if direction.parameter not in gone)
        for own in zip(*self.members, strict=True):
            of_each = [{(d.uniform, d.part) for d in directions if d.parameter == name} for name in own]
            for direction in directions:
                if direction.parameter == own[0] and all((direction.uniform, direction.part) in one for one in of_each):
                    part = direction.part
                    yield replace(
                        direction,
                        parameter=self.stack_names[own[0]],
                        uniform=tuple(self._inner(dim) for dim in direction.uniform),
                        part=None if part is None else (self._inner(part[0]), *part[1:]),
                    )

    def _inner(self, dim: int) -> int:
        """The dimension of a stack that was this one of the first module's tensor."""
        return dim + (dim >= self.depth)


def _standing(axes: Sequence[Axis], spec: SpecData) -> Iterator[tuple[int, int, str]]:
    """Each group in a tensor, in the order of the text: the dimension, its first index there, and its name."""
    for dim, axis in enumerate(axes):
        for path, node in walk(axis):
            if isinstance(node, Ref):
                yield dim, int((coordinates(axis, path, spec.groups) >= 0).argmax()), node.group
