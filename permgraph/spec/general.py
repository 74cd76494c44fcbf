"""What a spec says beyond permutations: how the structure of each group acts where the group stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from permgraph.errors import MismatchError, SpecError
from permgraph.spec.binding import Group, Layout
from permgraph.structures import Structure


class Gain(NamedTuple):
    """A vector that an axis is multiplied with: a parameter, or a number added to one, as in ``1 + weight``."""

    name: str
    added: float = 0.0

    def __str__(self) -> str:
        return f"{self.added:g} + {self.name}" if self.added else self.name

    def values(self, parameter: torch.Tensor, of: str = "") -> torch.Tensor:
        """What the axis is multiplied with, in float64 and in one dimension, where the parameter has these values.

        Raises MismatchError, naming whose gain it is, if one is zero or not finite.
        """
        values = parameter.detach().to(torch.float64).flatten() + self.added
        finite = bool(torch.isfinite(values).all())
        if not finite or bool((values == 0).any()):
            what = "a zero, which cannot be undone" if finite else "a value that is not finite"
            raise MismatchError(
                f"the gain {self}{of and f' of {of}'} has {what}, so that no matrix can act between it and its "
                f"inverse; take spec.permutations() for such a network"
            )
        return values


@dataclass(frozen=True, slots=True)
class Action:
    """How the element of a group's structure acts at one place of a parameter, besides the permutation.

    Of a group of matrices g (GL, O, O1) it is g itself, ``powers=(1,)``, its inverse transpose, ``(-1,)``, or neither,
    ``()``: then the parameter is a gain that the axis was multiplied with, and stays. Between gains, g acts as D g D⁻¹,
    where D is the diagonal matrix of these gains to these powers.

    Of a group with factors for each index, index j is multiplied by each positive factor to its power, and by each sign
    (or common sign) to its exponent, zero or one.

    Args:
        powers: the exponent of each positive factor, or how a matrix acts.
        signs: the exponent of each sign, then of each common one.
        gains: gains with exponents, for a matrix.
    """

    powers: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()
    gains: tuple[tuple[Gain, int], ...] = ()

    def __str__(self) -> str:
        words = [f"powers {self.powers}" if self.powers else "", f"signs {self.signs}" if self.signs else ""]
        words += [f"between {gain}^{power}" for gain, power in self.gains]
        return ", ".join(word for word in words if word) or "nothing"


@dataclass(frozen=True, slots=True)
class NullDirection:
    """A direction in which a parameter can be moved by any amount without effect on what the model computes.

    Args:
        parameter: its name.
        uniform: the dimensions along which what is added is the same for all indices: multiples of the vector of ones.
            Along all others it is arbitrary.
        part: dimension, start and stop of the indices to which something is added; None for all of them.
        reason: the operator that takes no notice of it.
    """

    parameter: str
    uniform: tuple[int, ...]
    part: tuple[int, int, int] | None
    reason: str

    def random(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """A random multiple, of the parameter's shape, in float64."""
        sizes = [1 if dim in self.uniform else size for dim, size in enumerate(shape)]
        added = torch.randn(sizes, generator=generator, dtype=torch.float64).expand(*shape).clone()
        if self.part is not None:
            dim, start, stop = self.part
            there = torch.zeros(shape[dim], dtype=torch.bool)
            there[start:stop] = True
            added *= there.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        return added

    def __str__(self) -> str:
        where = f"[{self.part[1]}:{self.part[2]}]" if self.part is not None else ""
        what = f"the same along {' and '.join(map(str, self.uniform))}" if self.uniform else "anything"
        return f"{self.parameter}{where}: {what}, for {self.reason}"


