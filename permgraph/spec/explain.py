"""Explanations: paths through the constraints behind a spec, and these constraints as a graph."""

from __future__ import annotations

import html
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from permgraph.errors import SpecError
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Fixed, Ref, size_of, walk
from permgraph.spec.provenance import Constraints, Slot, SlotPin, Tie

if TYPE_CHECKING:
    import networkx as nx

_LINKS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Link:
    """Another slot that holds the same axis, and the ties that lead there; none if the spec kept no constraints."""

    slot: Slot
    ties: tuple[Tie, ...] = ()

    def __str__(self) -> str:
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

    def __repr__(self) -> str:
        lines = [line if len(line) <= 120 else f"{line[:117]}..." for line in str(self).splitlines()]
        return "\n".join([*lines[:39], f"... and {len(lines) - 39} more lines: print it"] if len(lines) > 40 else lines)

    def _repr_html_(self) -> str:
        return f"<pre style='white-space:pre-wrap'>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        if len(self.parts) == 1 and self.parts[0].axis == self.axis:
            (part,) = self.parts
            return "\n".join([f"{self.slot} ({self.size}) {_verdict(part)}:", *(f"  {line}" for line in part.lines())])
        lines = [f"{self.slot} ({self.size}) is {self.axis}"]
        for part in self.parts:
            lines += [f"  {part.axis} ({part.size}) {_verdict(part)}:", *(f"    {line}" for line in part.lines())]
        return "\n".join(lines)


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
    canonical = spec.canonical(name)
    axes = spec.axes[canonical]
    if not -len(axes) <= dim < len(axes):
        raise SpecError(f"{name!r} has {len(axes)} dimensions, {spec.shapes[canonical]}: there is no dimension {dim}")
    dim %= len(axes)
    leaves = dict.fromkeys(leaf for leaf in _leaves(axes[dim]) if leaf != Fixed(1) or axes[dim] == leaf)
    parts = tuple(_part(spec, canonical, dim, leaf) for leaf in leaves)
    return Explanation(f"{canonical}[{dim}]", spec.shapes[canonical][dim], str(axes[dim]), parts)


def _leaves(axis: Axis) -> list[Fixed | Ref]:
    return [node for _, node in walk(axis) if isinstance(node, Fixed | Ref)]


def _part(spec: SpecData, name: str, dim: int, leaf: Fixed | Ref) -> Part:
    slot, constraints = f"{name}[{dim}]", spec.constraints
    size = size_of(leaf, spec.groups)
    group = spec.groups[leaf.group] if isinstance(leaf, Ref) else None
    slots = {f"{other}[{at}]": (other, at) for other, axes in spec.axes.items() for at in range(len(axes))}
    if group is not None and not group.fixed:
        shared = {f"{other}[{at}]" for other, at in spec.uses(group.name)}
        # A path may run through other tensors as it likes, but of the parameters only through those of this group.
        reached = (constraints or Constraints()).reached(slot, lambda s: s not in slots or s in shared)
        others = [s for s in slots if s in shared and s != slot]
        links = sorted((Link(s, reached.path(s)) for s in others), key=lambda link: len(link.ties) or len(slots))
        return Part(str(leaf), size, group.name, True, tuple(links))
    known = next((p for p in spec.pins if (p.parameter, p.dim, p.size) == (name, dim, size)), None)
    pin: SlotPin | None = None
    path: tuple[Tie, ...] = ()
    if constraints:
        # What stays put cannot have come by way of an axis all of whose indices move.
        reached = constraints.reached(slot, lambda s: s not in slots or _rests(spec, *slots[s]))
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
        for dim, axis in enumerate(axes):
            size = spec.shapes[name][dim]
            graph.add_node(f"{name}[{dim}]", parameter=name, dim=dim, size=size, axis=str(axis))
    if spec.constraints is None:
        for group in spec.groups:
            uses = [f"{name}[{dim}]" for name, dim in spec.uses(group)]
            for one, other in itertools.pairwise(uses):
                graph.add_edge(one, other, group=group)
        return graph
    for tie in spec.constraints.ties:
        graph.add_edge(tie.a, tie.b, operator=tie.operator, module=tie.module, source=tie.source)
    for slot, pins in spec.constraints.pins_at.items():
        graph.add_node(slot, pinned=tuple(pin.reason for pin in pins))
    return graph
