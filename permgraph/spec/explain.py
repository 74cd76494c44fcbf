"""Explanations: paths through the constraints behind a spec, and these constraints as a graph."""

from __future__ import annotations

import functools
import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from permgraph.errors import SpecError
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Fixed, Ref, size_of, walk
from permgraph.spec.provenance import Constraints, Slot, SlotPin, Tie
from permgraph.spec.stacks import Names, dimensions, places

if TYPE_CHECKING:
    import networkx as nx

_LINKS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Link:
    """Another slot that holds the same axis, and the ties that lead there; none if the spec kept no constraints."""

    slot: Slot
    ties: tuple[Tie, ...] = ()
    modules: bool = False
    """Whether the axis is one of whole modules, which no operator ties: their exchange was proved."""

    def __str__(self) -> str:
        if self.modules:
            return f"goes along with {self.slot}"
        how = _by(self.ties) or (": directly" if self.ties else ": of one group; by which operators was not kept")
        return f"tied to {self.slot}{how}"


@dataclass(frozen=True, slots=True)
class Part:
    """One factor of an axis: a group with the slots that share it, or indices that stay put with the reason.

    Args:
        axis: the factor as text.
        size: its number of indices.
        group: the group that acts on it, or None if it stays put.
        moves: whether the group is more than a name.
        links: the other slots of parameters on which the group acts, the nearest first.
        pin: for what stays put, the pin that made it so, if it is known.
        pin_path: the ties from the axis to where the pin was put.
    """

    axis: str
    size: int
    group: str | None
    moves: bool
    links: tuple[Link, ...] = ()
    pin: SlotPin | None = None
    pin_path: tuple[Tie, ...] = ()

    def lines(self) -> list[str]:
        """What there is to say about this factor, a line each."""
        if self.moves:
            shown = [str(link) for link in self.links[:_LINKS_SHOWN]]
            if len(self.links) > _LINKS_SHOWN:
                shown.append(f"and to {len(self.links) - _LINKS_SHOWN} more")
            return shown or ["tied to no other axis of a parameter"]
        if self.pin is None:
            return ["the reason was not kept"]
        line = f"{self.pin.reason}, at {self.pin.slot}{_by((self.pin,))}"
        return [line + (f", reached{_by(self.pin_path)}" if self.pin_path else "")]


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """Why one dimension of a parameter is what it is; `str` is for people, and what a prompt shows is its beginning."""

    slot: Slot
    size: int
    axis: str
    parts: tuple[Part, ...]
    modules: tuple[str, ...] = ()
    """Sentences about the exchange of the parameter's module with others, and why it does not change places."""

    def __repr__(self) -> str:
        lines = [line if len(line) <= 120 else f"{line[:117]}..." for line in str(self).splitlines()]
        return "\n".join([*lines[:39], f"... and {len(lines) - 39} more lines: print it"] if len(lines) > 40 else lines)

    def _repr_html_(self) -> str:
        return f"<pre style='white-space:pre-wrap'>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        if len(self.parts) == 1 and self.parts[0].axis == self.axis:
            (part,) = self.parts
            own = (f"{self.slot} ({self.size}) {_verdict(part)}:", *(f"  {line}" for line in part.lines()))
            return "\n".join((*own, *self.modules))
        lines = [f"{self.slot} ({self.size}) is {self.axis}"]
        for part in self.parts:
            lines += [f"  {part.axis} ({part.size}) {_verdict(part)}:", *(f"    {line}" for line in part.lines())]
        return "\n".join((*lines, *self.modules))


def _verdict(part: Part) -> str:
    if part.moves:
        return f"is group {part.group}"
    return "stays put" if part.group is None else f"is {part.group}, which stays put and names an axis"


def _by(steps: tuple[Tie | SlotPin, ...]) -> str:
    """The operators of ``steps`` in words, one for each run of ties by the same operator at the same place."""
    said: list[str] = []
    for step in steps:
        if step.operator is None:
            continue
        words = step.operator.removeprefix("aten.").removesuffix(".default")
        words += f" in {step.module}" if step.module else ""
        words += f" ({step.source})" if step.source else ""
        if not said or said[-1] != words:
            said.append(words)
    return f" by {', '.join(said)}" if said else ""


