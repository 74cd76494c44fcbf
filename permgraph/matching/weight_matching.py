"""Weight matching: coordinate ascent over linear assignment problems.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2022, section 3.2; here
over any spec, with dependent groups by nested assignment, and with no Gram matrix computed twice for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from permgraph.assignment.solve import Solver
from permgraph.conventions.choices import require_choice
from permgraph.errors import PermgraphError
from permgraph.matching.ascent.in_memory import InMemoryClimb, Order
from permgraph.matching.ascent.restarts import BatchedAscent, batch_width, explore, worth_relaxing
from permgraph.matching.matcher import NOTHING_TO_PERMUTE, Matcher, MatchResult, Progress
from permgraph.matching.problem.limits import Frozen, limits_of
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import Objective, Pair, Weights, pair
from permgraph.matching.problem.renumber import Arrays
from permgraph.matching.relaxation import relaxed_start
from permgraph.matching.threads import on_free_cores
from permgraph.networks.batches import Loader
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import STATISTICS, StateDict

Init: TypeAlias = Permutation | Transformation | Literal["identity", "barycentre"]


@dataclass(frozen=True)
class WeightMatching(Matcher):
    """Maximise the sum over parameters of <A_p, pi(B_p)> over the spec's group, one group at a time.

    With all other groups at rest the best permutation of one is a linear assignment. A group with others fibred over
    it is solved with them by nesting: what it is worth to match two heads is the best assignment of the channels
    inside. A group that meets itself in one parameter, as the hidden units of a recurrent layer do, makes the step
    quadratic: it is linearised, held back until the objective rises, and left out if it never does. So the objective
    never falls, and a run ends when no step raises it.

    Of a spec with general symmetries each group's step is the best element of its structure: an assignment, one with
    signs on the absolute Gram matrix, a polar factor, a phase for each rotary pair, and for heads the assignment of
    what these are worth inside. Gains of norms are taken up by what reads them, and scales and invertible maps are
    balanced in both models first, because the objective has no maximum over them; B is then brought into A's own gauge.
    Where an ascent ends hangs on where it begins, and the objective tells: so runs begin with nothing known, at the
    identity, at the best permutation, and where activations agree if there is a `loader`; `restarts` is how many of
    these, by default all, but without a loader the first alone for networks of more than 16.8 million elements. All
    runs end where a sweep adds less than 1e-5 of the objective, or where ten more at the present pace would not reach
    the best before; the best goes on to 1e-6. `details` has what each reached.

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
        loader: batches as `ActivationMatching` takes them: of a spec with general symmetries, one run then begins where
            the networks' activations on them agree best.
        models: the modules, which `align` fills in where there is a loader.
        memory: bytes that Gram matrices may take between steps; what does not fit is computed anew when it is needed.
            B's weights as they are permuted take as many as they have, besides. By default both together take what
            keeps a run within the size of one model and of its largest Gram matrix, beyond the two models themselves
            (or within 32 MB and three such matrices, where that is more). Below that, it is slower and the result the
            same.

    References:
        Ainsworth, Hayase & Srinivasa 2022, section 3.2.
    """

    general: ClassVar[bool] = True

    max_sweeps: int = 100
    restarts: int | None = None
    init: Init = "barycentre"
    objective: Objective = "inner"
    weights: Weights | None = None
    ignore: Sequence[str] = STATISTICS
    order: Order = "informed"
    solver: Solver = "auto"
    dtype: torch.dtype | None = None
    memory: int | None = None
    frozen: Frozen = ()
    max_moves: int | Mapping[str, int] | None = None
    loader: Loader | None = None
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    @property
    def needs_models(self) -> bool:
        """Whether there is a loader to run them on."""
        return self.loader is not None

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> WeightMatching:
        """The same matcher for these two modules, which it copies before it runs them."""
        return replace(self, models=(model_a, model_b))

    def __post_init__(self) -> None:
        if self.max_sweeps < 0 or (self.restarts is not None and self.restarts < 1):
            raise PermgraphError(
                f"max_sweeps={self.max_sweeps} and restarts={self.restarts}: give 0 or more sweeps and at least one run"
            )
        require_choice("order", self.order, "informed", "random", "given")
        require_choice("init", self.init, "identity", "barycentre", or_a="Permutation")

    @on_free_cores
    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        Args:
            a, b: state dicts that fit the spec; on any devices, in any floating or complex dtype.
            spec: the group, and where it acts.
            seed: for the order of the groups and for restarts.
            progress: called after each sweep.

        Raises:
            MismatchError: a state dict, or `init`, does not fit the spec.
            NonFiniteError: a weight is NaN or infinite.
        """
        return self.match_warm(a, b, spec, seed, progress)

    def match_warm(
        self,
        a: StateDict,
        b: StateDict,
        spec: PermutationSpec,
        seed: int,
        progress: Progress | None = None,
        prices: dict[str, np.ndarray] | None = None,
        *,
        relax: bool = True,
    ) -> MatchResult:
        """Warm-started `match`: reuses the dual prices of the last call on nearly the same pair.

        Args:
            a, b, spec, seed, progress: as there.
            prices: those of the last time's assignments, by group, which are replaced by this time's; empty at first.
                They save time and change nothing.
            relax: whether a run may also begin where the relaxation ends.
        """
        started = time.perf_counter()
        self.require_fit(spec)
        if spec.general is not None:
            from permgraph.matching.general.weights import match_general

            return match_general(self, a, b, spec, seed, progress)
        compared = pair(
            a, b, spec, objective=self.objective, weights=self.weights, ignore=self.ignore, dtype=self.dtype
        )
        result = _Runs(self, compared, spec, seed, {} if prices is None else prices, started).search(progress, relax)
        return replace(result, seconds=time.perf_counter() - started)


