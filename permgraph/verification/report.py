"""What `verify` reports: the whole verdict, that of each group, and each control."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Control:
    """What happened when a group was moved on all of its axes but this one: the relative change of the output.

    Of a group with this one axis: what happened when the weights that it moves were scaled at random.
    """

    group: str
    parameter: str
    dim: int
    change: float
    passed: bool


@dataclass(frozen=True)
class GroupReport:
    """One group: the relative error when it is moved, and the controls that were tried on it.

    `error` is that of the common move of all groups, unless that failed: then it is this group's own.
    """

    name: str
    size: int
    error: float
    controls: tuple[Control, ...]
    passed: bool

    @property
    def inert(self) -> tuple[tuple[str, int], ...]:
        """Axes on which leaving the group unmoved changed nothing: they have no influence on the output."""
        return tuple((c.parameter, c.dim) for c in self.controls if not c.passed)

    @property
    def inert_throughout(self) -> bool:
        """Whether controls were tried, and none of them changed anything."""
        return bool(self.controls) and not any(c.passed for c in self.controls)


@dataclass(frozen=True)
class Verification:
    """Whether a spec preserves the model's function, and whether the test could have told.

    `max_error` is relative to the largest magnitude in the outputs; `tolerance` is what it may be. `untried` names the
    groups for which there was no time left to try a control: they were moved with the others, and that is all.
    """

    passed: bool
    max_error: float
    tolerance: float
    groups: Mapping[str, GroupReport] = field(repr=False)
    outputs: int = 0
    note: str = ""
    untried: tuple[str, ...] = ()

    @property
    def controls(self) -> tuple[Control, ...]:
        """All controls of all groups."""
        return tuple(control for group in self.groups.values() for control in group.controls)

    @property
    def failed(self) -> tuple[str, ...]:
        """The groups which do not preserve the function, or on which no control changed anything."""
        return tuple(name for name, group in self.groups.items() if not group.passed)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        lines = [
            f"verification {verdict}: {len(self.groups)} groups moved, relative error {self.max_error:.1e} "
            f"(at most {self.tolerance:.0e}), {len(self.controls)} controls"
        ]
        if self.note:
            lines.append(self.note)
        if self.untried:
            lines.append(f"no time for controls on {len(self.untried)} groups: {', '.join(self.untried[:6])}")
        for name in self.failed:
            group = self.groups[name]
            why = (
                f"error {group.error:.1e}"
                if group.error > self.tolerance or math.isnan(group.error)
                else f"no control changed the output ({', '.join(f'{p}[{d}]' for p, d in group.inert)})"
            )
            lines.append(f"  {name} ({group.size}): {why}")
        return "\n".join(lines)
