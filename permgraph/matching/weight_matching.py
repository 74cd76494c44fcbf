"""Weight matching: coordinate ascent over linear assignment problems.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2022, section 3.2; here
over any spec, with dependent groups by nested assignment, and with no Gram matrix computed twice for nothing.
"""

from __future__ import annotations

import logging
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import numpy as np
import torch

from permgraph.assignment.parallel import workers
from permgraph.assignment.solve import Solver
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching.ascent.gram_cache import Kept
from permgraph.matching.ascent.paired import paired_values
from permgraph.matching.ascent.permuted_model import Working
from permgraph.matching.ascent.restarts import Ascended, Several, explore, lanes, worth_relaxing
from permgraph.matching.ascent.step import Scene, choose, choose_each, gram, outer_values
from permgraph.matching.matcher import MatchResult, Outcome, Progress, Sweep
from permgraph.matching.problem.limits import Frozen, Limits, choose_limited, limits_of
from permgraph.matching.problem.moves import Move, Place, Plan
from permgraph.matching.problem.objective import Objective, Pair, Weights, pair, variance
from permgraph.matching.problem.order import informed_order, ranks
from permgraph.matching.problem.renumber import PORTION, Arrays, act, compose
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import STATISTICS, StateDict

log = logging.getLogger(__name__)

ROOM = 1 << 25
"""Bytes that a run may keep between steps, however small the models are."""

Init: TypeAlias = Permutation | Literal["identity", "barycentre"]


