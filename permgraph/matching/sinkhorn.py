"""Sinkhorn matching: permutations relaxed to doubly stochastic matrices, trained by any gradient method.

Peña, Medeiros, Dubail, Aminbeidokhti, Granger & Pedersoli, "Re-basin via implicit Sinkhorn differentiation", CVPR 2023;
the operator is Mena et al.'s, "Learning Latent Permutations with Gumbel-Sinkhorn Networks", 2018. Here over any spec,
dependent groups included.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from permgraph.assignment.solve import Solver
from permgraph.conventions.choices import require_choice
from permgraph.conventions.outcomes import Outcome
from permgraph.conventions.renamed import renamed
from permgraph.errors import NonFiniteError, PermgraphError
from permgraph.matching.balance import balance
from permgraph.matching.general.kept import kept_part, on_top
from permgraph.matching.matcher import NOTHING_TO_PERMUTE, Matcher, MatchResult, Progress, Sweep, moved_between
from permgraph.matching.problem.objective import Pair, pair
from permgraph.matching.relaxation import Matrices, Relaxation
from permgraph.matching.threads import look_again, on_free_cores
from permgraph.matching.weight_matching import WeightMatching
from permgraph.networks.batches import Loader, Loss, MakeOptimizer, batches, require_rereadable, seeded
from permgraph.networks.blended import MIDPOINT, Between
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import STATISTICS, StateDict

log = logging.getLogger(__name__)

POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where on the line the loss is measured when the objective is the loss at random points of it."""


