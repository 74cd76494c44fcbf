"""Groups, where they stand in a tensor, and which occurrence of a parent each one obeys.

A group that is fibred over parents has a permutation of its own at each index of them. Where such a group stands in a
tensor, each parent must stand there too, and `bind` says which axis that is: the factor of an enclosing product, if
there is one, else the only one in another dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from permgraph.errors import SpecError
from permgraph.spec.expressions import (
    Axis,
    Family,
    Label,
    Path,
    Product,
    Ref,
    Sum,
    children,
    require_name,
    size_of,
    walk,
)
from permgraph.structures import Structure

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """A symmetric group on ``size`` indices, one at each index of its ``parents``.

    Args:
        name: one word; usually the path of the module that makes the axis.
        size: the number of indices that it permutes.
        parents: the groups over which it is fibred, outermost first, and with each of them all of that one's parents.
        fixed: no permutation acts: the group is a name for an axis over which others are fibred, or of the structure
            `T` or `T2`.
        structure: what acts on the axis; permutations alone unless more was asked for.
        of: what change places: indices, or whole modules, whose tensors are the spec's stacks, which says so.
    """

    name: str
    size: int
    parents: tuple[str, ...] = ()
    fixed: bool = False
    structure: Structure = field(default=Structure(), repr=False)
    of: Literal["indices", "modules"] = field(default="indices", repr=False)

    def __post_init__(self) -> None:
        require_name(self.name, "a group")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise SpecError(f"group {self.name!r} has size {self.size!r}: a size is an integer, one or more")
        if not isinstance(self.parents, tuple):
            raise SpecError(f"group {self.name!r}: parents must be a tuple of names, not {self.parents!r}")


def check_groups(groups: Mapping[str, Group]) -> None:
    """Raise SpecError unless the parents of every group are known, acyclic, complete and in order."""
    for key, group in groups.items():
        if key != group.name:
            raise SpecError(f"the group under the key {key!r} is named {group.name!r}: they must agree")
        if len(set(group.parents)) != len(group.parents):
            raise SpecError(f"group {key!r} names a parent twice: {group.parents}")
        for parent in group.parents:
            if parent == key:
                raise SpecError(f"group {key!r} is fibred over itself")
            if parent not in groups:
                raise SpecError(f"group {key!r} is fibred over {parent!r}, which is no group of this spec")
    for key in groups:
        _refuse_cycle(groups, key)
    for key, group in groups.items():
        for position, parent in enumerate(group.parents):
            for above in groups[parent].parents:
                if above not in group.parents:
                    raise SpecError(
                        f"group {key!r} is fibred over {parent!r}, which is fibred over {above!r}: "
                        f"name {above!r} among the parents of {key!r} too"
                    )
                if above not in group.parents[:position]:
                    raise SpecError(
                        f"group {key!r} has the parents {group.parents}, but {parent!r} is fibred over {above!r}: "
                        f"write the outermost first"
                    )


def _refuse_cycle(groups: Mapping[str, Group], start: str) -> None:
    seen: set[str] = set()
    frontier = list(groups[start].parents)
    while frontier:
        name = frontier.pop()
        if name == start:
            raise SpecError(f"group {start!r} is fibred over itself by way of {', '.join(sorted(seen))}")
        if name not in seen:
            seen.add(name)
            frontier.extend(groups[name].parents)


Guard: TypeAlias = tuple[int, Path, int]
"""The dimension of a sum, its path there, and one of its parts: true where the coordinate lies in that part."""


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One place where a group acts on a tensor.

    Args:
        group: the group's name.
        dim: the dimension of the tensor.
        path: the way to the `Ref` inside that dimension's expression.
        parents: for each parent of the group, in its order, the occurrence that says which index of it applies.
        guards: the parts of sums in which a coordinate must lie for this occurrence to be there at all; families
            contribute the part of the axis that they point at.
    """

    group: str
    dim: int
    path: Path
    parents: tuple[Occurrence, ...] = ()
    guards: frozenset[Guard] = field(default=frozenset(), repr=False)

    def meets(self, other: Occurrence) -> bool:
        """Whether some element of the tensor lies on both, which two parts of one sum never do."""
        for dim, path, part in self.guards:
            for other_dim, other_path, other_part in other.guards:
                if part != other_part and dim == other_dim and path == other_path:
                    return False
        return True


