"""Coordinate ascent over groups of all structures: each step is the best element of one group with all others at rest.

The moves are those of weight matching over permutations (`permgraph.matching.problem.moves`): a group with those that
are fibred over it is solved by nesting, so that what two heads are worth to each other is what their inner groups can
make of them: nuclear norms for rotations, phases for rotary pairs, assignments for units.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from permgraph.assignment.solve import Solver
from permgraph.conventions.outcomes import Outcome
from permgraph.matching.general.acting import Acting, Element, composed
from permgraph.matching.general.compact import best_element, best_value, signs_of, whole
from permgraph.matching.matcher import Progress, Sweep
from permgraph.matching.problem.moves import Move, Node, Place, Plan
from permgraph.matching.problem.objective import dot
from permgraph.matching.threads import look_again
from permgraph.structures import Structure

TOLERANCE = 1e-6
"""An ascent has converged when a whole sweep adds less than this, relative to the objective."""

ROUGHLY = 1e-5
"""The same, where it is only to be known which of several ascents goes on."""

PACE, AHEAD = 2, 10
"""An ascent is given up where so many more sweeps, at the mean pace of the last few, would not reach the best one."""

INNER_SWEEPS = 6
"""Rounds over the groups inside a root that meet each other, for each pair of its indices."""

HOLDS = (0.0, 0.1, 0.4, 1.6, 6.4)
"""How strongly a step is held back where the objective is quadratic in it, one after the other, until it helps."""


class Climb:
    """One ascent: where B stands, what it is worth there, and the element that took it there.

    Args:
        acting: how the groups act on the compared parameters.
        a, b: the parameters to compare, balanced and without gains.
        plan: what one step can move.
        start: the element at which to begin.
        unknown: groups that no step has placed yet: until one does, what is seen across them is no evidence.
    """

    def __init__(
        self,
        acting: Acting,
        a: Mapping[str, Tensor],
        b: Mapping[str, Tensor],
        plan: Plan,
        start: Element,
        *,
        unknown: Collection[str] = (),
        solver: Solver = "auto",
        started: float = 0.0,
    ) -> None:
        self.acting, self.a, self.plan, self.solver, self.started = acting, a, plan, solver, started
        self.moves = plan.moves
        self.element = start
        self.unknown = set(unknown)
        self.history: list[Sweep] = []
        self.outcome: Outcome = "converged"
        self.added = math.inf  # by the last sweep
        self.goal = -math.inf  # what another ascent has reached: where this one will not get there, it ends early
        self._begin(b)

    def _begin(self, b: Mapping[str, Tensor]) -> None:
        """Bring B to where the ascent starts."""
        inverses = self.acting.inverse_transposes(self.element.matrices)
        self.b = {name: self.acting.act(name, tensor, self.element, inverses) for name, tensor in b.items()}
        self.worth = {name: dot(self.a[name], tensor) for name, tensor in self.b.items()}

    @property
    def objective(self) -> float:
        """The sum of inner products with A, where B stands."""
        return sum(self.worth.values())

    def climb(
        self, max_sweeps: int, progress: Progress | None = None, tolerance: float = TOLERANCE, done: int = 0
    ) -> None:
        """Sweep over the moves until a whole sweep adds nothing, or go on so; Ctrl-C ends it where it stands.

        Args:
            max_sweeps: how many there may be, those `done` by an earlier run included.
            progress: called after each.
            tolerance: what counts as nothing, relative to the objective.
            done: how many an earlier run has made to reach the start.
        """
        try:
            self.outcome = "converged"
            for number in range(done + len(self.history) + 1, max_sweeps + 1):
                before, first = self.objective, bool(self.unknown)
                moved: dict[str, int] = {}
                gains: dict[str, float] = {}
                for move in self.moves:
                    at = 0.0 if first else self.objective
                    if self.step(move):
                        moved[move.name] = self.acting.spec.groups[move.name].size
                        if not first:
                            gains[move.name] = self.objective - at
                self.unknown.clear()
                sweep = Sweep(number, self.objective, moved, gains, time.perf_counter() - self.started)
                self.history.append(sweep)
                self.added = math.inf if first else self.objective - before
                last = self.added <= tolerance * abs(self.objective)
                self._end_sweep(sweep, last)
                look_again()
                if progress is not None:
                    progress(sweep)
                if last:
                    return
                if self._falls_short():
                    break
            self.outcome = "sweep limit"
        except KeyboardInterrupt:
            self.outcome = "interrupted"

    def _falls_short(self) -> bool:
        """Whether the objective would stay below the goal even if it went on at the pace of the last sweeps."""
        if len(self.history) <= PACE + 1:  # the first sweep begins anywhere
            return False
        pace = (self.objective - self.history[-1 - PACE].objective) / PACE
        return self.objective + AHEAD * pace < self.goal

    @property
    def is_over(self) -> bool:
        """Whether another sweep would add nothing."""
        return self.added <= TOLERANCE * abs(self.objective)

    def _end_sweep(self, sweep: Sweep, last: bool) -> None:
        """Called after each sweep, of which the last has added nothing."""

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, move: Move) -> bool:
        """Move the groups of one move to where they are worth most; false if that helps nothing."""
        held = move.quadratic and not self.unknown
        before = self.objective
        for hold in HOLDS if held else HOLDS[:1]:
            kept = self.b, self.worth, self.element
            self.b, self.worth = dict(self.b), dict(self.worth)
            self._place(move, hold)
            if self.unknown or self.objective > before:
                self.unknown -= move.groups
                return True
            self.b, self.worth, self.element = kept
        return False

    def _place(self, move: Move, hold: float) -> None:
        """Place the root of a move, then what is inside it."""
        node = move.root
        if move.paired:
            inner = [other for other in self.moves if other.name in self.plan.inside(move.name)]
            best = best_element(Structure(), {(): self._pairs(move, inner)}, self.solver)
            self._apply(node.group, best.step(node.group))
            self._settle(inner)
            return
        best = best_element(self.acting.structure(node.group), self._held(self._grams(node), hold), self.solver)
        self._apply(node.group, best.step(node.group))
        for below in move.then:
            self._place(below, hold)

    def _settle(self, moves: Sequence[Move]) -> None:
        """Move some groups in turns, as if none of them had a place yet, for a few rounds."""
        self.unknown |= {name for move in moves for name in move.groups}
        for _ in range(INNER_SWEEPS):
            before = self.objective
            for move in moves:
                self.step(move)
            if self.objective - before <= TOLERANCE * abs(self.objective):
                break

    def _pairs(self, move: Move, inner: Sequence[Move]) -> Tensor:
        """What it is worth to put each of B's indices of a root in the place of each of A's: (*batch, i, j).

        Groups inside the root that meet each other cannot be chosen by one nesting. So for each i, A's index stands at
        all places of the root, and an ascent of its own finds what each j can make of it.
        """
        root, names = move.name, self.acting.touched([move.name])
        size, sizes = self.acting.spec.groups[root].size, self.acting.parents(root)
        rows = []
        for i in range(size):
            alike = Element({root: torch.full((*sizes, size), i, dtype=torch.long, device=self.a[names[0]].device)})
            a = {name: self.acting.act(name, self.a[name], alike) for name in names}
            b = {name: self.b[name] for name in names}
            each = Climb(self.acting, a, b, self.plan, Element(), unknown=self.unknown, solver=self.solver)
            each._settle(inner)
            rows.append(each._worth_by(root))
        return torch.stack(rows, -2)

    def _worth_by(self, root: str) -> Tensor:
        """How much of the objective stands at each index of a group: (*parents' sizes, size)."""
        total = None
        for place in self.acting.of_group[root]:
            name = place.block.parameter
            product = place.block.view(self.a[name]) * place.block.view(self.b[name])
            own = place.rows(product).sum(-2)
            total = own if total is None else total + own
        assert total is not None
        return total

    def _apply(self, group: str, step: Element) -> None:
        """Let one group take a step, whose matrices are orthogonal: each is its own inverse transpose."""
        for name in self.acting.touched([group]):
            self.b[name] = self.acting.act(name, self.b[name], step, step.matrices)
            self.worth[name] = dot(self.a[name], self.b[name])
        self.element = composed(self.acting, step, self.element)

    def _held(self, grams: dict[tuple[int, ...], Tensor], hold: float) -> dict[tuple[int, ...], Tensor]:
        """Gram matrices to which staying is worth something more."""
        if not hold:
            return grams
        scale = max(float(gram.abs().amax()) for gram in grams.values())
        n = next(iter(grams.values())).shape[-1]
        return {
            key: gram + hold * scale * torch.eye(n, dtype=gram.dtype, device=gram.device) for key, gram in grams.items()
        }

    # --- Gram matrices ------------------------------------------------------------------------------------------------

    def _grams(self, node: Node) -> dict[tuple[int, ...], Tensor]:
        """What each pair of a node's indices is worth, by the exponents of its signs; shape (*batch, *pairs).

        The pairs are those of the groups of the move above it, from the root's to its own.
        """
        sums = self._own_grams(node)
        for inner in node.inner:
            value = best_value(self.acting.structure(inner.group), self._grams(inner), self.solver)
            self._add_inner(sums, value, node, inner)
        return self._whole_grams(sums, node)

    def _own_grams(self, node: Node) -> dict[tuple[int, ...], Tensor]:
        """Of the Gram matrices of a node what comes from where it stands itself."""
        sums: dict[tuple[int, ...], Tensor] = {}
        for place in node.places:
            if self._is_evidence(place):
                key = signs_of(self.acting.action(place.block, place.own[-1]))
                view = place.block.view(self.b[place.block.parameter])
                gram = place.gram(place.block.view(self.a[place.block.parameter]), view, self.unknown)
                sums[key] = sums[key] + gram if key in sums else gram
        return sums

    def _add_inner(self, sums: dict[tuple[int, ...], Tensor], value: Tensor, node: Node, inner: Node) -> None:
        """Add to a node's Gram matrices what a node inside it is worth for each pair of its indices."""
        lost = [at for at, name in enumerate(inner.batch) if name not in node.batch]
        value = value.sum(lost) if lost else value
        sums[()] = sums[()] + value if () in sums else value

    def _whole_grams(self, sums: dict[tuple[int, ...], Tensor], node: Node) -> dict[tuple[int, ...], Tensor]:
        """A node's Gram matrices as its structure counts them; those of staying where nothing speaks for any place."""
        structure = self.acting.structure(node.group)
        if not sums:
            sizes = [self.acting.spec.groups[name].size for name in node.batch]
            pairs = [self.acting.spec.groups[name].size for name in node.chain for _ in range(2)]
            some = next(iter(self.a.values()))
            sums[()] = some.new_zeros(*sizes, *pairs)
            sums[()].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return sums if structure.signs + structure.flips else {(): whole(sums)}

    def _is_evidence(self, place: Place) -> bool:
        """Whether what is seen here hangs on no group yet unplaced whose elements have a mean of zero."""
        for axis, leaf in enumerate(place.block.leaves):
            if leaf.group in self.unknown and axis not in place.own:
                structure = self.acting.structure(leaf.group)
                action = self.acting.action(place.block, axis)
                if structure.linear or any(action.signs):
                    return False
        action = self.acting.action(place.block, place.own[-1])
        leaf = place.block.leaves[place.own[-1]]
        assert leaf.group is not None
        # A gain, which its group's matrices leave alone.
        return bool(action.powers) or not self.acting.structure(leaf.group).linear
