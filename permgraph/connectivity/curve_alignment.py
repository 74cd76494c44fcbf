"""A curve and the permutation of its far end, minimised in turn.

Tatro, Chen, Das, Melnyk, Sattigeri & Lai (2020), "Optimizing Mode Connectivity via Neuron Alignment", section 4,
minimise the loss along the curve r(t) from a to p(b) over its bends θ and the permutation p, by proximal alternating
steps:

    p  <-  argmin over p  of  E_t L(r(t; θ, p))  +  |p(b) - p_k(b)|² / (2 λ)
    θ  <-  argmin over θ  of  E_t L(r(t; θ, p))  +  |θ - θ_k|² / (2 λ)

θ are here the bends less the points of the straight line where they began, so that the whole curve follows its end. For
the first step they relax the permutation to doubly stochastic matrices, descend, and project. Here the far end itself
is relaxed: some steps of descent take it from p_k(b) to weights w that make the curve better, and the permutation
is projected from beyond them by weight matching of b to p_k(b) + κ (w - p_k(b)), over any spec. Of ever smaller κ the
first is taken at which the objective of the first line falls; if there is none the permutation stays. So no step of
the permutation raises the loss.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.connectivity.curves import Curve, Shape
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.outcomes import StepProgress, TrainingOutcome
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError, MismatchError
from permgraph.matching import WeightMatching
from permgraph.matching.matcher import MatchResult
from permgraph.networks.batches import Loader, Loss, MakeOptimizer
from permgraph.networks.blended import Parts, Perturb, State, Workbench
from permgraph.networks.descend import adam, descend, first_batches, mean_loss
from permgraph.networks.evaluate import template_of
from permgraph.spec.elements import AnyElement, element_of
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys

log = logging.getLogger(__name__)

_BEYOND = (32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True, repr=False)
class AlignedCurve(Displayed):
    """A curve from a to the permuted b, and the permutation.

    Attributes:
        curve: its far end is the permuted b.
        permutation: what was applied to b; over general symmetries, a part of it.
        losses: the mean loss on the curve when the measured batches were read: at the start, and after each round.
        moved: in each round, whether the permutation changed.
        seconds: of wall time.
        outcome: "done": all rounds were made; "interrupted": by the keyboard, and this is the best so far.
        transformation: over general symmetries, what was applied to b.
    """

    curve: Curve
    permutation: Permutation
    losses: tuple[float, ...]
    moved: tuple[bool, ...]
    seconds: float = field(default=0.0, compare=False)
    outcome: TrainingOutcome = field(default="done", compare=False)
    transformation: Transformation | None = None

    @property
    def element(self) -> AnyElement:
        """What was applied to b."""
        return self.permutation if self.transformation is None else self.transformation

    def __str__(self) -> str:
        return (
            f"{self.outcome} after {len(self.moved)} rounds in {self.seconds:.2f} s, the permutation changed in "
            f"{sum(self.moved)}: mean loss on the curve {self.losses[0]:.4g} -> {self.losses[-1]:.4g}"
        )


@waits("fitting the curve")
def fit_aligned_curve(
    a: Network,
    b: Network,
    loader: Loader,
    spec: PermutationSpec,
    *,
    init: AnyElement | MatchResult | None = None,
    shape: Shape = "bezier",
    bends: int = 1,
    rounds: int = 5,
    epochs: int = 2,
    proximity: float = 1000.0,
    relaxed_steps: int = 20,
    measured_batches: int = 4,
    loss: Loss = nn.functional.cross_entropy,
    optimizer: MakeOptimizer = adam,
    perturb: Perturb | None = None,
    matcher: WeightMatching | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> AlignedCurve:
    """Fit a curve from ``a`` to the permuted ``b``, and the permutation, in turn (proximal alternating minimisation).

    Args:
        a, b, loader, shape, bends, loss, optimizer, perturb, model: as for ``fit_curve``.
        spec: the symmetries. Over general ones a step may also turn and scale the far end.
        init: the permutation or transformation to begin with, or an alignment; the identity by default.
        rounds: how many times bends and permutation take their turns.
        epochs: of the bends' training in each round.
        proximity: λ, how far a step may go, as a squared distance of weights for each unit of loss.
        relaxed_steps: of descent of the relaxed far end, before each projection to a permutation.
        measured_batches: on how many batches, at five places of the curve each, the permutation's step is computed and
            judged.
        matcher: the weight matching that makes the step.
        seed: for all random choices.
        progress: called as ``progress(done, rounds)`` after each round.

    Ctrl-C ends the training. A round that had begun counts if the loss on the curve had fallen by then.

    Raises:
        MismatchError: networks that differ, or do not fit the spec, or a permutation of another spec.
        EvaluationError: as for ``fit_curve``, or ``rounds`` or ``measured_batches`` is below 1, or ``proximity`` is not
            positive.
        NonFiniteError: the loss became NaN or infinite.

    References:
        Tatro et al. 2020, section 4.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval() for _ in "ab")
        >>> data = [(torch.randn(16, 2), torch.randint(2, (16,)))]
        >>> found = fit_aligned_curve(a, b, data, pg.auto_spec(a), rounds=2)
        >>> found.permutation.spec == pg.auto_spec(a), len(found.moved)
        (True, 2)
    """
    began = time.perf_counter()
    for name, value in (("rounds", rounds), ("measured_batches", measured_batches), ("relaxed_steps", relaxed_steps)):
        if value < 1:
            raise EvaluationError(f"{name}={value}: give 1 or more")
    if not proximity > 0:
        raise EvaluationError(f"proximity={proximity}: it must be positive")
    template = template_of(model, a=a, b=b)
    first, given = as_state_dict(a), as_state_dict(b)
    check_same_keys(first, given)
    spec.check(first)
    now: Any = spec.identity() if init is None else element_of(init)
    if now.spec.fingerprint != spec.fingerprint:
        raise MismatchError("init is an element of another spec than the one given")
    bench = Workbench(template, first, loss, perturb)
    search = _Search(bench, given, spec, loader, measured_batches, matcher or WeightMatching(), seed)
    curve = Curve.straight(a, now.apply(given), bends=bends, shape=shape)
    start = bench.parameters_of(first)
    free = [
        {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in start.items()} for _ in curve.points[1:-1]
    ]
    losses, moved = [search.loss(curve, start, free, now)], []
    outcome: TrainingOutcome = "done"
    reached = now, _copies(free)
    try:
        for number in range(rounds):
            new = search.step(curve, start, free, now, proximity, relaxed_steps, optimizer)
            moved.append(new is not now)
            now = new
            end = bench.parameters_of(now.apply(given))
            centre = reached[1]

            def penalty(centre: list[State] = centre) -> Tensor:
                gaps = [(s[n] - c[n]).square().sum() for s, c in zip(free, centre, strict=True) for n in s]
                return torch.stack(gaps).sum() / (2 * proximity)

            def blend(draw: torch.Generator, end: State = end) -> Parts:
                return _parts(curve, float(torch.rand((), generator=draw)), start, end, free)

            training = descend(
                bench,
                free,
                blend,
                loader,
                epochs=epochs,
                optimizer=optimizer,
                seed=seed + number,
                part=(number, rounds),
                penalty=penalty if free else None,
            )
            if training.outcome == "interrupted":  # it swallowed Ctrl-C, which was for the whole run
                raise KeyboardInterrupt
            losses.append(search.loss(curve, start, free, now))
            reached = now, _copies(free)
            if progress is not None:
                progress(number + 1, rounds)
    except KeyboardInterrupt:
        outcome = "interrupted"
        by_then = search.loss(curve, start, free, now)
        if by_then < losses[-1]:
            losses.append(by_then)
        else:
            now, free = reached
        moved = moved[: len(losses) - 1]
    line = Curve.straight(a, now.apply(given), bends=bends, shape=shape)
    inner = []
    for point, offset in zip(line.points[1:-1], free, strict=True):
        own = bench.parameters_of(point)
        inner.append(bench.state_dict({name: own[name] + offset[name] for name in own}, point))
    points, seconds = (line.points[0], *inner, line.points[-1]), time.perf_counter() - began
    fitted = Curve(points, shape, tuple(losses[1:]), (losses[0], losses[-1]), seconds, outcome)
    general = isinstance(now, Transformation)
    result = AlignedCurve(
        fitted,
        now.permutation if general else now,
        tuple(losses),
        tuple(moved),
        seconds,
        outcome,
        now if general else None,
    )
    log.info("%s", result)
    return result


def _copies(states: list[State]) -> list[State]:
    return [{name: tensor.detach().clone() for name, tensor in state.items()} for state in states]


def _parts(curve: Curve, t: float, start: State, end: State, free: list[State]) -> Parts:
    """The network at t: on the line between the ends, which either shape keeps straight, and off it by the bends."""
    return [(1 - t, start), (t, end), *zip(curve.coefficients(t)[1:-1], free, strict=True)]


class _Search:
    """Steps of the permutation, judged on the same batches and places throughout."""

    def __init__(
        self,
        bench: Workbench,
        given: Mapping[str, Any],
        spec: PermutationSpec,
        loader: Loader,
        measured_batches: int,
        matcher: WeightMatching,
        seed: int,
    ) -> None:
        self.bench, self.given, self.spec, self.matcher, self.seed = bench, given, spec, matcher, seed
        self.batches = first_batches(loader, measured_batches, bench, seed)

    def loss(self, curve: Curve, start: State, free: list[State], permutation: AnyElement) -> float:
        """The mean loss over batches and places."""
        return self._mean(curve, start, free, self.bench.parameters_of(permutation.apply(self.given)))

    def _mean(self, curve: Curve, start: State, free: list[State], end: State, *, backward: bool = False) -> float:
        return mean_loss(
            self.bench, self.batches, lambda t: _parts(curve, t, start, end, free), self.seed, backward=backward
        )

    def step(
        self,
        curve: Curve,
        start: State,
        free: list[State],
        now: Any,
        proximity: float,
        steps: int,
        optimizer: MakeOptimizer,
    ) -> Any:
        """The next permutation, or the same; over general symmetries, the next transformation."""
        bench = self.bench
        moved = now.apply(self.given)
        end = bench.parameters_of(moved, free=True)
        if not end:
            return now
        fixed = [{name: tensor.detach() for name, tensor in state.items()} for state in free]
        here = self.loss(curve, start, fixed, now)
        descent = optimizer(list(end.values()))
        for _ in range(steps):
            descent.zero_grad(set_to_none=True)
            self._mean(curve, start, fixed, end, backward=True)
            descent.step()
        for beyond in _BEYOND:
            target = dict(moved)
            for name, tensor in moved.items():
                first = bench.first_name.get(name, name)
                if first in end:
                    travelled = end[first].detach().to(tensor.device) - tensor
                    target[name] = (tensor + beyond * travelled).to(tensor.dtype)
            turn = replace(self.matcher, init="identity", restarts=1).match(target, moved, self.spec, self.seed)
            if turn.outcome == "interrupted":  # it swallowed Ctrl-C, which was for the whole run
                raise KeyboardInterrupt
            if turn.element.is_identity:
                break
            new = turn.element @ now
            there = new.apply(self.given)
            gap = sum(float((there[name] - moved[name]).double().square().sum()) for name in bench.names)
            if self.loss(curve, start, fixed, new) + gap / (2 * proximity) < here:
                return new
        return now