def explain(spec: SpecData, name: str, dim: int) -> Explanation:
    """See `PermutationSpec.explain`."""
    canonical = spec.aliases.get(name, name)
    stack, place = spec.in_stack.get(canonical, (canonical, ()))
    stack = spec.canonical(stack)
    axes, shape = spec.axes[stack][len(place) :], spec.shapes[stack][len(place) :]
    if not -len(axes) <= dim < len(axes):
        raise SpecError(f"{name!r} has {len(axes)} dimensions, {shape}: there is no dimension {dim}")
    dim %= len(axes)
    seen = _Seen(spec, stack, place)
    leaves = dict.fromkeys(leaf for leaf in _leaves(axes[dim]) if leaf != Fixed(1) or axes[dim] == leaf)
    parts = tuple(_part(seen, stack, dim + len(place), leaf) for leaf in leaves)
    return Explanation(f"{canonical}[{dim}]", shape[dim], str(axes[dim]), parts, tuple(_of_modules(spec, canonical)))


def _leaves(axis: Axis) -> list[Fixed | Ref]:
    return [node for _, node in walk(axis) if isinstance(node, Fixed | Ref)]


def _of_modules(spec: SpecData, name: str) -> Iterator[str]:
    """With which others the module of a parameter changes places, and with which it does not, and why."""
    if name in spec.in_stack:
        stack, place = spec.in_stack[name]
        for depth, axis in enumerate(spec.axes[stack][: len(place)]):
            here, same = place[depth], (*place[:depth], *place[depth + 1 :])
            others = [
                other
                for at, other in places(spec.stacks[stack])
                if at[depth] != here and (*at[:depth], *at[depth + 1 :]) == same
            ]
            verb = "stays in its place among" if spec.groups[str(axis)].fixed else "changes places with"
            yield f"its module {verb} those of {_listed(others)}, as group {axis}"
    if name in spec.stacks:
        members = [own for _, own in places(spec.stacks[name])]
        yield f"{name} stands for {_listed(members)}, whose modules change places"
    for refusal in spec.refusals:
        if name in refusal.parameters:
            first, *rest = refusal.parameters
            others = rest if name == first else [first]
            yield f"its module does not change places with {_plural(others)} of {_listed(others)}: {refusal.reason}"


def _plural(others: Sequence[str]) -> str:
    return "that" if len(others) == 1 else "those"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


@dataclass(frozen=True)
class _Seen:
    """A spec as one tensor sees it: of each stack, the part of its own module, or of the first one.

    Attributes:
        known: for each slot of the constraints that is a parameter's, the parameter and its dimension in the spec.
        own: the slots that this tensor sees, for each parameter and dimension.
    """

    spec: SpecData
    stack: str
    place: tuple[int, ...]

    @functools.cached_property
    def known(self) -> dict[Slot, tuple[str, int]]:
        found: dict[Slot, tuple[str, int]] = {}
        for name, axes in self.spec.axes.items():
            inside = list(places(self.spec.stacks[name])) if name in self.spec.stacks else [((), name)]
            for place, own in inside:
                found |= {f"{own}[{dim - len(place)}]": (name, dim) for dim in range(len(place), len(axes))}
        return found

    @functools.cached_property
    def own(self) -> dict[tuple[str, int], Slot]:
        axes = self.spec.axes[self.stack]
        above = {axis.group: at for axis, at in zip(axes, self.place, strict=False) if isinstance(axis, Ref)}
        return {
            (name, dim): self._slot(name, dim, above)
            for name, axes in self.spec.axes.items()
            for dim in range(len(axes))
        }

    def _slot(self, name: str, dim: int, above: Mapping[str, int]) -> Slot:
        names: Names = self.spec.stacks.get(name, name)
        depth = len(dimensions(names))
        if dim < depth:
            return f"{name}[{dim}]"
        for axis in self.spec.axes[name][:depth]:
            names = names[above.get(str(axis), 0)]
        return f"{names}[{dim - depth}]"


