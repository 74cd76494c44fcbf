"""Coordinate ascent: the engine of weight matching, in memory and streamed.

A run holds the present permutation and the moves that may still raise the objective. A sweep gives each of those its
turn; a move that is taken puts its neighbours among them again, and the run ends when none is left. A move of one group
is a linear assignment. One with groups nested in it, or of a group that occurs twice in a block, is judged by what it
does to the objective itself, and tried with more and more weight on staying until that rises. So the objective never
falls once all groups are known.

A kind of run says where tensors come from: what a step sees, what a step that is being tried would gain, and what
is to be done once it is taken.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from permgraph.assignment.solve import Solver
from permgraph.conventions.outcomes import Outcome
from permgraph.matching import tuned
from permgraph.matching.ascent.paired import paired_values
from permgraph.matching.ascent.step import Scene, choose, outer_values, rounding_of
from permgraph.matching.matcher import Progress, Sweep
from permgraph.matching.problem.limits import Limits, choose_limited
from permgraph.matching.problem.moves import Move, Plan, Tensors
from permgraph.matching.problem.order import ranks
from permgraph.matching.problem.renumber import Arrays
from permgraph.matching.threads import look_again
from permgraph.spec.permutation import compose

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A step that has not been taken yet.

    Attributes:
        step: for the groups that it renumbers, how, from where they stand.
        tensors: B's tensors after it, where the run keeps them.
    """

    step: Arrays = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


