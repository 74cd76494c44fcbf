"""Frank-Wolfe over the permutations of all models at once, each to a common universe.

Crisostomi, Fumero, Baieri, Bernard & Rodolà, "C²M³: Cycle-Consistent Multi-Model Merging", 2024, section 3; here over
any spec, dependent groups included.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from permgraph.conventions.choices import require_choice
from permgraph.conventions.outcomes import Outcome
from permgraph.conventions.renamed import renamed
from permgraph.errors import PermgraphError
from permgraph.matching import WeightMatching
from permgraph.matching.general.relaxation import GeneralRelaxation
from permgraph.matching.problem.objective import Pair, pair
from permgraph.matching.relaxation import Matrices, Relaxation, highest_point
from permgraph.merging.ascent import require_plain
from permgraph.merging.general import Run, ascent_of
from permgraph.merging.result import Found, Models, Progress, Round
from permgraph.spec.permutation import Permutation

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@renamed(ascent="matcher")
@dataclass(frozen=True)
class FrankWolfeMany:
    """Climb the sum over all pairs of models over doubly stochastic matrices, one set for each model, then round.

    The objective is that of `CycleConsistent`: with R_i the relaxed permutation of model i to the universe, the sum
    over pairs of <R_i(θ_i), R_j(θ_j)>. A step finds, for each model, the permutations that the slope favours, and goes
    towards those of all models together as far as is best: the objective is a polynomial along the way, maximised
    exactly, so the relaxed objective never falls. Since each model has one permutation, to the universe, they compose
    to the identity around every cycle.

    The objective does not change when all models are renumbered alike, and from the mean over all numberings no
    slope tells one from another; so one model, drawn at random, begins as it is.

    Args:
        max_steps: stop after so many steps.
        tolerance: stop when no direction promises more than this share of the objective's own size.
        init: where the other models begin: "barycentre", all entries equal, or "identity", as in the paper.
        polish: whether to go on from the rounded permutations as `CycleConsistent` does, until no model moves.
        max_rounds: of that.
        matcher: the weight matching that rounds and polishes. Its objective must be "inner", and without weights.

    Over general symmetries the models are compared without gains and balanced, and each structure is relaxed as in
    `FrankWolfe`; the result is in the gauge of the first model, as that of `CycleConsistent`.

    The history holds a `Round` for each step with the relaxed objective, and then those of the polish. Where rounding
    ends below the models as they were given, these are kept, and a note says so.

    References:
        Crisostomi et al. 2024, section 3. A step costs about three times as many products as the objective's degree.

    Example:
        >>> models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
        >>> found = pg.merge(models, FrankWolfeMany())
        >>> (found.pairwise(0, 1) @ found.pairwise(1, 2) @ found.pairwise(2, 0)).is_identity
        True
    """

    general: ClassVar[bool] = True

    max_steps: int = 50
    tolerance: float = 1e-4
    init: Literal["barycentre", "identity"] = "barycentre"
    polish: bool = True
    max_rounds: int = 100
    matcher: WeightMatching = field(default_factory=WeightMatching)

    def __post_init__(self) -> None:
        if self.max_steps < 0 or self.max_rounds < 0 or not self.tolerance >= 0:
            raise PermgraphError(
                f"max_steps={self.max_steps}, max_rounds={self.max_rounds} and tolerance={self.tolerance}: none can be "
                f"negative"
            )
        require_choice("init", self.init, "barycentre", "identity")
        require_plain(self.matcher)

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutation of each model; see `MergeMethod`."""
        started = time.perf_counter()
        rng = np.random.default_rng(seed)
        fixed = int(rng.integers(len(models)))
        climb = _Climb(self, models, fixed, started, progress)
        outcome = climb.run()
        try:
            run, notes = self._rounded(climb, rng)
        except KeyboardInterrupt:
            if outcome == "interrupted":  # for the second time
                raise
            outcome = "interrupted"
            run, notes = self._rounded(climb, rng)
        if self.polish and outcome != "interrupted":
            steps = len(climb.history)

            def later(found: Round) -> object:
                return None if progress is None else progress(replace(found, number=steps + found.number))

            run.climb(self.max_rounds, later)
            outcome = run.outcome
        polished = [replace(found, number=len(climb.history) + found.number) for found in run.history]
        return replace(run.found((run.objective,), notes), outcome=outcome, history=(*climb.history, *polished))

    def _rounded(self, climb: _Climb, rng: np.random.Generator) -> tuple[Run, tuple[str, ...]]:
        """The models at the elements nearest to the matrices, or as they were given where those are better."""
        matcher = replace(self.matcher, init="identity", restarts=1)
        run = ascent_of(climb.models, matcher, rng, climb.started)
        given = run.objective
        for number, element in enumerate(climb.rounded()):
            run.put(number, element)
        note = f"Frank-Wolfe: {len(climb.history)} steps to {climb.value:.6g}, {run.objective:.6g} once rounded"
        if run.objective >= given:
            return run, (note,)
        kept = ascent_of(climb.models, matcher, rng, climb.started)
        return kept, (note, "rounding ended below the models as they were given, which are kept")