def fast_adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Adam with learning rate 0.1: the default optimizer of `Sinkhorn`."""
    return torch.optim.Adam(parameters, lr=0.1)


@renamed(ascent="matcher", measured_batches="max_batches")
@dataclass(frozen=True)
class Sinkhorn(Matcher):
    """Descend an objective over doubly stochastic matrices, all groups at once, and round the matrices at the end.

    Each group has a matrix of free scores. Divided by a temperature and balanced in the log domain (rows and columns in
    turn are made to sum to 1), they give a doubly stochastic matrix, through which B's weights go as through a
    permutation. The objective's gradient flows back through the balancing by implicit differentiation, so memory does
    not grow with its iterations. As the temperature falls, the matrices approach permutations.

    A group that is fibred over others has one doubly stochastic matrix for every pair of a new and an old index of each
    parent that moves: channels of head i are matched to those of head j in a matrix of their own, which counts by how
    far i is matched to j. Over a parent that does not move there is one for each of its indices. When the matrices are
    rounded, parents come first, and inside them only the matrices of the pairs that they match.

    Rounding is measured every `round_every` steps and at the end, and the best is kept: of those permutations, of the
    identity and, unless `matcher` is None, of plain weight matching and weight matching from the best of them. So the
    result is never worse than these.

    Over general symmetries (`auto_spec(model, symmetry="general")`) matrices, scales and signs are kept as weight
    matching over the whole group leaves them, or as a `Transformation` given as `init` has them. What is relaxed are
    the permutations of the groups on which no matrices act, with both models in A's gauge and balanced; the objective
    before is then that of the kept part.

    Args:
        objective: what to minimise. "l2": the squared distance of the weights, which needs no data. "midpoint": the
            loss of the network halfway between A and B. "random": that at points of the line from A to B drawn anew in
            each step; it is measured at five fixed points.
        loader: for the last two: batches, one for each step, over and over: a tuple whose last item is the targets and
            whose others are the inputs; or a mapping of keyword arguments, the targets under "labels". A list or a
            `DataLoader`, but no generator.
        loss: called with the network's output (or its `.logits`) and the targets, gives the mean over the batch.
        optimizer: makes an optimizer for the list of score matrices.
        steps: how many gradient steps; 0 only compares the other candidates.
        temperature: at the first step, and at the last; in between it falls (or rises) geometrically.
        iterations: of the balancing, at most, in each step.
        round_every: steps from one rounding to the next.
        max_batches: measure each permutation on the first so many batches of the loader; None for all.
        init: where to begin: "barycentre", all entries equal; "identity"; "matched", where weight matching ends; or a
            `Permutation` of the spec. The last three begin with half of each row's weight on that permutation. Or a
            `Transformation` of a general spec, to be kept.
        ignore: for "l2", patterns (as in `fnmatch`) of names that are permuted, but do not count.
        matcher: the weight matching to compare with and to go on by; None for none. Its solver and dtype are those of
            the relaxation as well.
        models: the modules, which `align` fills in.

    References:
        Peña et al. 2023, sections 3 and 4. A step costs, for each parameter, products with its groups' matrices and
        their gradients, and for each group of n about 4 `iterations` n^2.

    Example:
        >>> spec = PermutationSpec.parse('''
        ... w  3x2  hidden .
        ... groups: hidden 3
        ... ''')
        >>> a = {"w": torch.tensor([[1.0, 0], [0, 1], [1, 1]])}
        >>> found = Sinkhorn(steps=30, matcher=None).match(a, {"w": a["w"][[2, 0, 1]]}, spec)
        >>> found.permutation.arrays["hidden"].tolist()
        [1, 2, 0]
    """

    general: ClassVar[bool] = True

    objective: Literal["l2", "midpoint", "random"] = "l2"
    loader: Loader | None = None
    loss: Loss = nn.functional.cross_entropy
    optimizer: MakeOptimizer = fast_adam
    steps: int = 200
    temperature: tuple[float, float] = (1.0, 0.1)
    iterations: int = 20
    round_every: int = 20
    max_batches: int | None = 32
    init: Permutation | Transformation | Literal["barycentre", "identity", "matched"] = "barycentre"
    ignore: Sequence[str] = STATISTICS
    matcher: WeightMatching | None = field(default_factory=WeightMatching)
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_choice("objective", self.objective, "l2", "midpoint", "random")
        if self.objective != "l2" and self.loader is None:
            raise PermgraphError(f"the objective {self.objective!r} is a loss: give loader= with inputs and targets")
        if self.steps < 0 or self.round_every < 1 or self.iterations < 1:
            raise PermgraphError(
                f"steps={self.steps}, round_every={self.round_every} and iterations={self.iterations}: give 0 or more "
                f"steps, round every 1 or more, and balance with 1 or more iterations"
            )
        if not all(0 < t < math.inf for t in self.temperature):
            raise PermgraphError(
                f"temperature={self.temperature}: give two positive numbers, for the first and the last step"
            )
        if self.max_batches is not None and self.max_batches < 1:
            raise PermgraphError(f"max_batches={self.max_batches}: give 1 or more, or None for all")
        require_choice("init", self.init, "barycentre", "identity", "matched", or_a="Permutation")
        if self.init == "matched" and self.matcher is None:
            raise PermgraphError("init='matched' begins where weight matching ends, so matcher= cannot be None")
        if self.loader is not None:
            require_rereadable(self.loader)

    @property
    def needs_models(self) -> bool:
        """Whether the objective runs the networks."""
        return self.objective != "l2"

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> Sinkhorn:
        """The same matcher for these two modules, of which it runs a copy of A's."""
        return replace(self, models=(model_a, model_b))

    @on_free_cores
    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        The objective reported is minus the squared distance of what the spec moves, or minus the mean loss over the
        measured batches. There is one `Sweep` for each rounding. Outcome: "sweep limit" once all steps are done, since
        there is no test of convergence. `details` has the best objective of a rounded matrix ("rounded"), what weight
        matching reached ("matched") and what it reached from the best ("polished"), and the number of steps.

        Args:
            a, b: state dicts that fit the spec; on any devices, in any floating dtype. The work is done on A's.
            spec: the group, and where it acts.
            seed: for the points drawn, for weight matching, and for all that the loader and the network draw from
                torch's global generator, whose state is left as it was.
            progress: called after each rounding.

        Raises:
            MismatchError: there are no modules where the objective runs them, or they cannot run on a batch, or
                something does not fit the spec.
            NonFiniteError: a weight, the loss or a score is NaN or infinite.
            PermgraphError: the loader yields nothing, or batches without targets, or the loss is no scalar.
        """
        started = time.perf_counter()
        self.require_fit(spec, a, b)
        if spec.general is not None:
            matcher = WeightMatching(ignore=self.ignore) if self.matcher is None else self.matcher
            init = None if isinstance(self.init, str) else self.init
            kept = kept_part(matcher, init, a, b, spec, seed, self.models)
            if isinstance(kept, MatchResult):
                return kept
            above = replace(
                self,
                init=self.init if isinstance(self.init, str) else "identity",
                matcher=None if self.matcher is None else on_top(matcher, spec, kept),
            )
            return kept.result(above.match(kept.a, kept.b, kept.spec, seed, progress), started)
        task = _Weights(self, a, b, spec) if not self.needs_models else _Line(self, a, b, spec)
        with seeded(seed, task.device), torch.enable_grad():  # the caller may have switched gradients off
            return self._search(task, a, b, seed, progress, started)

    def _search(
        self, task: _Task, a: StateDict, b: StateDict, seed: int, progress: Progress | None, started: float
    ) -> MatchResult:
        spec = task.spec
        best = now = spec.identity()
        before = objective = task.objective(best)
        details: dict[str, float] = {}
        notes: list[str] = []
        history: list[Sweep] = []
        outcome: Outcome = "sweep limit"
        rounded = -math.inf
        done = 0

        def keep_if_better(permutation: Permutation) -> float:
            nonlocal best, objective
            reached = task.objective(permutation)
            if reached > objective:
                best, objective = permutation, reached
            return reached

        try:
            if self.matcher is not None:
                plain = self.matcher.match(a, b, spec, seed)
                matched = plain.permutation
                details["matched"] = keep_if_better(matched)
                if plain.outcome == "interrupted":  # it swallowed Ctrl-C, which was for the whole run
                    raise KeyboardInterrupt
            assert not isinstance(self.init, Transformation)  # of a general spec, for which see `match`
            start = matched if self.init == "matched" else self.init
            if isinstance(start, Permutation):
                keep_if_better(start)
                now = start
            scores = _Scores(self, task.relaxation, start)
            optimizer = self.optimizer(list(scores.free.values())) if scores.free else None
            for step in range(1, self.steps + 1 if optimizer is not None else 0):
                assert optimizer is not None
                temperature = self._temperature(step)
                optimizer.zero_grad(set_to_none=True)
                task.cost(scores.matrices(temperature)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                done = step
                look_again()
                if step % self.round_every and step != self.steps:
                    continue
                scores.require_finite()
                with torch.no_grad():
                    new = Permutation(spec, task.relaxation.round(scores.matrices(temperature), self._solver))
                reached = keep_if_better(new)
                rounded = max(rounded, reached)
                seconds = time.perf_counter() - started
                sweep = Sweep(len(history) + 1, reached, moved_between(now, new), {}, seconds)
                now = new
                history.append(sweep)
                log.debug("%s", sweep)
                if progress is not None:
                    progress(sweep)
            if self.matcher is not None and history:
                polished = replace(self.matcher, init=best, restarts=1).match(a, b, spec, seed)
                details["polished"] = keep_if_better(polished.permutation)
                if polished.outcome == "interrupted":
                    outcome = "interrupted"
        except KeyboardInterrupt:
            outcome = "interrupted"
        if not task.relaxation.groups and outcome != "interrupted":
            outcome = "converged"
            notes.append(NOTHING_TO_PERMUTE)
        if history:
            details["rounded"] = rounded
            if objective > rounded:
                notes.append(
                    f"no rounded matrix is the best: {rounded:.6g} was reached so, {objective:.6g} by what is kept"
                )
        details["steps"] = float(done)
        return MatchResult(
            best,
            objective,
            before,
            outcome,
            tuple(history),
            (objective,),
            seed,
            time.perf_counter() - started,
            tuple(notes),
            MappingProxyType(details),
        )

    def _temperature(self, step: int) -> float:
        first, last = self.temperature
        return first * math.exp(math.log(last / first) * (step - 1) / max(1, self.steps - 1))

    @property
    def _solver(self) -> Solver:
        return "auto" if self.matcher is None else self.matcher.solver


class _Task(ABC):
    """What is minimised: a cost of matrices, and the objective of a permutation."""

    device: torch.device

    def __init__(self, compared: Pair, spec: PermutationSpec) -> None:
        self.compared, self.spec = compared, spec
        self.relaxation = Relaxation(compared, spec)

    @abstractmethod
    def cost(self, matrices: Matrices) -> torch.Tensor:
        """What a step lowers."""

    @abstractmethod
    def objective(self, permutation: Permutation) -> float:
        """What is reported: higher is better."""


class _Weights(_Task):
    """The squared distance of the weights, as a share of what it is between unrelated networks."""

    def __init__(self, settings: Sinkhorn, a: StateDict, b: StateDict, spec: PermutationSpec) -> None:
        dtype = settings.matcher.dtype if settings.matcher is not None else None
        super().__init__(pair(a, b, spec, objective="l2", ignore=settings.ignore, dtype=dtype), spec)
        self.device = self.relaxation.like.device
        self.size = max(-self.compared.offset, torch.finfo(torch.float32).tiny)

    def cost(self, matrices: Matrices) -> torch.Tensor:
        total = self.relaxation.like.new_zeros(())
        for name, tensor in self.relaxation.permuted(matrices).items():
            total = total + (self.compared.a[name] - tensor).square().sum()
        return total / self.size

    def objective(self, permutation: Permutation) -> float:
        return self.compared.objective_at(self.spec, permutation.arrays)


class _Line(_Task):
    """The loss on the line between A and B."""

    def __init__(self, settings: Sinkhorn, a: StateDict, b: StateDict, spec: PermutationSpec) -> None:
        assert settings.models is not None and settings.loader is not None
        self.settings, self.loader = settings, settings.loader
        self.between = Between(settings.models[0], a, b, spec, settings.loss)
        self.device = self.between.device
        super().__init__(pair(self.between.a, self.between.b, spec, ignore=()), spec)
        self.stream = self._stream()

    def _stream(self) -> Iterator[tuple[int, Any]]:
        while True:
            yield from enumerate(batches(self.loader), start=1)

    def cost(self, matrices: Matrices) -> torch.Tensor:
        number, batch = next(self.stream)
        point = 0.5 if self.settings.objective == "midpoint" else float(torch.rand(()))
        # Statistics are not among the names: the batch's are used, and buffers cannot have gradients.
        soft = self.relaxation.permuted(matrices)
        soft = {name: _like(soft[name], self.between.a[name]) for name in self.between.names}
        value = self.between.value(batch, number, self.between.at({**self.between.b, **soft}, point))
        self.between.require_finite(value, number, point)
        return value

    def objective(self, permutation: Permutation) -> float:
        points = MIDPOINT if self.settings.objective == "midpoint" else POINTS
        total, count = self.between.totals(self.loader, permutation, points, self.settings.max_batches)
        return -total / count


def _like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A compared tensor in the dtype of the parameter that it stands for."""
    return (torch.view_as_complex(tensor) if like.is_complex() else tensor).to(like.dtype)