class _Runs:
    """The runs of one match: from where they start, which follow, and which is the best."""

    def __init__(
        self,
        settings: WeightMatching,
        compared: Pair,
        spec: PermutationSpec,
        seed: int,
        prices: dict[str, np.ndarray],
        started: float,
    ) -> None:
        self.settings, self.compared, self.spec, self.seed, self.prices = settings, compared, spec, seed, prices
        self.started = started
        self.frozen, self.limits = limits_of(spec, settings.frozen, settings.max_moves, settings.init)
        self.plan = Plan(compared.spec_of(spec), compared.a, self.frozen)
        self.at_rest = {name: compared.inner([name], compared.b) for name in compared.a}
        self.before = compared.reported(sum(self.at_rest.values()))
        # What is frozen where `init` has it, and limits counted from there, would be broken at the identity.
        self.bound = isinstance(settings.init, Permutation) and bool(self.frozen or self.limits)
        self.best: InMemoryClimb | None = None
        self.objectives: list[float] = []
        self.interrupted = False

    def search(self, progress: Progress | None, relax: bool) -> MatchResult:
        """Make all runs, or as many as there are before Ctrl-C."""
        seeds = np.random.SeedSequence(self.seed)
        try:
            for run, stream in enumerate(seeds.spawn(self.settings.restarts or 1)):
                climb = self._climb(stream, run)
                self._begin(climb, run)
                climb.climb(progress)
                self._compare(climb)
                if climb.outcome == "interrupted":
                    raise KeyboardInterrupt
            if self.best is not None and self.best.objective < self.before and not self.bound:
                # A run that did not begin at the identity can end below it. One that does cannot.
                self.best = self._climb(seeds)
                self.best.climb(progress)
                self.objectives.append(self.best.objective)
            if self.settings.restarts is None and self.settings.init == "barycentre" and not self.limits:
                self._go_on(seeds, progress, relax)
        except KeyboardInterrupt:
            self.interrupted = True
        best = self.best
        # Interrupted before anything better was found.
        if best is None or (self.interrupted and best.objective < self.before and not self.bound):
            best = self._climb(seeds)
            if self.bound:
                self._begin(best, 0)
        return MatchResult(
            permutation=Permutation(self.spec, best.arrays),
            objective=best.objective,
            objective_before=self.before,
            outcome="interrupted" if self.interrupted else best.outcome,
            history=tuple(best.history),
            runs=tuple(self.objectives),
            seed=self.seed,
            notes=() if self.plan.moves else (NOTHING_TO_PERMUTE,),
        )

    def _compare(self, climb: InMemoryClimb) -> None:
        self.objectives.append(climb.objective)
        if self.best is None or climb.objective > self.best.objective:
            self.best = climb

    def _climb(self, random: np.random.SeedSequence, run: int = 0) -> InMemoryClimb:
        """A run from the identity."""
        settings = self.settings
        return InMemoryClimb(
            self.compared,
            self.plan,
            solver=settings.solver,
            limits=self.limits,
            max_sweeps=settings.max_sweeps,
            started=self.started,
            order_name="random" if run > 0 and settings.order == "informed" else settings.order,
            rng=np.random.default_rng(random),
            at_rest=self.at_rest,
            memory=settings.memory,
            prices=self.prices,
        )

    def _begin(self, climb: InMemoryClimb, run: int) -> None:
        """Go to the starting point of one of the runs."""
        init = self.settings.init
        again = run > 0 and not any(limits.home is not None for limits in self.limits.values())
        if again and (init != "barycentre" or run % 2 == 0):
            climb.go(self._random(climb.rng))
        elif init == "barycentre":
            climb.free = {name for move in self.plan.moves for name in move.groups}
        elif isinstance(init, Permutation):
            climb.go(dict(init.arrays))

    def _random(self, rng: np.random.Generator) -> Arrays:
        """A random permutation, with what is frozen as `init` has it."""
        drawn = dict(self.spec.random(rng).arrays)
        start = (self.settings.init if isinstance(self.settings.init, Permutation) else self.spec.identity()).arrays
        moving = {name for move in self.plan.moves for name in move.groups}
        for name, array in drawn.items():
            if name not in moving:
                drawn[name] = start[name]
            elif name in self.limits:
                held = self.limits[name].held
                others = np.setdiff1d(np.arange(array.shape[-1]), held)
                drawn[name] = start[name].copy()
                drawn[name][others] = rng.permutation(start[name][others])
        return drawn

    def _go_on(self, seeds: np.random.SeedSequence, progress: Progress | None, relax: bool) -> None:
        """The runs that follow where nobody said how many there should be."""
        best, plan = self.best, self.plan
        if best is None:
            return
        (stream,) = seeds.spawn(1)
        sweeps = len(best.history) if best.outcome == "converged" else 0
        width = batch_width(plan) if best.outcome == "converged" else 0
        if width:
            batched = BatchedAscent(plan, self.compared, self.settings.solver)
            stand = Permutation(self.spec, best.arrays).arrays
            rng, most = np.random.default_rng(stream), self.settings.max_sweeps
            for ascended in explore(batched, stand, best.objective, width, rng, most, progress, self.started):
                better = ascended.objective - best.objective > 1e-6 * abs(best.objective)  # and not by rounding
                if better:
                    best.adopt(ascended)
                self.objectives.append(best.objective if better else min(ascended.objective, best.objective))
                self.interrupted = self.interrupted or ascended.interrupted
        if relax and not (self.frozen or self.interrupted) and worth_relaxing(plan, sweeps):
            climb = self._climb(seeds.spawn(1)[0])
            climb.go(relaxed_start(self.compared, self.spec, self.settings.solver))
            climb.climb(progress)
            self._compare(climb)
            self.interrupted = climb.outcome == "interrupted"
