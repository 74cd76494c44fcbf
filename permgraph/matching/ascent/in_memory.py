"""The ascent of a run that holds both models, and as many Gram matrices between steps as it may."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, cast

import numpy as np
import torch

from permgraph.assignment.parallel import workers
from permgraph.assignment.solve import Solver
from permgraph.matching import tuned
from permgraph.matching.ascent.climb import Climb, Trial
from permgraph.matching.ascent.gram_cache import GramCache
from permgraph.matching.ascent.permuted_model import PermutedModel
from permgraph.matching.ascent.restarts import Ascended
from permgraph.matching.ascent.step import Scene, choose_each, gram, outer_values
from permgraph.matching.matcher import Progress
from permgraph.matching.problem.limits import Limits
from permgraph.matching.problem.moves import Move, Place, Plan
from permgraph.matching.problem.objective import Pair, variance
from permgraph.matching.problem.order import informed_order
from permgraph.matching.problem.renumber import Arrays, act
from permgraph.spec.permutation import compose

Order: TypeAlias = Literal["informed", "random", "given"]


class InMemoryClimb(Climb):
    """A run over two models in memory.

    Args:
        compared: the tensors.
        plan: the moves, over the spec of those tensors.
        order_name: in which order groups take their turns, see `WeightMatching`.
        at_rest: the inner product of each parameter of A with B's as it is.
        memory: bytes that Gram matrices may take between steps; None for as many as a model leaves.
        prices: those of the last assignments, by group, which are replaced by this run's.
        solver, limits, max_sweeps, started: as in `Climb`.
    """

    nested_wait = True  # they cost most, and what is inside them has moves of its own

    def __init__(
        self,
        compared: Pair,
        plan: Plan,
        *,
        solver: Solver,
        limits: Mapping[str, Limits],
        max_sweeps: int,
        started: float,
        order_name: Order,
        rng: np.random.Generator,
        at_rest: Mapping[str, float],
        memory: int | None,
        prices: dict[str, np.ndarray],
    ) -> None:
        super().__init__(plan, solver, limits, max_sweeps, started)
        self.compared, self.scale = compared, compared.scale
        self.order_name, self.rng, self.prices = order_name, rng, prices
        self.itemsize = max((tensor.itemsize for tensor in compared.a.values()), default=4)
        self.largest = self.itemsize * max((plan.entries(move) for move in plan.moves), default=0)
        for_grams, for_b = self._memory(memory)
        self.b = PermutedModel(self.spec, compared.b, for_b)
        self.grams = GramCache(for_grams)
        self.inner = dict(at_rest)
        self.sequence: list[int] | None = None
        self.objective = self.computed_objective()

    def _memory(self, given: int | None) -> tuple[int, int]:
        """Bytes for Gram matrices between steps, and for B as it is permuted."""
        model = sum(tensor.nbytes for tensor in self.compared.a.values())
        if given is not None:
            return given, model
        # With what a step needs at a time, as much as one model and the largest Gram matrix: its own Gram matrix, one
        # beside that, and the solver's; and a few portions of both models.
        total = max(tuned.ROOM, model + self.largest - 3 * self.largest - 8 * tuned.PORTION * self.itemsize)
        sizes = {move.name: self.plan.entries(move) for move in self.plan.moves if len(move.groups) == 1}
        grams = self.itemsize * sum(sizes.values())
        if grams + model > total:
            # A tensor of B that cannot be held is gathered as a whole; and what comes and goes leaves holes behind.
            largest = max(tensor.nbytes for tensor in self.compared.b.values())
            total = max(tuned.ROOM, total - largest - 8 * tuned.PORTION * self.itemsize)
        grams = min(total, grams)
        return grams, total - grams

    def go(self, arrays: Arrays) -> None:
        """Begin, or go on, there."""
        self.b.reset(dict(arrays))
        self.inner = {}
        self.objective = self.computed_objective()

    def adopt(self, ascended: Ascended) -> None:
        """Be the run that ended there instead."""
        self.go(ascended.arrays)
        self.history = list(ascended.history)
        self.outcome = "converged" if ascended.converged else "sweep limit"

    def climb(self, progress: Progress | None = None) -> None:
        """Sweep until no move helps, or the limit, or Ctrl-C."""
        try:
            super().climb(progress)
            self.objective = self.computed_objective()
        except KeyboardInterrupt:
            self.outcome = "interrupted"
            self.go(self.arrays)
        finally:  # what it took to get here is no longer needed
            self.b.reset(self.arrays)
            self.grams = GramCache(0)

    # --- what the ascent asks for -------------------------------------------------------------------------------------

    @property
    def arrays(self) -> Arrays:
        return self.b.arrays

    def order(self) -> Iterable[int]:
        count = len(self.plan.moves)
        if self.order_name == "given":
            return range(count)
        if self.order_name == "random":
            return [int(number) for number in self.rng.permutation(count)]
        if self.sequence is None:
            spread = {name: variance(a) * variance(self.compared.b[name]) for name, a in self.compared.a.items()}
            self.sequence = informed_order(self.plan, spread, self.rng)
        return self.sequence

    def scene(self, move: Move, trial: Trial) -> Scene:
        b = ChainMap(dict(trial.tensors), cast("dict[str, torch.Tensor]", self.b)) if trial.tensors else self.b
        return Scene(self.spec, self.compared.a, b, self.free - move.groups, self.solver)

    def after(self, trial: Trial, move: Move, step: Arrays) -> Trial:
        b = self.scene(move, trial).b
        tensors = {name: act(self.spec, step, name, b[name]) for name in move.parameters}
        return Trial(self.extended(trial, step), {**trial.tensors, **tensors})

    def gain(self, trial: Trial, move: Move) -> tuple[float, float]:
        now = sum(self._inner(name) for name in trial.tensors)
        return self.compared.inner(trial.tensors, trial.tensors) - now, sum(map(self._inner, move.parameters))

    def computed_objective(self) -> float:
        return self.compared.reported(sum(map(self._inner, self.b)))

    def _inner(self, name: str) -> float:
        """The inner product of one parameter of A with B's where it stands."""
        if name not in self.inner:
            self.inner[name] = self.compared.inner([name], self.b)
        return self.inner[name]

    def apply(self, number: int, trial: Trial) -> None:
        updates = self.grams.updates_for(self._neighbours(number), trial.tensors, 1.0)
        for block, places in updates.items():
            a, before, after = (block.view(x[block.parameter]) for x in (self.compared.a, self.b, trial.tensors))
            for other, place in places:
                self.grams.update(other, place, a, after - before)
        self._record(trial.step, trial.tensors)

    def take(self, numbers: Sequence[int]) -> Iterator[tuple[int, float]]:
        moves = self.plan.moves
        single = [n for n in numbers if len(moves[n].groups) == 1 and not moves[n].quadratic]
        for portion in self._portions(single):
            yield from self._take_single(portion)
        for number in numbers:
            if number not in single:
                yield number, self.step(number)

    # --- moves of one group -------------------------------------------------------------------------------------------

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
        free = 0
        for number in numbers:
            need = 0 if self.plan.moves[number].name in self.grams.grams else sizes[number] * self.itemsize
            if portion and need > free:
                yield portion
                portion = []
            if not portion:
                free = self.largest + self.grams.free_bytes
            portion.append(number)
            free -= need
        if portion:
            yield portion

    def _take_single(self, numbers: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Moves of one group each, whose Gram matrices are all made before the first of them is taken."""
        moves = {number: self.plan.moves[number] for number in numbers}
        valued = {number: self._values(move) for number, move in moves.items()}
        self.b.drop_temporary()
        if self.limits:
            chosen = {move.name: self.choose(valued[number][0], move) for number, move in moves.items()}
        else:
            values = {move.name: valued[number][0] for number, move in moves.items()}
            chosen = choose_each(values, self.solver, self.prices)
        for number, move in moves.items():
            _, kept, missing = valued.pop(number)
            columns, gain = chosen[move.name]
            self._renumber(number, move, columns, kept, missing)
            yield number, gain

    def _values(self, move: Move) -> tuple[torch.Tensor, torch.Tensor | None, tuple[Place, ...]]:
        """The Gram matrix of a move of one group; what of it to keep; and the places that are missing in that."""
        scene = self.scene(move, Trial())
        kept = self.grams.get(move, scene.a, scene.b)
        if kept is not None:
            return kept, kept, ()
        missing = tuple(place for place in move.root.places if not place.known(scene.free))
        sure = tuple(place for place in move.root.places if place not in missing)
        if not missing or not sure or not self.grams.fits(move.name, self.plan.entries(move) * self.itemsize):
            values = outer_values(scene, move.root)
            return values, None if missing else values, ()
        kept = gram(scene, replace(move.root, places=sure))
        guess = gram(scene, replace(move.root, places=missing))
        assert kept is not None and guess is not None
        return guess.add_(kept), kept, missing

    def _renumber(
        self, number: int, move: Move, columns: np.ndarray, kept: torch.Tensor | None, missing: tuple[Place, ...]
    ) -> None:
        """Take a move of one group. Of the Gram matrices of others only what changes is computed, of B what moves."""
        self.settle(number)
        if len(self.history) + 1 == self.max_sweeps:
            self.grams.drop(move)  # its last turn
        elif kept is not None:
            self.grams.keep(move, kept, columns, missing)
        step = {move.name: columns}
        if columns.ndim > 1:
            moves = (columns != np.arange(columns.shape[-1])).any(axis=tuple(range(columns.ndim - 1)))
        else:
            moves = columns != np.arange(len(columns))
        if not moves.any():
            return
        updates = self.grams.updates_for(self._neighbours(number), move.parameters, float(moves.mean()))
        new = {} if columns.ndim == 1 else {name: act(self.spec, step, name, self.b[name]) for name in move.parameters}
        indices = torch.from_numpy(np.flatnonzero(moves))
        for place in move.root.places:
            block, axis, name = place.block, place.own[0], place.block.parameter
            held = self.b.writable(name)
            if held is None and block not in updates:
                continue
            here = indices.to(self.compared.a[name].device)
            # Of a fibred group B's tensor is new anyway; of others only what moves is read.
            there = here if new else torch.from_numpy(columns[moves]).to(here)
            if block in updates:
                a = block.view(self.compared.a[name])
                some = max(1, tuned.PORTION * a.shape[axis] // a.numel())
                for to, of in zip(torch.split(here, some), torch.split(there, some), strict=True):
                    after = block.view(new[name]).index_select(axis, of) if new else self.b.select(block, axis, of)
                    difference = after.sub_(self.b.select(block, axis, to))
                    part = a.index_select(axis, to)
                    for other, at in updates[block]:
                        self.grams.update(other, at, part, difference)
            if held is not None:
                view = block.view(held)
                source = block.view(new[name]) if new else view
                across = max((x for x in range(view.ndim) if x != axis), key=lambda x: view.shape[x], default=0)
                some = max(1, tuned.PORTION * view.shape[across] // view.numel()) if view.ndim > 1 else view.numel()
                for to, of in zip(torch.split(view, some, across), torch.split(source, some, across), strict=True):
                    to.index_copy_(axis, here, of.index_select(axis, there))
        self._record(step, dict.fromkeys(move.parameters))
        self.stale |= self.plan.neighbours[number]

    def _record(self, step: Arrays, changed: Mapping[str, torch.Tensor | None]) -> None:
        """A step has been taken; of what it changed, the tensors that have not been written to."""
        self.b.moved(
            {**self.arrays, **compose(self.spec, step, self.arrays)},
            {name: tensor for name, tensor in changed.items() if tensor is not None},
        )
        for name in changed:
            self.inner.pop(name, None)

    def _neighbours(self, number: int) -> list[Move]:
        return [self.plan.moves[other] for other in sorted(self.plan.neighbours[number])]
