"""What `verify` reports: the whole verdict, that of each group, each control, and which inputs were tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from permgraph.conventions.displayed import Displayed


@dataclass(frozen=True)
class Control:
    """What happened when a group was moved on all of its axes but this one: the relative change of the output.

    If `scaled`: what happened when what the group moves of this parameter was scaled at random instead. That is the
    control of a group of one axis, and of one whose axes may each stay behind without harm.
    """

    group: str
    parameter: str
    dim: int
    change: float
    passed: bool
    scaled: bool = False


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
        return tuple((c.parameter, c.dim) for c in self.controls if not c.passed and not c.scaled)

    @property
    def inert_throughout(self) -> bool:
        """Whether controls were tried, and none of them changed anything."""
        return bool(self.controls) and not any(c.passed for c in self.controls)


@dataclass(frozen=True)
class Run:
    """One way in which the model was run, and what moving all groups changed then.

    Attributes:
        name: what is varied, such as ``"larger sizes in training mode"``; of the first, ``"the inputs"``.
        inputs: the arguments' dtypes and shapes.
        error: the relative error; None if the outputs were not compared.
        reason: why they were not.
        failed: the groups which do not preserve the function on these inputs.
    """

    name: str
    inputs: str
    error: float | None = None
    reason: str = ""
    failed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}, {self.inputs}" + (f": {self.reason}" if self.reason else "")


class OwnPrecision(NamedTuple):
    """Relative errors in a model's own precision.

    Attributes:
        moved: of the transformed model's outputs, against the model's own in float64.
        rounding: of the model's own outputs as they are, against the same.
        dtype: the precision.
    """

    moved: float
    rounding: float
    dtype: str

    def __str__(self) -> str:
        return f"in {self.dtype} the outputs are {self.moved:.1e} from exact ones, and were {self.rounding:.1e} before"


@dataclass(frozen=True, repr=False)
class Verification(Displayed):
    """Whether a spec preserves the model's function, and whether the test could have told.

    Attributes:
        passed: whether it does, on all inputs that were tried.
        max_error: relative to the largest magnitude in the outputs, over all runs.
        tolerance: what it may be.
        groups: what was found of each group.
        outputs: the number of tensors compared in the first run.
        note: what else to know.
        untried: the groups for which there was no time left to try a control: they were moved with the others, and
            that is all.
        runs: the inputs on which the model was run, the given ones first, and those on which it was not, with the
            reason.
        unread: parameters and buffers that no pass of the inference read, so that nothing is known of them.
        own_precision: of a transformation of the model's own weights, what it does in their own precision.
    """

    passed: bool
    max_error: float
    tolerance: float
    groups: Mapping[str, GroupReport] = field(repr=False)
    outputs: int = 0
    note: str = ""
    untried: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    unread: tuple[str, ...] = ()
    own_precision: OwnPrecision | None = None

    @property
    def controls(self) -> tuple[Control, ...]:
        """All controls of all groups."""
        return tuple(control for group in self.groups.values() for control in group.controls)

    @property
    def failed(self) -> tuple[str, ...]:
        """The groups which do not preserve the function."""
        return tuple(name for name, group in self.groups.items() if not group.passed)

    @property
    def without_influence(self) -> tuple[str, ...]:
        """The groups of which no control changed the output.

        What they move has no part in it, so that any move is harmless. Such are units that a model computes and
        leaves out. Nothing more was shown of them.
        """
        return tuple(name for name, group in self.groups.items() if group.inert_throughout)

    def with_runs(self, runs: Sequence[Run]) -> Self:
        """The verdict with what further inputs showed."""
        errors = [run.error for run in runs if run.error is not None]
        failed = {name for run in runs for name in run.failed}
        return replace(
            self,
            passed=self.passed and all(error <= self.tolerance for error in errors),
            max_error=max([self.max_error, *errors]),
            groups={n: replace(report, passed=report.passed and n not in failed) for n, report in self.groups.items()},
            runs=(*self.runs, *runs),
        )

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        lines = [
            f"verification {verdict}: {len(self.groups)} groups moved, relative error {self.max_error:.1e} "
            f"(at most {self.tolerance:.0e}), {len(self.controls)} controls"
        ]
        compared = [run for run in self.runs if run.error is not None]
        if compared:
            first, *others = compared
            also = f"; also with {', '.join(run.name for run in others)}" if others else ""
            lines.append(f"on {first.inputs}{also}")
        if self.own_precision is not None:
            lines.append(str(self.own_precision))
        lines += [f"not compared with {run}" for run in self.runs if run.error is None]
        if self.note:
            lines.append(self.note)
        if self.untried:
            lines.append(f"no time for controls on {len(self.untried)} groups: {_some(self.untried)}")
        if self.without_influence:
            lines.append(
                f"no control changed the output, on which these have no influence: {_some(self.without_influence)}"
            )
        if self.unread:
            lines.append(f"never read, so that nothing is known of them: {_some(self.unread)}")
        for run in self.runs:
            if run.error is not None and not run.error <= self.tolerance:
                lines.append(f"  wrong on {run.name}, {run.inputs}: relative error {run.error:.1e}")
        for name in self.failed:
            group = self.groups[name]
            why = "" if math.isfinite(group.error) and group.error <= self.tolerance else f": error {group.error:.1e}"
            where = [run.name for run in self.runs[1:] if name in run.failed]
            lines.append(f"  {name} ({group.size}){why}" + (f", with {', '.join(where)}" if where else ""))
        return "\n".join(lines)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