class _Scores:
    """The free matrices, and the doubly stochastic ones that they stand for.

    Attributes:
        free: for each group a tensor laid out as `Relaxation` lays out its matrices, which requires a gradient.
    """

    def __init__(self, settings: Sinkhorn, relaxation: Relaxation, start: Permutation | str) -> None:
        self.iterations = settings.iterations
        self.free: Matrices = {}
        if start == "barycentre":
            self.free = {name: relaxation.like.new_zeros(relaxation.shape(name)) for name in relaxation.groups}
        else:
            corner = relaxation.corner(start.arrays if isinstance(start, Permutation) else {})
            for name, matrix in corner.items():
                # Half of each row's weight lies on the permutation then.
                self.free[name] = matrix * (settings.temperature[0] * math.log(max(matrix.shape[-1] - 1, 2)))
        for matrix in self.free.values():
            matrix.requires_grad_()
        self.potentials: Matrices = {}

    def matrices(self, temperature: float) -> Matrices:
        """The scores over the temperature, balanced."""
        found = {}
        for name, scores in self.free.items():
            found[name], potential = balance(scores / temperature, self.iterations, start=self.potentials.get(name))
            self.potentials[name] = potential
        return found

    def require_finite(self) -> None:
        """Refuse scores that are no longer numbers."""
        for name, scores in self.free.items():
            if not bool(torch.isfinite(scores.detach()).all()):
                raise NonFiniteError(f"the scores of group {name!r} became NaN or infinite; lower the learning rate")
