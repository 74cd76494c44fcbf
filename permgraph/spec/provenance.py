"""Records of why axes are tied to each other or stay put: the constraints that inference kept."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Slot: TypeAlias = str
"""A dimension of a parameter, or of a tensor in the graph, as text: ``"fc1.weight[0]"``, ``"addmm_3[1]"``."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A dimension of a parameter, or a factor of it of ``size`` indices, that stays put, and why."""

    parameter: str
    dim: int
    size: int
    reason: str
    operator: str | None = None
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Parameters that stand in like places of a model, of which the first does not change places with the others."""

    reason: str
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unread:
    """A dimension of a parameter of which no pass read all, and the moving groups to which it may belong."""

    parameter: str
    dim: int
    size: int
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UnknownOp:
    """An operator without a rule, met ``count`` times: everything that it touches is pinned."""

    operator: str
    count: int
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass that inference looked at, or tried to.

    Attributes:
        name: how it differs from the first one.
        operators: how many operators ran.
        outcome: ``"solved"``, its constraints hold; ``"alike"``, an earlier pass says the same of other sizes;
            ``"failed"``, the module raised; or ``"not run"``.
        inputs: dtypes and shapes of what the module was called on.
        mode: evaluation or training mode, and how often it was called.
        says: what it added, or why it did not run.
        by_products: how many of its outputs are computed on the way to others, for which it is no promise.
    """

    name: str
    operators: int
    outcome: str
    inputs: str
    mode: str
    says: str
    by_products: int = 0


@dataclass(frozen=True, slots=True)
class Tie:
    """Two slots that an operator made one axis, or one made of the other."""

    a: Slot
    b: Slot
    operator: str | None = None
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class SlotPin:
    """A slot at which something stays put, and why."""

    slot: Slot
    reason: str
    operator: str | None = None
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Constraints:
    """Everything that inference found: what tied slots to each other, and what pinned them."""

    ties: tuple[Tie, ...] = ()
    pins: tuple[SlotPin, ...] = ()

    @functools.cached_property
    def neighbours(self) -> Mapping[Slot, tuple[tuple[Slot, Tie], ...]]:
        """For each slot, the slots that one tie away from it, with the tie."""
        found: dict[Slot, list[tuple[Slot, Tie]]] = {}
        for tie in self.ties:
            found.setdefault(tie.a, []).append((tie.b, tie))
            found.setdefault(tie.b, []).append((tie.a, tie))
        return {slot: tuple(near) for slot, near in found.items()}

    @functools.cached_property
    def pins_at(self) -> Mapping[Slot, tuple[SlotPin, ...]]:
        """For each slot that was pinned, its pins."""
        found: dict[Slot, list[SlotPin]] = {}
        for pin in self.pins:
            found.setdefault(pin.slot, []).append(pin)
        return {slot: tuple(pins) for slot, pins in found.items()}

    def reached(self, start: Slot, through: Callable[[Slot], bool]) -> Reached:
        """A shortest path from ``start`` to each slot that can be reached by slots for which ``through`` holds."""
        steps: dict[Slot, tuple[Slot, Tie] | None] = {start: None}
        queue = deque([start])
        while queue:
            slot = queue.popleft()
            for near, tie in self.neighbours.get(slot, ()):
                if near not in steps and through(near):
                    steps[near] = slot, tie
                    queue.append(near)
        return Reached(steps)


@dataclass(frozen=True)
class Reached:
    """The slots that were reached from one, the nearest first, each with the last step of a shortest path to it."""

    steps: Mapping[Slot, tuple[Slot, Tie] | None]

    def path(self, slot: Slot) -> tuple[Tie, ...]:
        """The ties on the path to ``slot``; none if it was not reached."""
        ties: list[Tie] = []
        step = self.steps.get(slot)
        while step is not None:
            slot, tie = step
            ties.append(tie)
            step = self.steps[slot]
        return tuple(reversed(ties))