class _Climb:
    """The present matrices of every model, and the relaxed models at them."""

    def __init__(
        self, settings: FrankWolfeMany, models: Models, fixed: int, started: float, progress: Progress | None
    ) -> None:
        self.settings, self.models, self.started, self.progress = settings, models, started, progress
        # What each is matched to is the sum of the others, which changes with every step: hence one pair for each.
        self.pairs = [Pair(dict(tensors), dict(tensors)) for tensors in self._tensors()]
        self.relaxations = [self._relaxation(compared) for compared in self.pairs]
        self.size = sum(
            float(torch.linalg.vector_norm(one.b[name])) * float(torch.linalg.vector_norm(other.b[name]))
            for at, one in enumerate(self.pairs)
            for other in self.pairs[at + 1 :]
            for name in one.b
        )
        self.matrices = [
            relaxation.barycentre() if settings.init == "barycentre" and number != fixed else relaxation.identity()
            for number, relaxation in enumerate(self.relaxations)
        ]
        self.images = [self._image(number, self.matrices[number]) for number in range(len(models))]
        self.value = self._value(self.images)
        self.history: list[Round] = []

    def _tensors(self) -> list[Mapping[str, torch.Tensor]]:
        """What is compared of each model; over general symmetries without gains and balanced."""
        models, matcher = self.models, self.settings.matcher
        if models.spec.general is not None:
            return [written.tensors for written in models.written(matcher.ignore, matcher.dtype)]
        first = models.states[0]
        return [
            pair(first, state, models.spec, ignore=matcher.ignore, dtype=matcher.dtype).b for state in models.states
        ]

    def _relaxation(self, compared: Pair) -> Relaxation:
        models, matcher = self.models, self.settings.matcher
        if models.spec.general is None:
            return Relaxation(compared, models.spec)
        return GeneralRelaxation(compared, models.written(matcher.ignore, matcher.dtype)[0].acting)

    def run(self) -> Outcome:
        """Step until the slope promises nothing, or the limit, or Ctrl-C."""
        degree = 2 * max(self.relaxations[0].degree, 1)
        try:
            while True:
                slopes = [self._slope(number) for number in range(len(self.models))]
                towards = [
                    relaxation.best_corner(slope, self.settings.matcher.solver, here)
                    for relaxation, slope, here in zip(self.relaxations, slopes, self.matrices, strict=True)
                ]
                ways = [
                    {name: goal[name] - matrix for name, matrix in now.items()}
                    for goal, now in zip(towards, self.matrices, strict=True)
                ]
                gap = sum(
                    float((slope[name] * step).sum(dtype=torch.float64))
                    for slope, way in zip(slopes, ways, strict=True)
                    for name, step in way.items()
                )
                if gap <= self.settings.tolerance * self.size:
                    return "converged"
                if len(self.history) >= self.settings.max_steps:
                    return "sweep limit"
                if not self._advance(ways, gap, degree):
                    return "converged"
        except KeyboardInterrupt:
            return "interrupted"

    def _advance(self, ways: Sequence[Matrices], rate: float, degree: int) -> bool:
        """Go along a direction to where the objective is greatest; whether that is higher than here."""
        # The objective is a polynomial of this degree in the length: its values at as many points settle it.
        points = (1 - np.cos(np.pi * np.arange(1, degree + 1) / degree)) / 2
        values = [self._value([self._image(n, self._at(n, ways, float(p))) for n in range(len(ways))]) for p in points]
        polynomial = np.polynomial.Polynomial.fit([0.0, *points], [self.value, *values], degree, domain=[0, 1])
        length = highest_point(polynomial)
        there = [self._at(number, ways, length) for number in range(len(ways))]
        images = [self._image(number, matrices) for number, matrices in enumerate(there)]
        value = self._value(images)
        if not value > self.value:
            return False
        self.matrices, self.images, self.value = there, images, value
        self.history.append(Round(len(self.history) + 1, value, (), time.perf_counter() - self.started))
        log.debug("%s", self.history[-1])
        if self.progress is not None:
            self.progress(self.history[-1])
        return True

    def rounded(self) -> list[Any]:
        """The permutations, or elements, nearest to the matrices."""
        solver = self.settings.matcher.solver
        return [
            relaxation.round_to_element(matrices, solver)
            if isinstance(relaxation, GeneralRelaxation)
            else Permutation(self.models.spec, relaxation.round(matrices, solver))
            for relaxation, matrices in zip(self.relaxations, self.matrices, strict=True)
        ]

    def _at(self, number: int, ways: Sequence[Matrices], length: float) -> Matrices:
        return {name: matrix + length * ways[number][name] for name, matrix in self.matrices[number].items()}

    def _image(self, number: int, matrices: Matrices) -> Tensors:
        """The relaxed model. It is the derivative of its inner product with any other by that other."""
        compared, relaxation = self.pairs[number], self.relaxations[number]
        leaves = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in compared.b.items()}
        seen = relaxation.through(matrices)
        with torch.enable_grad():
            for term in relaxation.terms:
                term.value(replace(compared, a=leaves), seen).backward()  # type: ignore[no-untyped-call]
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    def _slope(self, number: int) -> Matrices:
        """The derivative of the objective by the matrices of one model: of its inner product with the others' sum."""
        for name, tensor in self.pairs[number].a.items():
            tensor = torch.zeros_like(tensor)
            for other, image in enumerate(self.images):
                if other != number:
                    tensor += image[name]
            self.pairs[number].a[name] = tensor
        _, slope = self.relaxations[number].value_and_slope(self.matrices[number])
        return slope

    @staticmethod
    def _value(images: Sequence[Tensors]) -> float:
        total = 0.0
        for name in images[0]:
            whole = torch.stack([image[name] for image in images]).double()
            total += float(whole.sum(0).square().sum() - whole.square().sum()) / 2
        return total
