"""Rounds over several models: each in turn is matched to the mean of the others until none moves.

With all other models at rest, the sum of inner products over all pairs of models is linear in what one of them is, and
its slope is the sum of the others. So a matcher that raises the inner product with their mean raises the whole.
"""

from __future__ import annotations

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from permgraph.conventions.outcomes import Outcome
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import MatchResult, WeightMatching
from permgraph.matching.matcher import SupportsMatch, runs_networks
from permgraph.merging.compared import Compared
from permgraph.merging.result import Found, Models, Progress, Round
from permgraph.spec.permutation import Permutation
from permgraph.spec.transformation import Transformation
from permgraph.weights.combine import average

log = logging.getLogger(__name__)


class Rounds(ABC):
    """One run: the present permutation of each model, and the rounds over the models that led there."""

    def __init__(self, models: Models, rng: np.random.Generator, started: float) -> None:
        self.models, self.rng, self.started = models, rng, started
        self.permutations: list[Any] = [models.spec.identity()] * len(models)
        self.history: list[Round] = []
        self.outcome: Outcome = "sweep limit"
        self.moving: list[int] = []  # the models that have moved in the present round

    @property
    @abstractmethod
    def objective(self) -> float:
        """The sum over all pairs of models of the inner products of their permuted weights."""

    @abstractmethod
    def step(self, number: int) -> bool:
        """Match one model to the mean of the others; whether it moved.

        Raises:
            KeyboardInterrupt: the matcher was interrupted.
        """

    def run_rounds(self, max_rounds: int, progress: Progress | None) -> None:
        """Match each model, in random order, to the mean of the others, until none moves, or the limit."""
        while len(self.history) < max_rounds:
            self.moving = []
            for number in self.rng.permutation(len(self.models)).tolist():
                if self.step(number):
                    self.moving.append(number)
            self.record()
            if progress is not None:
                progress(self.history[-1])
            if not self.moving:
                self.outcome = "converged"
                return

    def record(self) -> None:
        """Add the present round to the history."""
        seconds = time.perf_counter() - self.started
        self.history.append(Round(len(self.history) + 1, self.objective, tuple(sorted(self.moving)), seconds))
        log.debug("%s", self.history[-1])


class InMemory(Rounds):
    """Rounds over models in memory, which Ctrl-C ends with what the models have been given."""

    @abstractmethod
    def stop(self) -> None:
        """End here, at Ctrl-C: what models have been given is kept."""

    def climb(self, max_rounds: int, progress: Progress | None) -> None:
        """Match each model, in random order, to the mean of the others, until none moves, or the limit, or Ctrl-C."""
        try:
            self.run_rounds(max_rounds, progress)
        except KeyboardInterrupt:
            self.stop()
            self.record()


class Ascent(InMemory):
    """A run over models in memory, which holds the models at their present permutations.

    Attributes:
        least_gain: what a matcher of another objective must report for a step to count, relative to the objective.
    """

    least_gain = 0.0

    def __init__(self, models: Models, matcher: SupportsMatch, rng: np.random.Generator, started: float) -> None:
        super().__init__(models, rng, started)
        self.matcher = matcher
        self.compared = Compared.of(models.spec, models.states[0], matcher)
        self.moved: list[Mapping[str, Any]] = list(models.states)

    @property
    def objective(self) -> float:
        """The sum over all pairs of models of the inner products of their permuted weights."""
        return self.compared.pairs(self.moved)

    def put(self, number: int, permutation: Permutation | Transformation) -> None:
        """Give one model this permutation, from the numbering in which it was given."""
        self.permutations[number] = permutation
        self.moved[number] = permutation.apply(self.models.states[number])

    def stop(self) -> None:
        """End here, at Ctrl-C: the permutations that models have been given are kept."""
        self.outcome = "interrupted"
        # It may have come between a permutation and the model at it.
        self.moved = [p.apply(state) for p, state in zip(self.permutations, self.models.states, strict=True)]

    def step(self, number: int) -> bool:
        """Match one model to the mean of the others; whether it moved.

        Raises:
            KeyboardInterrupt: the matcher was interrupted; the best that it had found is kept.
        """
        others = average([state for other, state in enumerate(self.moved) if other != number])
        result = self.match(others, number)
        moves = self._take(result, others, number)
        if result.outcome == "interrupted":  # it swallowed Ctrl-C, which was for the whole run
            raise KeyboardInterrupt
        return moves

    def _take(self, result: MatchResult, others: Mapping[str, Any], number: int) -> bool:
        """Give a model the permutation that a matcher has chosen for it, if that is better; whether it is."""
        if result.element.is_identity:
            return False
        new = result.element.apply(self.moved[number])
        if self.compared.linear:
            # In float64, where the matcher's own figures may be of float32.
            if not self.compared.rises(others, self.moved[number], new):
                return False
        elif result.objective - result.objective_before <= self.least_gain * abs(result.objective):
            return False
        self.permutations[number] = result.element @ self.permutations[number]
        self.moved[number] = new
        return True

    def join(self, number: int, joined: Sequence[int], matcher: SupportsMatch) -> MatchResult:
        """Match one model to the mean of those that have joined.

        Raises:
            KeyboardInterrupt: the matcher was interrupted; the best that it had found is kept.
        """
        result = self.match(average([self.moved[other] for other in joined]), number, matcher)
        there: Any = result.element  # of the kind that all of them are
        self.put(number, there @ self.permutations[number])
        if result.outcome == "interrupted":
            raise KeyboardInterrupt
        return result

    def found(self, runs: Sequence[float] = (), notes: Sequence[str] = ()) -> Found:
        """What the run has come to."""
        return Found(tuple(self.permutations), self.outcome, tuple(self.history), tuple(runs), tuple(notes))

    def match(self, target: Mapping[str, Any], number: int, matcher: SupportsMatch | None = None) -> MatchResult:
        """What a matcher, by default the run's, makes of one model, at its present permutation, and a target."""
        matcher = matcher or self.matcher
        if runs_networks(matcher):
            matcher = matcher.with_models(self._module(target, number), self._module(self.moved[number], number))
        return matcher.match(target, self.moved[number], self.models.spec, int(self.rng.integers(2**31)))

    def _module(self, state: Mapping[str, Any], number: int) -> nn.Module:
        modules = require_modules(self.models.modules, self.matcher)
        module = copy.deepcopy(modules[number])
        module.load_state_dict(state)
        return module


def require_modules(modules: Sequence[nn.Module] | None, matcher: object) -> Sequence[nn.Module]:
    """The modules, which a matcher that runs the networks cannot do without."""
    if modules is None:
        raise MismatchError(f"{type(matcher).__name__} runs the networks: give merge() modules, not state dicts")
    return modules


def require_rounds(max_rounds: int) -> None:
    """Raise unless there is at least one round."""
    if max_rounds < 1:
        raise PermgraphError(f"max_rounds={max_rounds}: at least one pass over the models is needed")


def require_plain(matcher: WeightMatching) -> None:
    """Raise where what the matcher raises is not the plain inner product, of which the sum over pairs is one."""
    if matcher.objective != "inner" or matcher.weights is not None:
        raise PermgraphError(
            "the sum over pairs is one of plain inner products: matcher must have objective='inner' and no weights"
        )
    if runs_networks(matcher):
        raise PermgraphError(
            "the models are compared by their weights alone: matcher must have no loader; ToReference and MergeMany "
            "take one"
        )