def _part(seen: _Seen, name: str, dim: int, leaf: Fixed | Ref) -> Part:
    spec, constraints = seen.spec, seen.spec.constraints
    slot = seen.own[name, dim]
    size = size_of(leaf, spec.groups)
    group = spec.groups[leaf.group] if isinstance(leaf, Ref) else None
    if group is not None and not group.fixed:
        shared = [seen.own[use] for use in spec.uses(group.name)]
        if group.name in spec.groups_of_modules:
            links = tuple(Link(s, (), modules=True) for s in shared if s != slot)
            return Part(str(leaf), size, group.name, True, links)
        # A path may run through other tensors as it likes, but of the parameters only through those of this group.
        among = frozenset(shared)
        reached = (constraints or Constraints()).reached(slot, lambda s: s not in seen.known or s in among)
        found = (Link(s, reached.path(s)) for s in dict.fromkeys(shared) if s != slot)
        links = tuple(sorted(found, key=lambda link: len(link.ties) or len(seen.known)))
        return Part(str(leaf), size, group.name, True, links)
    known = next((p for p in spec.pins if (p.parameter, p.dim, p.size) == (name, dim, size)), None)
    pin: SlotPin | None = None
    path: tuple[Tie, ...] = ()
    if constraints:
        # What stays put cannot have come by way of an axis all of whose indices move.
        reached = constraints.reached(slot, lambda s: s not in seen.known or _rests(spec, *seen.known[s]))
        pins = [p for s in reached.steps for p in constraints.pins_at.get(s, ())]
        pin = next((p for p in pins if known and p.reason == known.reason), None)
        pin = pin or (None if known else next(iter(pins), None))
        path = reached.path(pin.slot) if pin else ()
    if pin is None and known:
        pin = SlotPin(slot, known.reason, known.operator, known.module, known.source)
    return Part(str(leaf), size, group.name if group else None, False, (), pin, path)


def _rests(spec: SpecData, name: str, dim: int) -> bool:
    """Whether some index of an axis stays put."""
    leaves = _leaves(spec.axes[name][dim])
    return any(isinstance(leaf, Fixed) or spec.groups[leaf.group].fixed for leaf in leaves)


def slot_graph(spec: SpecData) -> nx.MultiGraph:
    """See `PermutationSpec.to_networkx`."""
    import networkx as nx

    graph = nx.MultiGraph()
    for name, axes in spec.axes.items():
        inside = list(places(spec.stacks[name])) if name in spec.stacks else []
        depth = len(inside[0][0]) if inside else 0
        for dim, axis in enumerate(axes):
            size = spec.shapes[name][dim]
            for own in [name] if dim < depth or not inside else [own for _, own in inside]:
                at = dim if dim < depth or not inside else dim - depth
                graph.add_node(f"{own}[{at}]", parameter=own, dim=at, size=size, axis=str(axis))
    held = frozenset(spec.groups_of_modules) if spec.constraints is not None else frozenset(spec.groups)
    for group in (name for name in spec.groups if name in held):
        for one, other in itertools.pairwise(_slots_of(spec, group)):
            graph.add_edge(one, other, group=group)
    if spec.constraints is None:
        return graph
    for tie in spec.constraints.ties:
        graph.add_edge(tie.a, tie.b, operator=tie.operator, module=tie.module, source=tie.source)
    for slot, pins in spec.constraints.pins_at.items():
        graph.add_node(slot, pinned=tuple(pin.reason for pin in pins))
    return graph


def _slots_of(spec: SpecData, group: str) -> list[Slot]:
    """Where a group stands; of a stack, the slots of all tensors in it, but for those of the modules themselves."""
    found = []
    for name, dim in spec.uses(group):
        inside = list(places(spec.stacks[name])) if name in spec.stacks else [((), name)]
        depth = len(inside[0][0])
        found += [f"{name}[{dim}]"] if dim < depth else [f"{own}[{dim - depth}]" for _, own in inside]
    return found