@dataclass(frozen=True)
class General:
    """The part of a spec that is about more than permutations.

    Args:
        actions: for a parameter one action for each occurrence of a group in it, in the order of its text; parameters
            on which nothing but permutations acts may be left out.
        reasons: for a group what kept its structure from being larger.
        null_directions: what can be added to parameters without effect.
        untied: for each name under which a further module of the model holds a parameter the first name of it, if the
            spec is that of the model with these parameters untied.
        gains_that_stay: the gains between which matrices act and which something else reads, so that a network cannot
            be given the gains of another.
    """

    actions: Mapping[str, tuple[Action, ...]]
    reasons: Mapping[str, str] = field(default_factory=dict)
    null_directions: tuple[NullDirection, ...] = ()
    untied: Mapping[str, str] = field(default_factory=dict)
    gains_that_stay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("actions", "reasons", "untied"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:
        return General, (
            dict(self.actions), dict(self.reasons), self.null_directions, dict(self.untied), self.gains_that_stay
        )  # fmt: skip

    def untie(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict of the tied model with what it leaves out: the same tensors under the names that are untied."""
        missing = {n: state_dict[s] for n, s in self.untied.items() if n not in state_dict and s in state_dict}
        return {**state_dict, **missing} if missing else state_dict

    def check(self, groups: Mapping[str, Group], layouts: Mapping[str, Layout], shapes: Mapping[str, Any]) -> None:
        """Raise SpecError, naming the parameter, unless the actions fit these groups and where they stand."""
        for name, source in self.untied.items():
            if name not in layouts or source not in layouts:
                raise SpecError(f"{name!r} is untied from {source!r}, but one of them has no axes")
        for direction in self.null_directions:
            if direction.parameter not in layouts:
                raise SpecError(f"there is a null direction of {direction.parameter!r}, but no axes")
        for name in self.gains_that_stay:
            if name not in layouts:
                raise SpecError(f"{name!r} is a gain that stays, but has no axes")
        for name, actions in self.actions.items():
            if name not in layouts:
                raise SpecError(f"there are actions for {name!r}, but no axes")
            occurrences = layouts[name].occurrences
            if len(actions) != len(occurrences):
                raise SpecError(f"{name!r} has {len(occurrences)} axes of groups, but {len(actions)} actions")
            for action, occurrence in zip(actions, occurrences, strict=True):
                structure = groups[occurrence.group].structure
                where = f"{name!r}, dimension {occurrence.dim}: the action of {occurrence.group}, {structure},"
                if not _fits(action, structure):
                    raise SpecError(f"{where} has powers {action.powers} and signs {action.signs}")
                for gain, _ in action.gains:
                    if max(shapes.get(gain.name, ()), default=0) != groups[occurrence.group].size:
                        raise SpecError(f"{where} is between the gains {gain}, which is no such parameter")

    def as_json(self) -> dict[str, Any]:
        """Lists and dictionaries that say the same."""
        return {
            "actions": {
                name: [[list(a.powers), list(a.signs), [[*gain, power] for gain, power in a.gains]] for a in actions]
                for name, actions in self.actions.items()
            },
            "reasons": dict(self.reasons),
            "null_directions": [
                [d.parameter, list(d.uniform), d.part and list(d.part), d.reason] for d in self.null_directions
            ],
            "untied": dict(self.untied),
            **({"gains_that_stay": list(self.gains_that_stay)} if self.gains_that_stay else {}),
        }

    @classmethod
    def from_json(cls, content: Any) -> General:
        """Read what `as_json` wrote.

        Raises SpecError if it is malformed.
        """
        try:
            actions = {
                name: tuple(
                    Action(
                        tuple(map(int, powers)),
                        tuple(map(int, signs)),
                        tuple((Gain(str(gain), float(added)), int(power)) for gain, added, power in gains),
                    )
                    for powers, signs, gains in rows
                )
                for name, rows in content["actions"].items()
            }
            reasons = {str(name): str(why) for name, why in content["reasons"].items()}
            nulls = tuple(
                NullDirection(str(name), tuple(map(int, uniform)), part and tuple(map(int, part)), str(why))
                for name, uniform, part, why in content.get("null_directions", ())
            )
            untied = {str(name): str(source) for name, source in content.get("untied", {}).items()}
            stay = tuple(map(str, content.get("gains_that_stay", ())))
            return cls(actions, reasons, nulls, untied, stay)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SpecError(f"general: malformed: {type(error).__name__}: {error}") from None


def _fits(action: Action, structure: Structure) -> bool:
    if structure.linear:
        return action.powers in ((), (1,), (-1,)) and not action.signs and (bool(action.powers) or not action.gains)
    counts = (0, structure.scales), (0, structure.signs + structure.flips)
    lengths = len(action.powers) in counts[0], len(action.signs) in counts[1]
    return all(lengths) and set(action.signs) <= {0, 1} and not action.gains
