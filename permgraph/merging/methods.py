"""The methods: how to choose a permutation for each of several models."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from permgraph.conventions.choices import require_choice
from permgraph.conventions.outcomes import Outcome
from permgraph.conventions.renamed import renamed
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import WeightMatching
from permgraph.matching.matcher import SupportsMatch, runs_networks
from permgraph.merging.ascent import Ascent, require_modules, require_plain, require_rounds
from permgraph.merging.general import ElementsAscent, Run, ascent_of
from permgraph.merging.result import Found, Models, Progress, Round


@dataclass(frozen=True)
class ToReference:
    """Bring every model to one of them, each on its own.

    The others never see each other, so what they share and the reference lacks is lost; the choice of the reference
    matters. One match for each model but one. Over general symmetries all are brought into the reference's gauge.

    Args:
        index: the number of the model that stays as it is.
        matcher: how to bring one model to another.

    Example:
        >>> models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
        >>> pg.merge(models, ToReference(index=1)).permutations[1].is_identity
        True
    """

    index: int = 0
    matcher: SupportsMatch = field(default_factory=WeightMatching)

    @property
    def general(self) -> bool:
        """Whether it takes specs with general symmetries: where its matcher does."""
        return bool(getattr(self.matcher, "general", False))

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutation of each model; see `MergeMethod`."""
        if not 0 <= self.index < len(models):
            raise MismatchError(f"index={self.index}, but the models are 0 to {len(models) - 1}")
        started = time.perf_counter()
        rng = np.random.default_rng(seed)
        if models.spec.general is None:
            ascent = Ascent(models, self.matcher, rng, started)
        else:
            ascent = ElementsAscent(models, self.matcher, rng, started, self.index)
        outcome: Outcome = "converged"
        try:
            for number in range(len(models)):
                if number == self.index:
                    continue
                matcher = self.matcher
                if runs_networks(matcher):
                    modules = require_modules(models.modules, matcher)
                    matcher = matcher.with_models(modules[self.index], modules[number])
                result = matcher.match(models.states[self.index], models.states[number], models.spec, seed)
                ascent.put(number, result.element)
                if result.outcome == "interrupted":
                    raise KeyboardInterrupt
                if result.outcome == "sweep limit":
                    outcome = "sweep limit"
        except KeyboardInterrupt:
            ascent.stop()
            outcome = "interrupted"
        moved = tuple(number for number, permutation in enumerate(ascent.permutations) if not permutation.is_identity)
        ascent.outcome, ascent.history = outcome, [Round(1, ascent.objective, moved, time.perf_counter() - started)]
        if progress is not None:
            progress(ascent.history[0])
        return ascent.found()


@dataclass(frozen=True)
class MergeMany:
    """Match each model in turn to the mean of the others, until none moves.

    With the default matcher each step raises the sum of the inner products of all pairs of models, or does nothing, so
    a run ends. The first steps compare a model with a mean of models that do not correspond yet, which tells little:
    `CycleConsistent` climbs the same hill from a better place.

    Args:
        max_rounds: stop after so many passes over the models.
        matcher: how to bring one model to the mean of the others. A matcher of another objective than the inner product
            is obeyed where it reports a gain; the rounds may then go on to the limit.

    Over general symmetries the models are compared without their gains and balanced; see `CycleConsistent`.

    References:
        Ainsworth, Hayase & Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2022, Algorithm 2.

    Example:
        >>> models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
        >>> pg.merge(models, MergeMany()).outcome
        'converged'
    """

    max_rounds: int = 100
    matcher: SupportsMatch = field(default_factory=lambda: WeightMatching(init="identity"))

    def __post_init__(self) -> None:
        require_rounds(self.max_rounds)

    @property
    def general(self) -> bool:
        """Whether it takes specs with general symmetries: where its matcher does."""
        return bool(getattr(self.matcher, "general", False))

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutation of each model; see `MergeMethod`."""
        ascent = ascent_of(models, self.matcher, np.random.default_rng(seed), time.perf_counter())
        ascent.climb(self.max_rounds, progress)
        return ascent.found()


@renamed(ascent="matcher", start="init")
@dataclass(frozen=True)
class CycleConsistent:
    """Bring every model to a numbering of their own making, so that the sum over all pairs of models is greatest.

    Each model has a permutation to a common universe; that of one model to another goes through it, so permutations
    compose to the identity around every cycle, by construction. The objective is the sum, over all pairs of models, of
    the inner products of their permuted weights, as in Crisostomi et al. They climb it by Frank-Wolfe steps; here it
    is climbed by exact coordinate steps, each of which raises it, over any spec: the models join one after another, in
    random order, each matched to the mean of those that have joined; then each in turn is matched to the mean of all
    others until none moves. No model is a reference.

    Over general symmetries all models are compared without their gains and balanced, and the universe is one of
    rotations, signs and permutations: with all others at rest, the best element of a model is the polar factor of a
    sum of Gram matrices, or an assignment. The result is in the numbering and the gauge of the first model; the
    function of the mean does not hang on which model that is.

    Args:
        max_rounds: stop after so many passes over the models, once all have joined.
        restarts: how many runs to make, with other orders of joining; the best is kept.
        init: "joining", as described; or "identity", from the models as they are given.
        matcher: how one model is matched: its `init` as it joins, from where it is afterwards. Its objective must be
            "inner", and without weights.

    References:
        Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model Merging", 2024.

    Example:
        >>> models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
        >>> found = pg.merge(models, CycleConsistent())
        >>> (found.pairwise(0, 1) @ found.pairwise(1, 2) @ found.pairwise(2, 0)).is_identity
        True
    """

    general: ClassVar[bool] = True

    max_rounds: int = 100
    restarts: int = 1
    init: Literal["joining", "identity"] = "joining"
    matcher: WeightMatching = field(default_factory=WeightMatching)

    def __post_init__(self) -> None:
        require_rounds(self.max_rounds)
        if self.restarts < 1:
            raise PermgraphError(f"restarts={self.restarts}: at least one run is needed")
        require_choice("init", self.init, "joining", "identity")
        require_plain(self.matcher)
        if not isinstance(self.matcher.init, str):
            raise PermgraphError("matcher.init cannot be one permutation for all models; choose one by name")

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutation of each model; see `MergeMethod`."""
        started = time.perf_counter()
        climbing = replace(self.matcher, init="identity", restarts=1)

        def start(stream: np.random.SeedSequence) -> Run:
            return ascent_of(models, climbing, np.random.default_rng(stream), started)

        seeds = np.random.SeedSequence(seed)
        run = start(seeds)
        given = run.objective
        best: Run | None = None
        runs: list[float] = []
        try:
            for stream in seeds.spawn(self.restarts):
                run = start(stream)
                if self.init == "joining":
                    self._join(run)
                    if run.objective < given:  # better matched as they were given than one after another: begin there
                        run = start(stream)
                run.climb(self.max_rounds, progress)
                runs.append(run.objective)
                if best is None or runs[-1] > best.objective:
                    best = run
                if run.outcome == "interrupted":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            run.stop()
            if best is None or run.objective > best.objective:
                best = run
            if best.objective < given:  # some have joined, and the others not yet
                best = start(seeds)
            best.outcome = "interrupted"
            runs = runs or [best.objective]
        assert best is not None
        return best.found(runs)

    def _join(self, run: Run) -> None:
        first, *rest = run.rng.permutation(len(run.models)).tolist()
        joined = [first]
        for number in rest:
            run.join(number, joined, self.matcher)
            joined.append(number)