@dataclass(frozen=True, slots=True)
class Layout:
    """The expressions of one tensor's dimensions, with everything in them that points elsewhere resolved.

    Args:
        axes: one expression per dimension.
        occurrences: every place where a group acts, in the order of the text.
        families: for each family, by its dimension and path, the dimension and path of the sum at which it points.
    """

    axes: tuple[Axis, ...]
    occurrences: tuple[Occurrence, ...]
    families: Mapping[tuple[int, Path], tuple[int, Path]]


def bind(axes: tuple[Axis, ...], groups: Mapping[str, Group], where: str = "this tensor") -> Layout:
    """Find every occurrence of a group in a tensor whose dimensions are ``axes``, and what each one obeys.

    Raises SpecError, naming ``where``, if a group is unknown, if a parent or a family's label is missing or ambiguous,
    if parents contradict each other, or if a family does not have one member for each part of the axis it points at.

    Example:
        >>> groups = {"h": Group("h", 4), "d": Group("d", 8, parents=("h",))}
        >>> [occurrence.group for occurrence in bind((Ref("h"), Ref("d")), groups).occurrences]
        ['h', 'd']
    """
    return _Binder(axes, groups, where).layout()


class _Binder:
    """The nodes of one tensor's expressions, by place, and what has been found out about them so far."""

    def __init__(self, axes: tuple[Axis, ...], groups: Mapping[str, Group], where: str) -> None:
        self.axes, self.groups, self.where = axes, groups, where
        self.nodes: dict[tuple[int, Path], Axis] = {}
        self.refs: dict[str, list[tuple[int, Path]]] = {}
        self.labels: dict[str, list[tuple[int, Path]]] = {}
        self.order: list[tuple[int, Path]] = []
        for dim, axis in enumerate(axes):
            for path, node in walk(axis):
                self.nodes[dim, path] = node
                if isinstance(node, Ref):
                    if node.group not in groups:
                        raise self.error(dim, f"there is no group named {node.group!r}")
                    self.refs.setdefault(node.group, []).append((dim, path))
                    self.order.append((dim, path))
                elif isinstance(node, Label):
                    self.labels.setdefault(node.name, []).append((dim, path))
        self.found: dict[tuple[int, Path], Occurrence] = {}
        self.known_guards: dict[tuple[int, Path], frozenset[Guard]] = {}
        self.open: set[tuple[int, Path]] = set()

    def layout(self) -> Layout:
        families = {
            (dim, path): self.labelled_sum(dim, path)
            for (dim, path), node in self.nodes.items()
            if isinstance(node, Family)
        }
        return Layout(self.axes, tuple(self.occurrence(*place) for place in self.order), families)

    def error(self, dim: int, what: str) -> SpecError:
        return SpecError(f"{self.where}, dimension {dim} ({self.axes[dim]}): {what}")

    def guards(self, dim: int, path: Path) -> frozenset[Guard]:
        """What must hold of the other coordinates for the node at this place to be there."""
        if not path:
            return frozenset()
        place = (dim, path)
        if place not in self.known_guards:
            if place in self.open:
                raise self.error(dim, "families and labels point at each other in a circle")
            self.open.add(place)
            above = self.guards(dim, path[:-1])
            match self.nodes[dim, path[:-1]]:
                case Sum():
                    above |= {(dim, path[:-1], path[-1])}
                case Family():
                    above |= {(*self.labelled_sum(dim, path[:-1]), path[-1])}
            self.open.discard(place)
            self.known_guards[place] = above
        return self.known_guards[place]

    def nearest(self, candidates: list[tuple[int, Path]], dim: int, path: Path) -> list[tuple[int, Path]]:
        """The candidates that are there whenever this place is: in the innermost product, else elsewhere."""
        here = self.guards(dim, path)
        seen = [place for place in candidates if self.guards(*place) <= here]
        inside = [(d, p) for d, p in seen if d == dim and p != path[: len(p)]]
        if inside:
            depth = {place: _common(place[1], path) for place in inside}
            return [place for place in inside if depth[place] == max(depth.values())]
        return [place for place in seen if place[0] != dim]

    def labelled_sum(self, dim: int, path: Path) -> tuple[int, Path]:
        """The place of the sum at which the family at this place points."""
        family = self.nodes[dim, path]
        assert isinstance(family, Family)
        found = self.nearest(self.labels.get(family.on, []), dim, path)
        if len(found) != 1:
            many = "more than one axis is" if found else "no axis that is always there beside it is"
            raise self.error(dim, f"the family {family} is on {family.on!r}, but {many} labelled so")
        at, label = found[0][0], (*found[0][1], 0)
        labelled = self.nodes[at, label]
        if not isinstance(labelled, Sum) or len(labelled.parts) != len(family.members):
            parts = len(labelled.parts) if isinstance(labelled, Sum) else 1
            raise self.error(
                dim, f"the family {family} has {len(family.members)} members for the {parts} parts of {labelled}"
            )
        return at, label

    def occurrence(self, dim: int, path: Path) -> Occurrence:
        place = (dim, path)
        if place not in self.found:
            ref = self.nodes[place]
            assert isinstance(ref, Ref)
            parents = self.parents(self.groups[ref.group], dim, path)
            self.found[place] = Occurrence(ref.group, dim, path, parents, self.guards(dim, path))
        return self.found[place]

    def parents(self, group: Group, dim: int, path: Path) -> tuple[Occurrence, ...]:
        # Innermost first, because a parent brings its own parents with it: they decide where several would do, and
        # must not contradict the nearest.
        bound: dict[str, Occurrence] = {}
        for parent in reversed(group.parents):
            places = self.nearest(self.refs.get(parent, []), dim, path)
            if parent in bound:
                if (bound[parent].dim, bound[parent].path) not in places:
                    raise self.error(
                        dim, f"{group.name!r} and its parents do not agree on which axis of {parent!r} they are over"
                    )
                continue
            if len(places) != 1:
                raise self.error(
                    dim,
                    f"{group.name!r} is fibred over {parent!r}, "
                    + (f"of which {len(places)} axes could be meant" if places else "which has no axis there"),
                )
            bound[parent] = self.occurrence(*places[0])
            for above in bound[parent].parents:
                if bound.setdefault(above.group, above) != above:
                    raise self.error(
                        dim, f"the parents of {group.name!r} do not agree on which axis of {above.group!r} they mean"
                    )
        return tuple(bound[parent] for parent in group.parents)


