"""Joining: models that come together one after another, each matched to the mean of those before it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from permgraph.conventions.outcomes import Outcome
from permgraph.errors import PermgraphError
from permgraph.matching import LearnedMatching, WeightMatching
from permgraph.matching.matcher import SupportsMatch
from permgraph.merging.ascent import Ascent
from permgraph.merging.general import ElementsAscent
from permgraph.merging.result import Found, Models, Progress


@dataclass(frozen=True)
class Joining:
    """Match each model, in the order in which they are given, to the mean of those before it.

    It is for matchers that make the network between two good at its task, `LearnedMatching` above all. Models that
    learn their way to one reference meet it, and not each other; here each learns to be good where the new mean will
    lie, 1/n of the way to the n-th model. There is one match for each model but the first, in whose numbering and gauge
    all end, and no model is matched again.

    Args:
        matcher: how to bring one model to the mean of others. Of a `LearnedMatching`, `points` and `measured` are those
            of a line between two models, and become narrower as more have joined: for the n-th, 2/n of them, so that
            1/2 stands for the new mean throughout. It can begin at no given element, and write no checkpoint, since
            it is of several pairs.

    Example:
        >>> models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
        >>> loader = [(torch.randn(32, 3), torch.randint(2, (32,)))]
        >>> merged = pg.merge(models, Joining(pg.LearnedMatching(loader, steps=20)))
        >>> merged.permutations[0].is_identity
        True
    """

    matcher: SupportsMatch = field(default_factory=WeightMatching)

    def __post_init__(self) -> None:
        if isinstance(self.matcher, LearnedMatching):
            for name in ("init", "checkpoint"):
                if getattr(self.matcher, name) is not None:
                    raise PermgraphError(f"matcher.{name} is of one pair of models, and here it would be of several")

    @property
    def general(self) -> bool:
        """Whether it takes specs with general symmetries: where its matcher does."""
        return bool(getattr(self.matcher, "general", False))

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutation of each model; see `MergeMethod`."""
        kind = Ascent if models.spec.general is None else ElementsAscent
        run = kind(models, self.matcher, np.random.default_rng(seed), time.perf_counter())
        outcome: Outcome = "converged"
        try:
            for number in range(1, len(models)):
                result = run.join(number, range(number), self._for_the(number + 1))
                if result.outcome == "sweep limit":
                    outcome = "sweep limit"
        except KeyboardInterrupt:
            run.stop()
            outcome = "interrupted"
        run.outcome = outcome
        run.moving = [number for number, element in enumerate(run.permutations) if not element.is_identity]
        run.record()
        if progress is not None:
            progress(run.history[0])
        return run.found()

    def _for_the(self, count: int) -> SupportsMatch:
        """The matcher for the model with which there are so many."""
        matcher = self.matcher
        if not isinstance(matcher, LearnedMatching):
            return matcher
        low, high = (2 / count * point for point in matcher.points)
        return replace(matcher, points=(low, high), measured=tuple(2 / count * point for point in matcher.measured))