@dataclass(frozen=True)
class WeightMatching:
    """Maximise the sum over parameters of <A_p, pi(B_p)> over the spec's group, one group at a time.

    With all other groups at rest the best permutation of one is a linear assignment. A group with others fibred over
    it is solved with them by nesting: what it is worth to match two heads is the best assignment of the channels
    inside. A group that meets itself in one parameter, as the hidden units of a recurrent layer do, makes the step
    quadratic: it is linearised, held back until the objective rises, and left out if it never does. So the objective
    never falls, and a run ends when no step raises it.

    Args:
        max_sweeps: stop after so many passes over the groups.
        restarts: how many runs to make; the best is kept. The first begins at `init`; the others at random
            permutations or, every other one if `init` is the barycentre, there with the groups in random order. If it
            is not given, one run is made; where `init` is the barycentre, no group is fibred or limited, and the
            network is so small that they take some tenth of a second, up to 32 more follow, from random
            permutations and from the best so far with some indices shuffled. Where there is no time for many of them,
            the first took five sweeps or more, and it takes no more than some two seconds, one follows that begins
            where `FrankWolfe` ends.
        init: where to begin: "barycentre", the mean over the whole group, where a group is first matched as if every
            permutation of those not yet matched were equally likely; "identity"; or a `Permutation` of the spec. The
            barycentre mostly takes fewer sweeps and ends higher than the identity, on random pairs and on trained
            ones; should it end below where the identity begins, a run from there is made too.
        objective: "inner"; "cosine", where every tensor counts alike whatever its norm; or "l2", which has the same
            best permutation as "inner" and reports minus the squared distance.
        weights: how much each tensor counts: a mapping from its name, or a function of name and A's tensor, to a
            number or to a tensor of its shape (diagonal Fisher information, say). Names left out count 1.
        ignore: patterns (as in `fnmatch`) of names that are permuted, but are no evidence.
        order: in which order the groups take their turns: "random", anew for each sweep; "given", as in the spec; or
            "informed", in which the first sweep from the barycentre can be expected to gain most, because each group
            is matched when it has evidence, and evidence is spread over groups.
        solver: for the assignments, see `assign`.
        dtype: in which to compute; by default float64 where both models are, else float32.
        frozen: what stays as `init` has it: patterns of group names, or a mapping from them to the indices that stay,
            None for all. Groups that are fibred over others can only be frozen whole.
        max_moves: how many indices of a group may leave their place in B: a number for every group that is not fibred,
            or a mapping from patterns. Each step is then the best one where `assign_limited` can prove it, else a
            feasible one near it.
        memory: bytes that Gram matrices may take between steps; what does not fit is computed anew when it is needed.
            B's weights as they are permuted take as many as they have, besides. By default both together take what
            keeps a run within the size of one model and of its largest Gram matrix, beyond the two models themselves
            (or within 32 MB and three such matrices, where that is more). Below that, it is slower and the result the
            same.

    References:
        Ainsworth, Hayase & Srinivasa 2022, section 3.2.
    """

    max_sweeps: int = 100
    restarts: int | None = None
    init: Init = "barycentre"
    objective: Objective = "inner"
    weights: Weights | None = None
    ignore: Sequence[str] = STATISTICS
    order: Literal["informed", "random", "given"] = "informed"
    solver: Solver = "auto"
    dtype: torch.dtype | None = None
    memory: int | None = None
    frozen: Frozen = ()
    max_moves: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.max_sweeps < 0 or (self.restarts is not None and self.restarts < 1):
            raise PermgraphError(
                f"max_sweeps={self.max_sweeps} and restarts={self.restarts}: give 0 or more sweeps and at least one run"
            )
        if self.order not in ("informed", "random", "given"):
            raise PermgraphError(f"unknown order {self.order!r}; choose 'informed', 'random' or 'given'")
        if isinstance(self.init, str) and self.init not in ("identity", "barycentre"):
            raise PermgraphError(f"unknown init {self.init!r}; choose 'identity', 'barycentre' or a Permutation")

    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        Args:
            a, b: state dicts that fit the spec; on any devices, in any floating dtype.
            spec: the group, and where it acts.
            seed: for the order of the groups and for restarts.
            progress: called after each sweep.

        Raises:
            MismatchError: a state dict, or `init`, does not fit the spec.
            NonFiniteError: a weight is NaN or infinite.
        """
        return self.match_again(a, b, spec, seed, progress, None)

    def match_again(
        self,
        a: StateDict,
        b: StateDict,
        spec: PermutationSpec,
        seed: int,
        progress: Progress | None,
        prices: dict[str, np.ndarray] | None,
        *,
        relax: bool = True,
    ) -> MatchResult:
        """`match`, for who matches much the same pair many times, each time from where the last ended.

        Args:
            a, b, spec, seed, progress: as there.
            prices: those of the last time's assignments, by group, which are replaced by this time's; empty at first.
                They save time and change nothing.
            relax: whether a run may also begin where `FrankWolfe` ends.
        """
        started = time.perf_counter()
        if isinstance(self.init, Permutation) and self.init.spec != spec:
            raise MismatchError("init is a permutation of another spec than the one to match over")
        compared = pair(
            a, b, spec, objective=self.objective, weights=self.weights, ignore=self.ignore, dtype=self.dtype
        )
        frozen, limits = limits_of(spec, self.frozen, self.max_moves, self.init)
        plan = Plan(spec, compared.a, frozen)
        at_rest = {name: compared.inner([name], compared.b) for name in compared.a}
        before = compared.scale * sum(at_rest.values()) + compared.offset
        # What is frozen where `init` has it, and limits counted from there, would be broken at the identity.
        bound = isinstance(self.init, Permutation) and bool(frozen or limits)
        best: _Ascent | None = None
        runs: list[float] = []
        interrupted = False

        def start(random: np.random.SeedSequence) -> _Ascent:
            rng = np.random.default_rng(random)
            return _Ascent(self, compared, plan, rng, at_rest, limits, started, {} if prices is None else prices)

        seeds = np.random.SeedSequence(seed)
        try:
            for run, stream in enumerate(seeds.spawn(self.restarts or 1)):
                ascent = start(stream)
                ascent.begin(run)
                ascent.climb(progress)
                runs.append(ascent.objective)
                if best is None or ascent.objective > best.objective:
                    best = ascent
                if ascent.outcome == "interrupted":
                    raise KeyboardInterrupt
            if best is not None and best.objective < before and not bound:
                # A run that did not begin at the identity can end below it. One that does cannot.
                best = start(seeds)
                best.climb(progress)
                runs.append(best.objective)
            if self.restarts is None and self.init == "barycentre" and not limits and best is not None:
                (stream,) = seeds.spawn(1)
                sweeps = len(best.history) if best.outcome == "converged" else 0
                for ascended in self._more(best, compared, plan, np.random.default_rng(stream), progress, started):
                    better = ascended.objective - best.objective > 1e-6 * abs(best.objective)  # and not by rounding
                    if better:
                        best.adopt(ascended)
                    runs.append(best.objective if better else min(ascended.objective, best.objective))
                    interrupted = interrupted or ascended.interrupted
                if relax and not (frozen or interrupted) and worth_relaxing(plan, sweeps):
                    ascent = start(*seeds.spawn(1))
                    ascent.go(self._relaxed(a, b, spec, seed))
                    ascent.climb(progress)
                    runs.append(ascent.objective)
                    best = max(best, ascent, key=lambda run: run.objective)
                    interrupted = ascent.outcome == "interrupted"
        except KeyboardInterrupt:
            interrupted = True
        # Interrupted before anything better was found.
        if best is None or (interrupted and best.objective < before and not bound):
            best = start(seeds)
            if bound:
                best.begin(0)
        if interrupted:
            best.outcome = "interrupted"
        result = MatchResult(
            permutation=best.permutation,
            objective=best.objective,
            objective_before=before,
            outcome=best.outcome,
            history=tuple(best.history),
            runs=tuple(runs),
            seed=seed,
            notes=() if plan.moves else ("nothing to permute: no group of the spec stands in a compared parameter",),
        )
        return replace(result, seconds=time.perf_counter() - started)

    def _more(
        self,
        best: _Ascent,
        compared: Pair,
        plan: Plan,
        rng: np.random.Generator,
        progress: Progress | None,
        started: float,
    ) -> Sequence[Ascended]:
        """The runs that follow where nobody said how many there should be."""
        count = lanes(plan) if best.outcome == "converged" else 0
        if not count:
            return ()
        several, stand = Several(plan, compared, self.solver), best.permutation.arrays
        return explore(several, stand, best.objective, count, rng, self.max_sweeps, progress, started)

    def _relaxed(self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int) -> Permutation:
        from permgraph.matching.frank_wolfe import FrankWolfe  # which itself ends with weight matching

        found = FrankWolfe(polish=False, ascent=replace(self, restarts=1)).match(a, b, spec, seed)
        if found.outcome == "interrupted":
            raise KeyboardInterrupt
        return found.permutation


class _Ascent:
    """One run: the present permutation, B at it, and which moves may still raise the objective."""

    def __init__(
        self,
        how: WeightMatching,
        compared: Pair,
        plan: Plan,
        rng: np.random.Generator,
        at_rest: Mapping[str, float],
        limits: Mapping[str, Limits],
        started: float,
        prices: dict[str, np.ndarray],
    ) -> None:
        self.how, self.compared, self.plan, self.rng, self.started = how, compared, plan, rng, started
        self.spec = plan.spec
        self.limits = limits
        self.itemsize = max((tensor.itemsize for tensor in compared.a.values()), default=4)
        self.largest = self.itemsize * max((plan.entries(move) for move in plan.moves), default=0)
        grams, copy = self._room()
        self.b = Working(self.spec, compared.b, copy)
        self.inner = dict(at_rest)
        self.free: set[str] = set()
        self.order: str = how.order
        self.sequence: list[int] | None = None
        self.stale = set(range(len(plan.moves)))
        self.met, self.neighbours = plan.met, plan.neighbours
        self.grams = Kept(grams)
        self.prices = prices
        self.history: list[Sweep] = []
        self.outcome: Outcome = "sweep limit"
        self.objective = self._objective()

    def _room(self) -> tuple[int, int]:
        """Bytes for Gram matrices between steps, and for B as it is permuted."""
        model = sum(tensor.nbytes for tensor in self.compared.a.values())
        if self.how.memory is not None:
            return self.how.memory, model
        # With what a step needs at a time, as much as one model and the largest Gram matrix: its own Gram matrix, one
        # beside that, and the solver's; and a few portions of both models.
        room = max(ROOM, model + self.largest - 3 * self.largest - 8 * PORTION * self.itemsize)
        sizes = {move.name: self.plan.entries(move) for move in self.plan.moves if len(move.groups) == 1}
        grams = self.itemsize * sum(sizes.values())
        if grams + model > room:
            # A tensor of B that cannot be held is gathered as a whole; and what comes and goes leaves holes behind.
            gathered = max(tensor.nbytes for tensor in self.compared.b.values())
            room = max(ROOM, room - gathered - 8 * PORTION * self.itemsize)
        grams = min(room, grams)
        return grams, room - grams

    def begin(self, run: int) -> None:
        """Go to the starting point of one of the runs."""
        self.order = "random" if run > 0 and self.how.order == "informed" else self.how.order
        again = run > 0 and not any(limits.home is not None for limits in self.limits.values())
        if again and (self.how.init != "barycentre" or run % 2 == 0):
            self.go(self._random())
        elif self.how.init == "barycentre":
            self.free = {name for move in self.plan.moves for name in move.groups}
        elif isinstance(self.how.init, Permutation):
            self.go(self.how.init)

    def _random(self) -> Permutation:
        """A random permutation, with what is frozen as `init` has it."""
        drawn = dict(self.spec.random(self.rng).arrays)
        start = self.how.init.arrays if isinstance(self.how.init, Permutation) else self.spec.identity().arrays
        moving = {name for move in self.plan.moves for name in move.groups}
        for name, array in drawn.items():
            if name not in moving:
                drawn[name] = start[name]
            elif name in self.limits:
                held = self.limits[name].held
                others = np.setdiff1d(np.arange(array.shape[-1]), held)
                drawn[name] = start[name].copy()
                drawn[name][others] = self.rng.permutation(start[name][others])
        return Permutation(self.spec, drawn)

    def go(self, permutation: Permutation) -> None:
        """Begin, or go on, there."""
        self.b.go(dict(permutation.arrays))
        self.inner = {}
        self.objective = self._objective()

    def adopt(self, ascended: Ascended) -> None:
        """Be the run that ended there instead."""
        self.go(Permutation(self.spec, {**self.spec.identity().arrays, **ascended.arrays}))
        self.history = list(ascended.history)
        self.outcome = "converged" if ascended.converged else "sweep limit"

    @property
    def arrays(self) -> Arrays:
        """How the groups stand, for those that have moved."""
        return self.b.arrays

    @property
    def permutation(self) -> Permutation:
        return Permutation(self.spec, self.arrays)

    def _objective(self) -> float:
        for name in self.b:
            if name not in self.inner:
                self.inner[name] = self.compared.inner([name], self.b)
        return self.compared.scale * sum(self.inner.values()) + self.compared.offset

    def climb(self, progress: Progress | None) -> None:
        """Sweep until no move helps, or the limit, or Ctrl-C."""
        try:
            while self.stale and len(self.history) < self.how.max_sweeps:
                self._sweep()
                log.debug("%s", self.history[-1])
                if progress is not None:
                    progress(self.history[-1])
            if not self.stale:
                self.outcome = "converged"
            self.objective = self._objective()
        except KeyboardInterrupt:
            self.outcome = "interrupted"
            self.go(self.permutation)
        finally:  # what it took to get here is no longer needed
            self.b.go(self.arrays)
            self.grams = Kept(0)

    def _sweep(self) -> None:
        before = dict(self.arrays)
        unknown = bool(self.free)
        scale = self.compared.scale
        gains: dict[str, float] = {}
        # Moves of several groups cost most, and what is inside them has moves of its own: after the first sweep they
        # wait until nothing else helps.
        wait = bool(self.history) and any(len(self.plan.moves[number].groups) == 1 for number in self.stale)
        # A move made stale on the way takes its turn in this sweep if that is still to come, else in the next.
        for rank in ranks(list(self._order()), self.neighbours):
            due = [n for n in rank if n in self.stale and not (wait and len(self.plan.moves[n].groups) > 1)]
            for number, gain in self._take(due):
                name = self.plan.moves[number].name
                gains[name] = gains.get(name, 0.0) + gain
        # What a step seemed to gain while groups were unknown is not what it gained.
        self.objective = self._objective() if unknown else self.objective + scale * sum(gains.values())
        self.history.append(
            Sweep(
                len(self.history) + 1,
                self.objective,
                {name: moved for name, now in self.arrays.items() if (moved := _differing(now, before.get(name)))},
                {} if unknown else {name: gain * scale for name, gain in gains.items() if gain},
                time.perf_counter() - self.started,
            )
        )

    def _order(self) -> Iterator[int]:
        count = len(self.plan.moves)
        if self.order == "informed":
            if self.sequence is None:
                spread = {name: variance(a) * variance(self.compared.b[name]) for name, a in self.compared.a.items()}
                self.sequence = informed_order(self.plan, spread, self.rng)
            yield from self.sequence
        elif self.order != "given":
            yield from self.rng.permutation(count).tolist()
        else:
            yield from range(count)

    def _take(self, numbers: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Take moves, no two of which are neighbours, where they raise the objective; each with what it gained."""
        plain = [n for n in numbers if len(self.plan.moves[n].groups) == 1 and not self.plan.moves[n].bent]
        for portion in self._portions(plain):
            yield from self._plain(portion)
        for number in numbers:
            if number not in plain:
                yield number, self._step(number, self.plan.moves[number])

    def _portions(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Moves of one group each, in portions that are solved side by side, their Gram matrices all in memory.

        Of those that are not kept there are no more than will be, or than a single one may take: so memory does not
        hang on how many workers there are. Nor does the result, since the moves do not meet.
        """
        sizes = {number: self.plan.entries(self.plan.moves[number]) for number in numbers}
        if workers(sum(sizes.values())) == 1:
            yield from ([number] for number in numbers)
            return
        portion: list[int] = []
        room = 0
        for number in numbers:
            need = 0 if self.plan.moves[number].name in self.grams.grams else sizes[number] * self.itemsize
            if portion and need > room:
                yield portion
                portion = []
            if not portion:
                room = self.largest + self.grams.room
            portion.append(number)
            room -= need
        if portion:
            yield portion

    def _scene(self, move: Move) -> Scene:
        return Scene(self.spec, self.compared.a, self.b, self.free - move.groups, self.how.solver)

    def _step(self, number: int, move: Move) -> float:
        """Take one move of several groups, or one that meets itself, if it raises the objective; what it gained."""
        scene = self._scene(move)
        if move.paired:
            step, new, gain = self._paired(number, move, scene)
        else:
            worth = outer_values(scene, move.root)
            if self.free & self.met[number]:
                columns, gain = self._choose(worth, move)
                step, new = self._follow(move, columns, scene)
            else:
                step, new, gain = self._held_back(move, worth, scene)
        self.stale.discard(number)
        self.free -= move.groups
        if step:
            amend = self.grams.worth_amending(self._others(number), new, 1.0)
            for block, places in amend.items():
                a, before, after = (block.view(x[block.parameter]) for x in (self.compared.a, self.b, new))
                for other, place in places:
                    self.grams.amend(other, place, a, after - before)
            self._record(number, step, new)
            if move.bent or move.paired:
                self.stale.add(number)
        return gain

    def _plain(self, numbers: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Moves of one group each, whose Gram matrices are all made before the first of them is taken."""
        moves = {number: self.plan.moves[number] for number in numbers}
        found = {number: self._worth(move, self._scene(move)) for number, move in moves.items()}
        self.b.rest()
        if self.limits:
            chosen = {move.name: self._choose(found[number][0], move) for number, move in moves.items()}
        else:
            worths = {move.name: found[number][0] for number, move in moves.items()}
            chosen = choose_each(worths, self.how.solver, self.prices)
        for number, move in moves.items():
            _, kept, missing = found.pop(number)
            columns, gain = chosen[move.name]
            self._renumber(number, move, columns, kept, missing)
            yield number, gain

    def _renumber(
        self, number: int, move: Move, columns: np.ndarray, kept: torch.Tensor | None, missing: tuple[Place, ...]
    ) -> None:
        """Take a move of one group. Of the Gram matrices of others only what changes is computed, of B what moves."""
        self.stale.discard(number)
        if len(self.history) + 1 == self.how.max_sweeps:
            self.grams.drop(move)  # its last turn
        elif kept is not None:
            self.grams.keep(move, kept, columns, missing)
        self.free -= move.groups
        step = {move.name: columns}
        if columns.ndim > 1:
            moves = (columns != np.arange(columns.shape[-1])).any(axis=tuple(range(columns.ndim - 1)))
        else:
            moves = columns != np.arange(len(columns))
        if not moves.any():
            return
        amend = self.grams.worth_amending(self._others(number), move.parameters, float(moves.mean()))
        new = {} if columns.ndim == 1 else {name: act(self.spec, step, name, self.b[name]) for name in move.parameters}
        indices = torch.from_numpy(np.flatnonzero(moves))
        for place in move.root.places:
            block, axis, name = place.block, place.own[0], place.block.parameter
            held = self.b.writable(name)
            if held is None and block not in amend:
                continue
            here = indices.to(self.compared.a[name].device)
            # Of a fibred group B's tensor is new anyway; of others only what moves is read.
            there = here if new else torch.from_numpy(columns[moves]).to(here)
            if block in amend:
                a = block.view(self.compared.a[name])
                some = max(1, PORTION * a.shape[axis] // a.numel())
                for to, of in zip(torch.split(here, some), torch.split(there, some), strict=True):
                    after = block.view(new[name]).index_select(axis, of) if new else self.b.select(block, axis, of)
                    difference = after.sub_(self.b.select(block, axis, to))
                    part = a.index_select(axis, to)
                    for other, at in amend[block]:
                        self.grams.amend(other, at, part, difference)
            if held is not None:
                view = block.view(held)
                source = block.view(new[name]) if new else view
                across = max((x for x in range(view.ndim) if x != axis), key=lambda x: view.shape[x], default=0)
                some = max(1, PORTION * view.shape[across] // view.numel()) if view.ndim > 1 else view.numel()
                for to, of in zip(torch.split(view, some, across), torch.split(source, some, across), strict=True):
                    to.index_copy_(axis, here, of.index_select(axis, there))
        self._record(number, step, dict.fromkeys(move.parameters))

    def _worth(self, move: Move, scene: Scene) -> tuple[torch.Tensor, torch.Tensor | None, tuple[Place, ...]]:
        """The Gram matrix of a move of one group; what of it to keep; and the places that are missing in that."""
        kept = self.grams.get(move, scene.a, scene.b)
        if kept is not None:
            return kept, kept, ()
        missing = tuple(place for place in move.root.places if not place.known(scene.free))
        sure = tuple(place for place in move.root.places if place not in missing)
        if not missing or not sure or not self.grams.fits(move.name, self.plan.entries(move) * self.itemsize):
            worth = outer_values(scene, move.root)
            return worth, None if missing else worth, ()
        kept = gram(scene, replace(move.root, places=sure))
        guess = gram(scene, replace(move.root, places=missing))
        assert kept is not None and guess is not None
        return guess.add_(kept), kept, missing

    def _record(self, number: int, step: Arrays, changed: Mapping[str, torch.Tensor | None]) -> None:
        """A step has been taken; of what it changed, the tensors that have not been written to."""
        self.b.moved(
            {**self.arrays, **compose(self.spec, step, self.arrays)},
            {name: tensor for name, tensor in changed.items() if tensor is not None},
        )
        self.stale |= self.neighbours[number]
        for name in changed:
            self.inner.pop(name, None)

    def _others(self, number: int) -> list[Move]:
        return [self.plan.moves[other] for other in sorted(self.neighbours[number])]

    def _choose(self, worth: torch.Tensor, move: Move) -> tuple[np.ndarray, float]:
        return choose_limited(worth, self.how.solver, move.name, self.limits, self.arrays)

    def _paired(self, number: int, move: Move, scene: Scene) -> tuple[Arrays, dict[str, torch.Tensor], float]:
        """The step of a root and of what each of its pairs has chosen inside, if it raises the objective."""
        worth, inside = paired_values(scene, move, tuple(self.plan.standing[move.name]))
        columns, _ = self._choose(worth, move)
        step: Arrays = {move.name: columns}
        for name, chosen in inside.items():
            step[name] = np.take_along_axis(chosen, columns[..., None, None], axis=-2)[..., 0, :]
        step = {name: array for name, array in step.items() if (array != np.arange(array.shape[-1])).any()}
        if not step:
            return {}, {}, 0.0
        new = {name: act(self.spec, step, name, scene.b[name]) for name in move.parameters}
        old = self.compared.inner(new, self.b)
        gain = self.compared.inner(new, new) - old
        if gain > 16 * torch.finfo(worth.dtype).eps * abs(old) or self.free & self.met[number]:
            return step, new, gain
        return {}, {}, 0.0

    def _follow(self, move: Move, columns: np.ndarray, scene: Scene) -> tuple[Arrays, dict[str, torch.Tensor]]:
        """The step that renumbers the root so, and then chooses the best inside it; and B's tensors after it."""
        step: Arrays = {}
        new: dict[str, torch.Tensor] = {}
        if (columns != np.arange(columns.shape[-1])).any():
            step = {move.name: columns}
            new = {name: act(self.spec, step, name, scene.b[name]) for name in move.parameters}
        for inner in move.then:
            within = replace(scene, b=ChainMap(dict(new), cast("dict[str, torch.Tensor]", scene.b)))
            chosen, _ = choose(outer_values(within, inner.root), self.how.solver, inner.name)
            then, changed = self._follow(inner, chosen, within)
            step = {**step, **compose(self.spec, then, step)}
            new.update(changed)
        return step, new

    def _held_back(
        self, move: Move, worth: torch.Tensor, scene: Scene
    ) -> tuple[Arrays, dict[str, torch.Tensor], float]:
        """The step, tried with more and more weight on staying, until the objective itself rises."""
        rounding = 16 * torch.finfo(worth.dtype).eps * abs(self.compared.inner(move.parameters, self.b))
        diagonal = worth.diagonal(dim1=-2, dim2=-1)
        pull = 0.0
        for _ in range(8 if move.bent else 1):
            columns, promised = self._choose(worth, move)
            step, new = self._follow(move, columns, scene)
            if not step:
                break
            gain = self.compared.inner(new, new) - self.compared.inner(new, self.b)
            if gain > rounding:
                return step, new, gain
            moved = int(np.sum(columns != np.arange(columns.shape[-1])))
            pull = 2 * pull if pull else 0.5 * promised / max(1, moved)
            diagonal += pull
        return {}, {}, 0.0


def _differing(now: np.ndarray, before: np.ndarray | None) -> int:
    return int((now != (np.arange(now.shape[-1]) if before is None else before)).sum())