def _common(one: Path, other: Path) -> int:
    """How many steps two paths share."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def coordinates(axis: Axis, path: Path, groups: Mapping[str, Group]) -> IntArray:
    """For each index along ``axis``, the coordinate of the node at ``path``; -1 where its part of a sum is not.

    Shape: ``(size of axis,)``. A family's members are all given the family's coordinate; which of them applies depends
    on another axis, as `Occurrence.guards` says.

    Example:
        >>> coordinates(Product((Ref("h"), Ref("d"))), (1,), {"h": Group("h", 2), "d": Group("d", 3)}).tolist()
        [0, 1, 2, 0, 1, 2]
    """
    coordinate: IntArray = np.arange(size_of(axis, groups), dtype=np.int64)
    for step in path:
        inner = children(axis)
        if isinstance(axis, Product):
            sizes = [size_of(factor, groups) for factor in inner]
            within = coordinate // max(1, math.prod(sizes[step + 1 :])) % max(1, sizes[step])
            coordinate = np.where(coordinate < 0, -1, within)
        elif isinstance(axis, Sum):
            sizes = [size_of(part, groups) for part in inner]
            start = sum(sizes[:step])
            there = (coordinate >= start) & (coordinate < start + sizes[step])
            coordinate = np.where(there, coordinate - start, -1)
        axis = inner[step]
    return coordinate
