"""What no pass reads: which groups it may belong to, and what is said of it.

A mask token, the head of another task, the positions beyond the length: what a parameter that was not read is tied to,
no pass shows. It stays put, which is right where it belongs to no group. Where one of its axes is as long as an axis
near it that moves, it may belong to that one, and a run that reads it would then meet units in two orders. So the
groups concerned are kept with the spec and named in its notes, or pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from permgraph.algebra import Axis, Kind, Pinned
from permgraph.inference.ends import UNREAD as NO_EFFECT
from permgraph.inference.solution import Solution

Policy = Literal["note", "pin"]
"""What becomes of groups to which a parameter may belong that no pass reads."""

SHOWN = 3


@dataclass(frozen=True)
class Loose:
    """An axis that was not read, or not all of it, and the atoms that move and may be its own."""

    parameter: str
    dim: int
    size: int
    atoms: tuple[Axis, ...]


def check_policy(unread: str) -> None:
    """Raise ValueError, naming the choices, unless this is a policy."""
    if unread not in get_args(Policy):
        raise ValueError(f"unread={unread!r} is none of {', '.join(map(repr, get_args(Policy)))}")


def loose_axes(solution: Solution) -> list[Loose]:
    """Each axis of which no pass read all, and that may belong to what moves near it."""
    near = _Neighbours(solution)
    found = []
    for name, tensor in near.weights.items():
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                atoms = near.as_long(name, size) if name in near.unread else _beside(solution, tensor.dims[dim])
                if atoms:
                    found.append(Loose(name, dim, size, atoms))
    return found


def pin_loose(solution: Solution, run_until_stable: Callable[[Solution], None]) -> None:
    """Pin what an axis that no pass reads may belong to."""
    said = []
    while loose := loose_axes(solution):
        reasons: dict[Axis, str] = {}
        for entry in loose:
            for atom in entry.atoms:
                reasons.setdefault(atom, f"as long as dimension {entry.dim} of {entry.parameter}, which no pass reads")
        for number, node in solution.weights_read():
            tensor = solution.values[node]
            for dim, axis in enumerate(tensor.dims):
                found = dict.fromkeys(reasons[atom] for atom in solution.axes.atoms(axis) if atom in reasons)
                said += [(tensor, dim, reason, number) for reason in found]
        for atom, reason in reasons.items():
            solution.axes.pin(atom, Pinned(reason))
        if solution.axes.has_families:
            run_until_stable(solution)
    solution.ends.pins += said


class _Neighbours:
    """The floating-point parameters and buffers, and what moves in those that are read."""

    def __init__(self, solution: Solution) -> None:
        weights = solution.parameters.items()
        self.weights = {n: t for n, t in weights if t.dtype.is_floating_point or t.dtype.is_complex}
        self.unread = frozenset(solution.unread)
        self._within: dict[str, dict[int, dict[Axis, None]]] = {}
        for name, tensor in self.weights.items():
            for size, axis in zip(tensor.shape, tensor.dims, strict=True) if name not in self.unread else ():
                for atom in solution.axes.atoms(axis):
                    if atom.pinned is None:
                        for module in _modules(name):
                            lengths = self._within.setdefault(module, {})
                            lengths.setdefault(size, {})[atom] = None
                            lengths.setdefault(atom.size, {})[atom] = None

    def as_long(self, name: str, size: int) -> tuple[Axis, ...]:
        """What moves along axes of a length, or is of that length: in the nearest module around that has any."""
        for module in _modules(name):
            if atoms := self._within.get(module, {}).get(size):
                return tuple(atoms)
        return ()


def _modules(name: str) -> Iterator[str]:
    """The paths of the modules that hold a parameter, innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _beside(solution: Solution, axis: Axis) -> tuple[Axis, ...]:
    """What moves along the rest of an axis of which a part has no effect."""
    axis = solution.axes.resolve(axis)
    if axis.kind is Kind.PRODUCT:
        return tuple(dict.fromkeys(a for factor in axis.children for a in _beside(solution, factor)))
    if axis.kind is Kind.ATOM:
        return ()
    parts = [list(solution.axes.atoms(part)) for part in axis.children]
    if not any(part and all(_has_no_effect(atom) for atom in part) for part in parts):
        return tuple(dict.fromkeys(a for part in axis.children for a in _beside(solution, part)))
    return tuple(dict.fromkeys(atom for part in parts for atom in part if atom.pinned is None))


def _has_no_effect(atom: Axis) -> bool:
    return atom.pinned is not None and atom.pinned.reason == NO_EFFECT


# -- sentences ---------------------------------------------------------------------------------------------------------


def notes(solution: Solution, loose: Sequence[tuple[str, Sequence[str]]], unused: Sequence[str]) -> Iterator[str]:
    """What a reader should know of what no pass reads: `loose` has parameters with the groups they may belong to."""
    if parts := solution.stand_ins:
        others = dict.fromkeys(sibling for part in parts for sibling in part.siblings)
        yield (
            f"no pass reached {_some([part.part for part in parts])}, taken to be tied as "
            f"{_some(list(others))}, of the same kind, {'is' if len(others) == 1 else 'are'}"
        )
    if solution.unseen:
        yield f"{_some(solution.unseen)} met only constants in every pass, and is taken to do so in every run"
    parameters = list(dict.fromkeys(name for name, _ in loose))
    if parameters:
        groups = list(dict.fromkeys(group for _, groups in loose for group in groups))
        yield (
            f"no pass reads {_some(parameters)} whole, of which an axis is as long as {_some(groups)}: permuting "
            f"{'this group' if len(groups) == 1 else 'these groups'} may change runs that do; give auto_spec inputs on "
            'which they are read, or unread="pin"'
        )
    concerned = {name.rpartition(".")[0] for name in parameters}
    rest = [
        name
        for name, tensor in _Neighbours(solution).weights.items()
        if name in unused and name.rpartition(".")[0] not in concerned and max(tensor.shape, default=0) > 1
    ]
    if rest:
        yield f"no pass reads {_some(rest)}, so that nothing is known of symmetries there"


def _some(names: Sequence[str]) -> str:
    if len(names) <= SHOWN + 1:
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"
