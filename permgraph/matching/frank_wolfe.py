"""Frank-Wolfe matching: all groups at once, over doubly stochastic matrices in the place of permutations.

Crisostomi, Fumero, Baieri, Bernard & Rodolà, "C²M³: Cycle-Consistent Multi-Model Merging", 2024, section 3; the method
is Frank & Wolfe's of 1956. Here over any spec, dependent groups included.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

from permgraph.conventions.choices import require_choice
from permgraph.conventions.renamed import renamed
from permgraph.errors import PermgraphError
from permgraph.matching.general.acting import Element
from permgraph.matching.general.gauge import Gauge
from permgraph.matching.general.relaxation import GeneralRelaxation
from permgraph.matching.general.weights import as_transformation, weighted_by
from permgraph.matching.matcher import NOTHING_TO_PERMUTE, Matcher, MatchResult, Progress, Sweep
from permgraph.matching.problem.objective import Pair, pair
from permgraph.matching.relaxation import Matrices, Relaxation, RelaxedAscent
from permgraph.matching.threads import on_free_cores
from permgraph.matching.weight_matching import Init, WeightMatching
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict


@renamed(ascent="matcher")
@dataclass(frozen=True)
class FrankWolfe(Matcher):
    """Maximise the sum over parameters of <A_p, pi(B_p)> over all groups jointly, relaxed, then rounded.

    Each group's permutation becomes a doubly stochastic matrix. A step finds the permutations that the slope at the
    present matrices favours, one assignment for each group, and goes towards all of them together, as far as is best:
    the objective is a polynomial along the way, which is maximised exactly. So the relaxed objective never falls. No
    group is ahead of the others, so the result does not hang on an order of the groups, as coordinate ascent's does.

    A group with others fibred over it has one matrix, and each of those a matrix for every pair of its new and old
    index: channels of head i are matched to channels of head j in a matrix of their own. At the corners of this space
    the objective is the true one, and no corner is better than the best permutation, so nothing is lost by
    relaxing. It costs memory: H^2 D^2 numbers for H heads of D channels.

    Over general symmetries both models are compared without gains and balanced, as `WeightMatching` does, and each
    structure has the hull of its compact part: the ball of spectral norm one for rotations, where the best corner is a
    polar factor; for signed permutations a weight for each combination of signs, all of them together doubly
    stochastic. From the barycentre, which is zero where rotations or signs act, a group moves once the slope tells
    something of it.

    At the end each group is rounded by an assignment. If `polish`, an ascent of weight matching goes on from there, and
    the best of that and of the same ascent from its own start is kept. So the result is never worse than weight
    matching with the same seed, nor than the rounded permutation. Without, it is never worse than the identity.

    Args:
        max_steps: stop after so many steps.
        tolerance: stop when no direction promises more than this share of the objective's own size.
        init: where to begin: "barycentre", the mean over the whole group: all entries equal, and zero for rotations and
            signs; "identity"; or a `Permutation` of the spec, or a `Transformation`.
        polish: whether to go on from the rounded permutation by `matcher`, and to compare with `matcher` itself.
        matcher: the weight matching; its objective, weights, patterns to ignore, solver and dtype are those of the
            relaxation as well.

    References:
        Crisostomi et al. 2024, section 3. A step costs, for each parameter, about twelve products with its groups'
        matrices, and one assignment for each group.

    Example:
        >>> spec = PermutationSpec.parse('''
        ... w  3x2  hidden .
        ... groups: hidden 3
        ... ''')
        >>> a = {"w": torch.tensor([[1.0, 0], [0, 1], [1, 1]])}
        >>> found = FrankWolfe().match(a, {"w": a["w"][[2, 0, 1]]}, spec)
        >>> found.permutation.arrays["hidden"].tolist()
        [1, 2, 0]
    """

    general: ClassVar[bool] = True

    max_steps: int = 50
    tolerance: float = 1e-4
    init: Init = "barycentre"
    polish: bool = True
    matcher: WeightMatching = field(default_factory=WeightMatching)

    def __post_init__(self) -> None:
        if self.max_steps < 0 or not self.tolerance >= 0:
            raise PermgraphError(f"max_steps={self.max_steps} and tolerance={self.tolerance}: neither can be negative")
        require_choice("init", self.init, "identity", "barycentre", or_a="Permutation")

    @on_free_cores
    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        The history holds one `Sweep` for each step, with the relaxed objective and nothing in `moved`, then those of
        the ascent that is kept: between the two it may fall, by what rounding costs. `runs` has what each ascent
        reached, those from the rounded permutation first. `details` has the relaxed objective at the end
        ("relaxed"), that of the rounded permutation ("rounded"), the number of steps, and the last gap: how much the
        slope still promised.

        Args:
            a, b: state dicts that fit the spec; on any devices, in any floating dtype.
            spec: the group, and where it acts.
            seed: for the ascent; the relaxation draws nothing.
            progress: called after each step, and each sweep of the ascent from the rounded permutation.

        Raises:
            MismatchError: a state dict, or `init`, does not fit the spec.
            NonFiniteError: a weight is NaN or infinite.
        """
        started = time.perf_counter()
        self.require_fit(spec)
        inner = self.matcher
        problem: _Problem = (_Permutations if spec.general is None else _Elements)(inner, a, b, spec)
        compared, relaxation = problem.compared, problem.relaxation
        start = problem.start(self.init)
        run = RelaxedAscent(relaxation, inner.solver, start, self.max_steps, self.tolerance, started)
        run.climb(progress)
        try:
            rounded, reached = problem.rounded(run.matrices)
        except KeyboardInterrupt:
            if run.outcome == "interrupted":  # for the second time
                raise
            run.outcome = "interrupted"
            rounded, reached = problem.rounded(run.matrices)
        before = compared.objective(compared.b)
        details = {
            "relaxed": compared.reported(run.value),
            "rounded": reached,
            "steps": float(len(run.history)),
            "gap": compared.scale * run.gap,
        }
        notes = () if relaxation.groups else (NOTHING_TO_PERMUTE,)
        if run.outcome == "sweep limit":
            notes = (*notes, f"Frank-Wolfe stopped at max_steps={self.max_steps}, before it converged")
        if self.polish and run.outcome != "interrupted":
            last = len(run.history)

            def later(sweep: Sweep) -> Sweep:
                return replace(sweep, number=last + sweep.number, seconds=sweep.seconds + before_ascent)

            before_ascent = time.perf_counter() - started
            polished = replace(inner, init=rounded).match(
                a, b, spec, seed, None if progress is None else lambda sweep: progress(later(sweep))
            )
            runs = polished.runs
            if polished.outcome != "interrupted":
                # Cheap next to the relaxation, and on some networks coordinate ascent does end higher.
                plain = inner.match_warm(a, b, spec, seed, relax=False)  # which this was
                runs = (*runs, *plain.runs)
                if plain.objective > polished.objective or plain.outcome == "interrupted":
                    kept = max(polished, plain, key=lambda result: result.objective)
                    if kept is plain:
                        notes = (*notes, "weight matching from its own start ended higher, and is kept")
                    polished = replace(kept, outcome=plain.outcome)
            return replace(
                polished,
                history=(*run.history, *map(later, polished.history)),
                runs=runs,
                seconds=time.perf_counter() - started,
                notes=notes,
                details=details,
            )
        if reached < before:
            rounded, reached = problem.at_rest(), before
            notes = (*notes, "rounding ended below the identity, which is kept")
        return MatchResult(
            rounded.permutation if isinstance(rounded, Transformation) else rounded,
            reached,
            before,
            run.outcome,
            tuple(run.history),
            (reached,),
            seed,
            time.perf_counter() - started,
            notes,
            details,
            rounded if isinstance(rounded, Transformation) else None,
        )


