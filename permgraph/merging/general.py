"""Rounds over several models with general symmetries: all written in one gauge, each with an element to a universe.

Without their gains and balanced, models differ by permutations, signs and rotations alone, which keep inner products
bounded: so the sum over all pairs of models is climbed there as over permutations, each step matching one model to the
mean of the others: the polar factor of a sum of Gram matrices, an assignment, a signed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from permgraph.errors import PermgraphError
from permgraph.matching import WeightMatching
from permgraph.matching.general.acting import Element
from permgraph.matching.general.ascent import TOLERANCE, Climb
from permgraph.matching.general.weights import as_transformation, best_climb, frozen_groups
from permgraph.matching.matcher import SupportsMatch
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import dot, with_real_parts
from permgraph.merging.ascent import Ascent, InMemory, Rounds
from permgraph.merging.compared import sum_over_pairs
from permgraph.merging.result import Found, Models
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation

Tensors = Mapping[str, Tensor]
Run: TypeAlias = "Ascent | GeneralAscent"


class GeneralAscent(InMemory):
    """A run over models that are written in one gauge, matched by weights.

    Attributes:
        anew: the matcher of the first round, where models that have joined may be in the wrong place, so that no step
            from there is the right one: each is also matched anew.
    """

    def __init__(self, models: Models, matcher: WeightMatching, rng: np.random.Generator, started: float) -> None:
        super().__init__(models, rng, started)
        self.matcher, spec = matcher, models.spec
        if not isinstance(matcher.init, str):
            raise PermgraphError("matcher.init cannot be one element for all models; choose one by name")
        self.written = models.written(matcher.ignore, matcher.dtype)
        first = self.written[0]
        self.acting = first.acting
        self.frozen = frozen_groups(spec, matcher)
        self.plan = Plan(self.acting.plain, first.tensors, self.frozen)
        self.elements = [Element()] * len(models)
        self.moved: list[Tensors] = [written.tensors for written in self.written]
        self.anew: WeightMatching | None = None

    @property
    def objective(self) -> float:
        """The sum over all pairs of models of the inner products of their weights in the common gauge."""
        return sum_over_pairs(self.moved[0], self.moved)

    def put(self, number: int, element: Element) -> None:
        """Give one model this element, from its own gauge."""
        self.elements[number] = element
        self.moved[number] = self._image(number, element)

    def _image(self, number: int, element: Element) -> Tensors:
        return {name: self.acting.act(name, own, element) for name, own in self.written[number].tensors.items()}

    def stop(self) -> None:
        """End here, at Ctrl-C: the elements that models have been given are kept."""
        self.outcome = "interrupted"
        self.moved = [self._image(number, element) for number, element in enumerate(self.elements)]

    def step(self, number: int) -> bool:
        """Match one model to the mean of the others; whether it moved.

        Raises:
            KeyboardInterrupt: the climb was interrupted; the best that it had found is kept.
        """
        others = [other for other in range(len(self.models)) if other != number]
        target = self._mean(others)
        here = sum(dot(tensor, self.moved[number][name]) for name, tensor in target.items())
        matcher = self.matcher if self.anew is None or self.history else self.anew
        best, interrupted = self._matched(number, target, matcher)
        gain = 0.0 if best is None else best.objective - here
        if best is not None and gain > 0:
            self.put(number, best.element)
        if interrupted:
            raise KeyboardInterrupt
        # Rotations come near to where they end for ever: that is not worth a further round.
        return gain > TOLERANCE * abs(here)

    def join(self, number: int, joined: Sequence[int], matcher: WeightMatching) -> None:
        """Match one model to the mean of those that have joined, wherever it stood.

        Raises:
            KeyboardInterrupt: the climb was interrupted; the best that it had found is kept.
        """
        self.anew = matcher
        best, interrupted = self._matched(number, self._mean(joined), matcher)
        if best is not None:
            self.put(number, best.element)
        if interrupted:
            raise KeyboardInterrupt

    def _mean(self, numbers: Sequence[int]) -> Tensors:
        return {name: torch.stack([self.moved[number][name] for number in numbers]).mean(0) for name in self.moved[0]}

    def _matched(self, number: int, target: Tensors, matcher: WeightMatching) -> tuple[Climb | None, bool]:
        """The best climb of one model to a target, and whether Ctrl-C ended it."""
        own = self.written[number].tensors

        def climb(start: Element, unknown: Sequence[str]) -> Climb:
            return Climb(
                self.acting, target, own, self.plan, start, unknown=unknown, solver=matcher.solver,
                started=self.started,
            )  # fmt: skip

        best, _, interrupted = best_climb(self._starts(number, target, matcher), climb, matcher.max_sweeps)
        return best, interrupted

    def _starts(
        self, number: int, target: Tensors, matcher: WeightMatching
    ) -> Iterator[tuple[str, Element, Sequence[str]]]:
        """Where climbs begin, in words and as an element, and which groups are unknown there."""
        if matcher.init == "barycentre":
            yield "nothing known", Element(), [name for name in self.acting.of_group if name not in self.frozen]
        yield "here", self.elements[number], ()
        if matcher.init == "barycentre":
            yield "permutations", self._permuted(number, target, matcher), ()

    def _permuted(self, number: int, target: Tensors, matcher: WeightMatching) -> Element:
        """Where weight matching over permutations alone ends, in the common gauge."""
        spec = self.models.spec
        permutations = spec.permutations()
        own = {name: permutations.axes[name] for name in target}
        complex_ones = [name for name, axes in own.items() if target[name].ndim > len(axes)]
        seen = with_real_parts(PermutationSpec(permutations.groups, own), complex_ones)
        frozen = [name for name in self.frozen if name in seen.moving]
        alone = replace(matcher, frozen=frozen, weights=None, max_moves=None, dtype=None, ignore=())
        result = alone.match(target, self.written[number].tensors, seen, int(self.rng.integers(2**31)))
        found = as_transformation(Permutation(permutations, dict(result.permutation.arrays)), spec)
        return Element.of(found, self.written[0].device, self.written[0].dtype)

    def found(self, runs: Sequence[float] = (), notes: Sequence[str] = ()) -> Found:
        """What the run has come to: all models in the numbering and the gauge of the first."""
        spec, first = self.models.spec, self.written[0]
        back = self.elements[0].transformation(spec).inverse()
        transformations = [
            Transformation.identity(spec),
            *(
                first.transformation(back @ element.transformation(spec), written)
                for element, written in zip(self.elements[1:], self.written[1:], strict=True)
            ),
        ]
        return found_of(transformations, self, runs, notes)


class ElementsAscent(Ascent):
    """A run over models with general symmetries, with any matcher: all are kept in the gauge of one of them.

    Args:
        models, matcher, rng, started: as of `Ascent`.
        reference: the number of that model.
    """

    least_gain = 1e-5  # Rotations come near to where they end for ever.

    def __init__(
        self, models: Models, matcher: SupportsMatch, rng: np.random.Generator, started: float, reference: int = 0
    ) -> None:
        self.written, self.reference = models.written(), reference
        super().__init__(models, matcher, rng, started)
        self.compared = replace(self.compared, linear=False)  # of tensors in a gauge, and these have their gains
        own, rest = self.written[reference], Transformation.identity(models.spec)
        for number, other in enumerate(self.written):
            if number != reference:
                self.put(number, own.transformation(rest, other))

    @property
    def objective(self) -> float:
        """The sum over all pairs of models of the inner products of their weights in the common gauge."""
        own = self.written[self.reference]
        return sum_over_pairs(own.tensors, [own.image(state) for state in self.moved])

    def found(self, runs: Sequence[float] = (), notes: Sequence[str] = ()) -> Found:
        """What the run has come to: all models in the numbering and the gauge of the reference."""
        elements = list(self.permutations)
        if not elements[self.reference].is_identity:
            back = elements[self.reference].inverse()
            elements = [back @ element for element in elements]
            elements[self.reference] = Transformation.identity(self.models.spec)
        return found_of(elements, self, runs, notes, self.reference)


def ascent_of(models: Models, matcher: SupportsMatch, rng: np.random.Generator, started: float) -> Run:
    """A run over these models with this matcher."""
    if models.spec.general is None:
        return Ascent(models, matcher, rng, started)
    if not isinstance(matcher, WeightMatching):
        return ElementsAscent(models, matcher, rng, started)
    if matcher.loader is None and matcher.weights is None and matcher.objective != "cosine":
        return GeneralAscent(models, matcher, rng, started)
    return ElementsAscent(models, matcher, rng, started)


def found_of(
    elements: Sequence[Transformation],
    run: Rounds,
    runs: Sequence[float] = (),
    notes: Sequence[str] = (),
    reference: int = 0,
) -> Found:
    """The result of a run that ended with these elements."""
    return Found(
        tuple(element.permutation for element in elements),
        run.outcome,
        tuple(run.history),
        tuple(runs),
        tuple(notes),
        tuple(elements),
        reference,
    )