class Climb(ABC):
    """One run of coordinate ascent.

    Attributes:
        plan, spec: the moves, and the spec over which they are.
        limits: on which groups there are some.
        scale: what a gain of the inner products is worth in the objective that is reported.
        free: groups whose permutation is not known yet: B is averaged over all of them.
        stale: the moves that may raise the objective.
        objective: as it is reported; NaN where nobody has computed it.
        outcome: so far.
        history: one record for each sweep.
        turns: how many moves have had their turn in this sweep.
        sweeps_before: how many sweeps an earlier run has made that this one goes on from.
    """

    nested_wait = False
    """Whether moves of several groups wait, after the first sweep, until nothing else helps."""

    scale = 1.0

    def __init__(
        self,
        plan: Plan,
        solver: Solver,
        limits: Mapping[str, Limits],
        max_sweeps: int,
        started: float,
        sweeps_before: int = 0,
    ) -> None:
        self.plan, self.spec, self.solver, self.limits = plan, plan.spec, solver, limits
        self.max_sweeps, self.started, self.sweeps_before = max_sweeps, started, sweeps_before
        self.free: set[str] = set()
        self.stale = set(range(len(plan.moves)))
        self.history: list[Sweep] = []
        self.outcome: Outcome = "sweep limit"
        self.objective = 0.0
        self.turns = 0

    # --- what a kind of run says --------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def arrays(self) -> Arrays:
        """How the groups stand, for those that have moved."""

    @abstractmethod
    def order(self) -> Iterable[int]:
        """The moves in the order in which they take their turns in the coming sweep."""

    @abstractmethod
    def take(self, numbers: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Take moves, no two of which are neighbours, where they raise the objective; each with what it gained."""

    @abstractmethod
    def scene(self, move: Move, trial: Trial) -> Scene:
        """The two models as a step of this move sees them, after what has been tried so far."""

    @abstractmethod
    def after(self, trial: Trial, move: Move, step: Arrays) -> Trial:
        """What has been tried so far, and then a step in this move's parameters."""

    @abstractmethod
    def gain(self, trial: Trial, move: Move) -> tuple[float, float]:
        """What a step would add to the inner products of the move's parameters, and what they are now."""

    @abstractmethod
    def apply(self, number: int, trial: Trial) -> None:
        """Take a step of a move of several groups."""

    @abstractmethod
    def computed_objective(self) -> float:
        """The objective here, computed from the tensors."""

    def note_progress(self) -> None:  # noqa: B027
        """Called whenever the objective has been brought up to date."""

    def agree(self, trial: Trial, gain: float) -> tuple[Trial, float]:
        """What all processes that match together take for the step and its gain."""
        return trial, gain

    # --- the ascent ---------------------------------------------------------------------------------------------------

    def climb(self, progress: Progress | None = None) -> None:
        """Sweep until no move helps, or the limit; raises KeyboardInterrupt in the middle of a sweep."""
        while self.stale and self.sweeps_before + len(self.history) < self.max_sweeps:
            self._sweep()
            log.debug("%s", self.history[-1])
            if progress is not None:
                progress(self.history[-1])
            self.end_sweep()
        if not self.stale:
            self.outcome = "converged"

    def end_sweep(self) -> None:  # noqa: B027
        """Called after each sweep."""

    def _sweep(self) -> None:
        before, unknown = dict(self.arrays), bool(self.free)
        gains: dict[str, float] = {}
        moves = self.plan.moves
        wait = self.nested_wait and bool(self.history) and any(len(moves[n].groups) == 1 for n in self.stale)
        # A move made stale on the way takes its turn in this sweep if that is still to come, else in the next.
        visited = 0
        for rank in ranks(list(self.order()), self.plan.neighbours):
            self.turns, visited = visited, visited + len(rank)
            look_again()
            due = [n for n in rank if n in self.stale and not (wait and len(moves[n].groups) > 1)]
            for number, gain in self.take(due):
                gains[moves[number].name] = gains.get(moves[number].name, 0.0) + gain
                # What a step seems to gain while groups are unknown is not what it gains.
                self.objective = float("nan") if unknown else self.objective + self.scale * gain
                self.note_progress()
                self.turns += 1
        if unknown:
            self.objective = self.computed_objective()
            self.note_progress()
        moved = {name: differing(now, before.get(name)) for name, now in self.arrays.items()}
        self.history.append(
            Sweep(
                self.sweeps_before + len(self.history) + 1,
                self.objective,
                {name: count for name, count in moved.items() if count},
                {} if unknown else {name: gain * self.scale for name, gain in gains.items() if gain},
                time.perf_counter() - self.started,
            )
        )

    def step(self, number: int) -> float:
        """Take one move if it raises the objective; what it gained."""
        move = self.plan.moves[number]
        known = not self.free & self.plan.meeting[number]
        trial, gain = self.agree(*self.best(move, known))
        self.settle(number)
        if not trial.step:
            return 0.0
        self.apply(number, trial)
        self.stale |= self.plan.neighbours[number]
        if move.quadratic or move.paired:
            self.stale.add(number)
        return gain

    def settle(self, number: int) -> None:
        """A move has had its turn: it is not stale, and its groups are known."""
        self.stale.discard(number)
        self.free -= self.plan.moves[number].groups

    def best(self, move: Move, known: bool) -> tuple[Trial, float]:
        """The step of a move and what it gains; `known` is whether all groups are that it meets."""
        return self._paired(move, known) if move.paired else self._nested(move, known)

    def choose(self, values: torch.Tensor, move: Move) -> tuple[np.ndarray, float]:
        """The best renumbering of a move's root within its limits, and what it gains."""
        return choose_limited(values, self.solver, move.name, self.limits, self.arrays)

    def _nested(self, move: Move, known: bool) -> tuple[Trial, float]:
        """The step of a root and of what is inside it, with more and more weight on staying until it gains."""
        values = outer_values(self.scene(move, Trial()), move.root)
        if not known:
            columns, promised = self.choose(values, move)
            return self._follow(move, move, columns, Trial()), promised
        diagonal = values.diagonal(dim1=-2, dim2=-1)
        damping = 0.0
        for _ in range(tuned.QUADRATIC_TRIALS if move.quadratic else 1):
            columns, promised = self.choose(values, move)
            trial = self._follow(move, move, columns, Trial())
            if not trial.step:
                break
            gain, present = self.gain(trial, move)
            if gain > rounding_of(values) * abs(present):
                return trial, gain
            damping = 2 * damping if damping else 0.5 * promised / max(1, differing(columns))
            diagonal += damping
        return Trial(), 0.0

    def _follow(self, outer: Move, move: Move, columns: np.ndarray, trial: Trial) -> Trial:
        """What has been tried, then the step that renumbers a root so, and then the best inside it."""
        if differing(columns):
            trial = self.after(trial, move, {move.name: columns})
        for inner in move.then:
            values = outer_values(self.scene(outer, trial), inner.root)
            trial = self._follow(outer, inner, choose(values, self.solver, inner.name)[0], trial)
        return trial

    def _paired(self, move: Move, known: bool) -> tuple[Trial, float]:
        """The step of a root and of what each of its pairs has chosen inside, if it gains."""
        blocks = tuple(self.plan.blocks_with[move.name])
        values, inside = paired_values(self.scene(move, Trial()), move, blocks)
        columns, _ = self.choose(values, move)
        step: Arrays = {move.name: columns}
        for name, chosen in inside.items():
            step[name] = np.take_along_axis(chosen, columns[..., None, None], axis=-2)[..., 0, :]
        step = {name: array for name, array in step.items() if differing(array)}
        if not step:
            return Trial(), 0.0
        trial = self.after(Trial(), move, step)
        gain, present = self.gain(trial, move)
        return (trial, gain) if gain > rounding_of(values) * abs(present) or not known else (Trial(), 0.0)

    def extended(self, trial: Trial, step: Arrays) -> Arrays:
        """The step of a trial, and then another."""
        return {**trial.step, **compose(self.spec, step, trial.step)}

    def arrays_after(self, trial: Trial) -> Arrays:
        """How the groups would stand after a trial."""
        return {**self.arrays, **compose(self.spec, trial.step, self.arrays)} if trial.step else self.arrays


def differing(now: np.ndarray, before: np.ndarray | None = None) -> int:
    """In how many places two arrays of a group differ; from the identity, if no other is given."""
    return int((now != (np.arange(now.shape[-1]) if before is None else before)).sum())
