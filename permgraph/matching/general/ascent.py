"""Coordinate ascent over groups of all structures: each step is the best element of one group with all others at rest.

The moves are those of weight matching over permutations (`permgraph.matching.problem.moves`): a group with those that
are fibred over it is solved by nesting, so that what two heads are worth to each other is what their inner groups can
make of them: nuclear norms for rotations, phases for rotary pairs, assignments for units.

Assignments jump to where they stay, and rotations that meet creep. So between two sweeps over all moves there are
rounds over the rotations alone, which are cheap: what they are worth to each other across units that rest is known.
Each round goes on a little the way that the last one went before it looks (Nesterov 1983), and is taken back where that
is no gain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from permgraph.assignment.solve import Solver
from permgraph.conventions.outcomes import Outcome
from permgraph.matching.general.acting import Acting, Element, composed
from permgraph.matching.general.acting import Place as Acted
from permgraph.matching.general.compact import Best, best_element, best_value, gain, signs_of, whole
from permgraph.matching.general.polar import polar
from permgraph.matching.general.standing import Across, KeptGrams, Standing, Step
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

ROUNDS = 40
"""The most rounds over rotations alone between two sweeps."""

SHARE = 0.02
"""Such rounds end where one adds less than this share of what has been added since the last sweep began or, after the
first one, since they did."""

HOLDS = (0.0, 0.1, 0.4, 1.6, 6.4)
"""How strongly a step is held back where the objective is quadratic in it, one after the other, until it helps."""


State: TypeAlias = tuple[Mapping[str, Tensor], Element, float | None, KeptGrams, dict[str, Tensor]]
"""Where an ascent stands: B, the element, the objective if it is known, and the Gram matrices that hold there."""


class Climb:
    """One ascent: where B stands, what it is worth there, and the element that took it there.

    Args:
        acting: how the groups act on the compared parameters.
        a, b: the parameters to compare, balanced and without gains.
        plan: what one step can move.
        start: the element at which to begin.
        unknown: groups that no step has placed yet: until one does, what is seen across them is no evidence.
        solver: for the assignments.
        started: when the match began, by `time.perf_counter`.
        tolerance: the ascent has converged when a whole sweep adds less than this, relative to the objective.
    """

    keeps_few = False
    """Whether of a rotation's Gram matrix two shares are kept at most: across from what nothing moves, and the rest."""

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
        tolerance: float = TOLERANCE,
    ) -> None:
        self.acting, self.a, self.plan, self.solver, self.started = acting, a, plan, solver, started
        self.moves, self.tolerance = plan.moves, tolerance
        self.element = start
        self.unknown = set(unknown)
        self.history: list[Sweep] = []
        self.outcome: Outcome = "converged"
        self.added = math.inf  # by the last sweep
        self._total: float | None = None  # the objective, where it is known
        self._gained = 0.0  # by the step that is being made
        self._kept = KeptGrams()
        self._nets: dict[str, Tensor] = {}  # how far rotations have gone in this round
        self._is_ahead = False  # whether this round has gone on without looking
        self._seen: dict[str, Tensor] = {}  # Gram matrices of rotations where all stands as it stood then
        self._turning = turning_moves(acting, plan.moves)
        self._restless = frozenset(move.name for move in self._turning)
        self.goal = -math.inf  # what another ascent has reached: where this one will not get there, it ends early
        self._begin(b)

    def _begin(self, b: Mapping[str, Tensor]) -> None:
        """Bring B to where the ascent starts."""
        standing = Standing(self.acting, b)
        if self.element.groups():
            standing.move(Step(None, self.element, self.acting.inverse_transposes(self.element.matrices)))
        self.b: Mapping[str, Tensor] = standing

    @property
    def objective(self) -> float:
        """The sum of inner products with A, where B stands."""
        if self._total is None:
            told = dict(self._told()) if isinstance(self.b, Standing) else {}
            known = {name for names in told for name in names}
            self._total = sum(told.values()) + self._inner(name for name in self.a if name not in known)
        return self._total

    def _told(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """What some parameters are worth together, as a Gram matrix that holds tells it: they need not be moved."""
        found: set[str] = set()
        for group, across, gram in self._kept.shares():
            names = [
                place.block.parameter
                for place in self.acting.of_group[group]
                if _beside(place) == across and place.action.powers
            ]
            whole_ones = all(len(self.acting.blocks[name]) == 1 for name in names) and len(set(names)) == len(names)
            if whole_ones and found.isdisjoint(names):
                found.update(names)
                yield tuple(names), float(gram.diagonal().sum(dtype=torch.float64))

    def _inner(self, names: Iterable[str]) -> float:
        """The sum of the inner products of some parameters, where B stands."""
        return sum(dot(self.a[name], self.b[name]) for name in names)

    def climb(self, max_sweeps: int, progress: Progress | None = None, tolerance: float = 0.0, done: int = 0) -> None:
        """Sweep over the moves until a whole sweep adds nothing, or go on so; Ctrl-C ends it where it stands.

        Args:
            max_sweeps: how many there may be, those `done` by an earlier run included.
            progress: called after each.
            tolerance: what counts as nothing, relative to the objective, if that is more than the ascent's own.
            done: how many an earlier run has made to reach the start.
        """
        tolerance = max(tolerance, self.tolerance)
        try:
            self.outcome = "converged"
            for number in range(done + len(self.history) + 1, max_sweeps + 1):
                first = bool(self.unknown)
                before = 0.0 if first else self.objective
                moved: dict[str, int] = {}
                gains: dict[str, float] = {}
                for move in self.moves:
                    at = 0.0 if first else self.objective
                    if self.step(move):
                        moved[move.name] = self.acting.spec.groups[move.name].size
                        if not first:
                            gains[move.name] = self.objective - at
                self.unknown.clear()
                if first or self.objective - before > tolerance * abs(self.objective):
                    self._turn(self.objective if first else before, tolerance)
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
        return self.added <= self.tolerance * abs(self.objective)

    def _end_sweep(self, sweep: Sweep, last: bool) -> None:
        """Called after each sweep, of which the last has added nothing."""

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, move: Move) -> bool:
        """Move the groups of one move to where they are worth most; false if that helps nothing."""
        if self.unknown.isdisjoint(move.groups) and move.name in self._seen:
            return False  # nothing has moved since it was last placed that it meets
        known = not self.unknown
        total = self.objective if known else None
        for hold in HOLDS if move.quadratic and known else HOLDS[:1]:
            kept = self._keep()
            try:
                gained = self._gain_of(move, hold)
            except KeyboardInterrupt:
                self._go_back(kept)
                raise
            self.unknown -= move.groups
            if total is None or gained > 0:
                self._total = None if total is None else total + gained
                return True
            self._go_back(kept)
        return False

    def _keep(self) -> State:
        """What `_go_back` leads back to."""
        standing = self.b.copy() if isinstance(self.b, Standing) else self.b
        return standing, self.element, self._total, self._kept.copy(), dict(self._seen)

    def _go_back(self, kept: State) -> None:
        self.b, self.element, self._total, self._kept, self._seen = kept

    def _gain_of(self, move: Move, hold: float) -> float:
        """Place the groups of a move, and say what that has added to the objective; anything while some are unknown."""
        names = self.acting.touched([move.name])
        weighing = (move.quadratic or move.paired) and not self.unknown
        before = self._inner(names) if weighing else 0.0
        self._gained = 0.0
        if move.paired:
            self._pair(move)
        else:
            self._place(move, hold)
        return self._inner(names) - before if weighing else self._gained

    def _place(self, move: Move, hold: float) -> None:
        """Place the root of a move, then what is inside it."""
        node = move.root
        grams, rest = self._grams_and_rest(node)
        best = best_element(self.acting.structure(node.group), self._held(grams, hold), self.solver)
        self._gained += gain(best, rest)
        self._apply(node.group, best.step(node.group))
        if best.matrix is not None and not move.quadratic and not self.unknown:
            self._seen[node.group] = torch.matmul(whole(grams), best.matrix.mT)
        for below in move.then:
            self._place(below, hold)

    def _pair(self, move: Move) -> None:
        """Place the root of a move of which the groups inside are chosen pair by pair, then these."""
        inner = [other for other in self.moves if other.name in self.plan.inside(move.name)]
        best = best_element(Structure(), {(): self._pairs(move, inner)}, self.solver)
        self._apply(move.name, best.step(move.name))
        self._settle(inner, self.acting.touched([move.name]))

    def _settle(self, moves: Sequence[Move], names: Sequence[str]) -> None:
        """Move some groups that stand in these parameters in turns, as if none had a place yet, for a few rounds."""
        known, self._total = self._total, None
        self.unknown |= {name for move in moves for name in move.groups}
        for _ in range(INNER_SWEEPS):
            before = self._inner(names)
            for move in moves:
                self.step(move)
            if self._inner(names) - before <= TOLERANCE * abs(known or before):
                break
        self._total = None

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
            each._settle(inner, names)
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
        if _stays(step):
            return
        whole_step = Step(group, step, step.matrices)
        self._move_grams(whole_step)
        if group in step.matrices:
            matrix = step.matrices[group]
            self._nets[group] = matrix @ self._nets[group] if group in self._nets else matrix
        self._stand(composed(self.acting, step, self.element), whole_step)

    def _move_grams(self, step: Step) -> None:
        """Keep of the Gram matrices what holds after a step."""
        assert step.group is not None
        self._kept.move(step)
        near = {leaf.group for place in self.acting.of_group[step.group] for leaf in place.block.leaves}
        self._seen = {name: gram for name, gram in self._seen.items() if name not in near}

    def _forget(self) -> None:
        """Keep no Gram matrices."""
        self._kept, self._seen = KeptGrams(), {}

    def _stand(self, element: Element, step: Step) -> None:
        """Have B stand where an element takes it, which this step has led to."""
        self.element = element
        assert isinstance(self.b, Standing)
        self.b.move(step)

    def _held(self, grams: dict[tuple[int, ...], Tensor], hold: float) -> dict[tuple[int, ...], Tensor]:
        """Gram matrices to which staying is worth something more."""
        if not hold:
            return grams
        scale = max(float(gram.abs().amax()) for gram in grams.values())
        n = next(iter(grams.values())).shape[-1]
        return {
            key: gram + hold * scale * torch.eye(n, dtype=gram.dtype, device=gram.device) for key, gram in grams.items()
        }

    # --- rotations alone ----------------------------------------------------------------------------------------------

    def _turn(self, start: float, tolerance: float) -> None:
        """Rounds over the moves that turn alone, those inside others first, until one adds little.

        Args:
            start: the objective where what has been added is counted from.
            tolerance: what counts as nothing, relative to the objective.
        """
        if len(self._turning) < 2:
            return
        reach, speed = 0.0, 0
        for move in self._turning:
            if not move.root.batch:
                self.step(move)  # which has the news of the sweep
        nets: dict[str, Tensor] = {}
        for _ in range(ROUNDS):
            before, kept = self.objective, self._keep()
            self._nets = {}
            try:
                if reach:
                    self._go_ahead(nets, reach)
                for move in self._turning:
                    self.step(move)
            except KeyboardInterrupt:
                self._go_back(kept)
                raise
            finally:
                was_ahead, self._is_ahead = self._is_ahead, False
            added = self.objective - before
            if was_ahead and added <= 0:
                self._go_back(kept)
                reach, speed = 0.0, 0
                continue
            nets, speed = self._nets, speed + 1
            reach = speed / (speed + 3)
            if added <= max(tolerance * abs(self.objective), SHARE * (self.objective - start)):
                break

    def _go_ahead(self, nets: Mapping[str, Tensor], reach: float) -> None:
        """Turn on by a share of how far rotations have just turned, without looking."""
        for group, net in nets.items():
            if group in self._seen and self._total is not None:
                eye = torch.eye(net.shape[-1], dtype=net.dtype, device=net.device)
                ahead = polar(eye + reach * (net - eye))
                self._total += gain(Best(ahead, None, ahead), {(): self._seen[group]})
                self._apply(group, Element(matrices={group: ahead}))
                self._is_ahead = True

    # --- Gram matrices ------------------------------------------------------------------------------------------------

    def _grams(self, node: Node) -> dict[tuple[int, ...], Tensor]:
        """What each pair of a node's indices is worth, by the exponents of its signs; shape (*batch, *pairs).

        The pairs are those of the groups of the move above it, from the root's to its own.
        """
        return self._grams_and_rest(node)[0]

    def _grams_and_rest(self, node: Node) -> tuple[dict[tuple[int, ...], Tensor], dict[tuple[int, ...], Tensor]]:
        """`_grams`, and the same with all groups inside the node's at rest."""
        own = self._own_grams(node)
        if not node.inner:
            grams = self._whole_grams(own, node)
            return grams, grams
        best, rest = own, dict(own)
        for inner in node.inner:
            ours, still = self._grams_and_rest(inner)
            self._add_inner(best, best_value(self.acting.structure(inner.group), ours, self.solver), node, inner)
            self._add_inner(rest, whole(still).diagonal(dim1=-2, dim2=-1).sum(-1), node, inner)
        return self._whole_grams(best, node), self._whole_grams(rest, node)

    def _own_grams(self, node: Node) -> dict[tuple[int, ...], Tensor]:
        """Of the Gram matrices of a node what comes from where it stands itself."""
        sums: dict[tuple[int, ...], Tensor] = {}
        lasting: dict[Across, list[Place]] = {}
        for place in node.places:
            if not self._is_evidence(place):
                continue
            key, across = signs_of(self.acting.action(place.block, place.own[-1])), across_from(place)
            if self._lasts(node, across):
                lasting.setdefault(across, []).append(place)
            else:
                sums[key] = self._gram_at(place, sums.get(key))
        if self.keeps_few:
            moving = [across for across in lasting if across]
            joined = [place for across in moving for place in lasting.pop(across)]
            if joined:
                lasting[frozenset().union(*moving)] = joined
        for across, places in lasting.items():
            if not self._kept.has(node.group, across):
                share = None
                for place in places:
                    share = self._gram_at(place, share)
                assert share is not None
                self._kept.keep(node.group, across, self._as_exact(share))
        sums = {key: self._as_exact(gram) for key, gram in sums.items()}
        kept = self._kept.sum(node.group, lasting)
        if kept is not None:
            sums[()] = kept.add_(sums[()]) if () in sums else kept
        return sums

    def _as_exact(self, gram: Tensor) -> Tensor:
        """A Gram matrix in the precision in which steps are computed."""
        return gram

    def _lasts(self, node: Node, across: Across) -> bool:
        """Whether a share of a node's Gram matrix is worth keeping: of a rotation, across from what does not turn."""
        alone = self.acting.structure(node.group).linear in ("O", "O1", "GL") and node.chain == (node.group,)
        return alone and not node.batch and not across & self._restless and not across & self.unknown

    def _gram_at(self, place: Place, into: Tensor | None) -> Tensor:
        """What one place adds to a Gram matrix; apart, so that its tensors go before the next ones come."""
        name = place.block.parameter
        return place.gram(place.block.view(self.a[name]), place.block.view(self.b[name]), self.unknown, into)

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


def across_from(place: Place) -> Across:
    """The groups on the axes of a block that a place does not move."""
    return frozenset(leaf.group for at, leaf in enumerate(place.block.leaves) if leaf.group and at not in place.own)


def _beside(place: Acted) -> Across:
    """The groups on the other axes of a block in which a group acts."""
    return frozenset(leaf.group for at, leaf in enumerate(place.block.leaves) if leaf.group and at != place.axis)


def turning_moves(acting: Acting, moves: Iterable[Move]) -> tuple[Move, ...]:
    """Of an ascent's moves those that only turn, each group alone; those inside other groups first."""
    alone = [m for m in moves if acting.structure(m.name).linear and not m.root.inner and not m.paired]
    return tuple(sorted(alone, key=lambda move: not move.root.batch))


def _stays(step: Element) -> bool:
    """Whether an element without matrices moves nothing."""
    if step.matrices:
        return False
    still = (
        bool((array == torch.arange(array.shape[-1], device=array.device)).all()) for array in step.arrays.values()
    )
    return all(still) and all(bool((signs > 0).all()) for signs in step.signs.values())