class _Problem(ABC):
    """What is climbed, and how its matrices become elements of the group.

    Attributes:
        compared: the tensors to compare.
        relaxation: the objective over the hull of the group.
    """

    compared: Pair
    relaxation: Relaxation

    @abstractmethod
    def start(self, init: Init) -> Matrices:
        """The matrices to begin with."""

    @abstractmethod
    def rounded(self, matrices: Matrices) -> tuple[Permutation | Transformation, float]:
        """The element nearest to the matrices, and its objective."""

    @abstractmethod
    def at_rest(self) -> Permutation | Transformation:
        """The element that leaves B where it was, as far as it can be compared there."""


class _Permutations(_Problem):
    """Permutations alone."""

    def __init__(self, inner: WeightMatching, a: StateDict, b: StateDict, spec: PermutationSpec) -> None:
        self.inner, self.spec = inner, spec
        self.compared = pair(
            a, b, spec, objective=inner.objective, weights=inner.weights, ignore=inner.ignore, dtype=inner.dtype
        )
        self.relaxation = Relaxation(self.compared, spec)

    def start(self, init: Init) -> Matrices:
        if init == "barycentre":
            return self.relaxation.barycentre()
        return self.relaxation.corner(init.arrays if isinstance(init, Permutation) else {})

    def rounded(self, matrices: Matrices) -> tuple[Permutation | Transformation, float]:
        found = Permutation(self.spec, self.relaxation.round(matrices, self.inner.solver))
        return found, self.compared.objective_at(self.spec, found.arrays)

    def at_rest(self) -> Permutation | Transformation:
        return Permutation.identity(self.spec)


class _Elements(_Problem):
    """Elements of a general spec, between models without gains and balanced."""

    relaxation: GeneralRelaxation

    def __init__(self, inner: WeightMatching, a: StateDict, b: StateDict, spec: PermutationSpec) -> None:
        self.inner, self.spec = inner, spec
        self.gauge = Gauge(spec, a, b, ignore=inner.ignore, dtype=inner.dtype)
        weighted, scale, offset = weighted_by(inner, self.gauge)
        self.compared = Pair(weighted, self.gauge.b, scale, offset)
        self.relaxation = GeneralRelaxation(self.compared, self.gauge.acting)

    def start(self, init: Init) -> Matrices:
        if init == "barycentre":
            return self.relaxation.barycentre()
        element = Element()
        if not isinstance(init, str):
            given = as_transformation(init, self.spec) if isinstance(init, Permutation) else init
            element = self.gauge.element(given)
        return self.relaxation.corner_at(element)

    def rounded(self, matrices: Matrices) -> tuple[Permutation | Transformation, float]:
        element = self.relaxation.round_to_element(matrices, self.inner.solver)
        acting = self.gauge.acting
        there = {name: acting.act(name, tensor, element) for name, tensor in self.gauge.b.items()}
        return self.gauge.transformation(element), self.compared.objective(there)

    def at_rest(self) -> Permutation | Transformation:
        return self.gauge.transformation(Element())
