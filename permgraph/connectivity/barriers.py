"""The barrier between two networks: how much worse the line between them is than its ends.

Along ``w(t) = (1 - t) a + t b`` with a loss ``L`` (lower is better), Entezari et al. (2021), "The Role of Permutation
Invariance in Linear Mode Connectivity of Neural Networks", define the barrier as the largest excess over the straight
line between the losses of the ends:

    barrier = max over t in [0, 1] of  L(w(t)) - [(1 - t) L(a) + t L(b)]

Frankle et al. (2020), "Linear Mode Connectivity and the Lottery Ticket Hypothesis", subtract the mean of the ends from
the largest loss, which is the same number whenever the ends are equally good:

    instability = max over t of L(w(t))  -  (L(a) + L(b)) / 2

Both are computed on the points that were evaluated, the ends among them. A barrier is therefore never negative, and is
0 when the network is nowhere worse than the line. For a metric where higher is better the signs are turned, so that a
barrier is always a loss of quality.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from permgraph.conventions.displayed import Displayed
from permgraph.conventions.outcomes import StepProgress
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError, in_one_line
from permgraph.networks.batches import undisturbed
from permgraph.networks.evaluate import template_of
from permgraph.networks.statistics import running_norms
from permgraph.pictures.tables import barrier_table
from permgraph.weights.combine import interpolate
from permgraph.weights.distributed import redistributed_state
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]
AS_INTERPOLATED = (
    "the networks have BatchNorm, whose statistics between the ends are interpolated, and belong to no network there: "
    "much of the barrier may be theirs. Measure them at each point (recalibrate_batchnorm as prepare=; --recalibrate)"
)
"""What is to be known of a barrier between networks whose normalisation keeps statistics."""

Prepare = Callable[[nn.Module, float], nn.Module]
"""Called with the network at a point and the point, returns the network to evaluate there."""


@dataclass(frozen=True, repr=False)
class Barrier(Displayed):
    """What was measured on the line between two networks, and the height of the barrier on it.

    Attributes:
        alphas: where the line was evaluated, from 0 (network a) to 1 (network b).
        curves: for each metric, its value at each of ``alphas``.
        higher_is_better: the metrics that fall when a network gets worse.
        metric: the metric that ``barrier``, ``losses`` and ``instability`` speak of.
        seconds: how long the evaluation took.
        notes: what there is to know of the numbers, in sentences.
    """

    alphas: tuple[float, ...]
    curves: Mapping[str, tuple[float, ...]]
    higher_is_better: frozenset[str] = frozenset()
    metric: str = "loss"
    seconds: float = field(default=0.0, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def losses(self) -> tuple[float, ...]:
        """The values of the first metric along the line."""
        return self.curves[self.metric]

    @property
    def barrier(self) -> float:
        """The height of the barrier in the first metric (Entezari et al. 2021); 0 where there is none."""
        return self.height()

    @property
    def barriers(self) -> dict[str, float]:
        """The height of the barrier in each metric."""
        return {metric: self.height(metric) for metric in self.curves}

    @property
    def instability(self) -> float:
        """The largest loss less the mean of the ends (Frankle et al. 2020), in the first metric."""
        losses = self._as_loss(self.metric)
        return _largest(losses) - (losses[0] + losses[-1]) / 2

    def excess(self, metric: str | None = None) -> tuple[float, ...]:
        """Return how much worse each point is than the straight line between the ends."""
        losses = self._as_loss(metric or self.metric)
        ends = (losses[0], losses[-1])
        if not all(map(math.isfinite, ends)):
            return (math.nan,) * len(losses)
        return tuple(
            loss - ((1 - t) * ends[0] + t * ends[1]) if 0 < t < 1 else 0.0
            for t, loss in zip(self.alphas, losses, strict=True)
        )

    def height(self, metric: str | None = None) -> float:
        """Return the barrier in one metric.

        It is infinite when the loss is infinite somewhere between the ends, and NaN when a value on the line is NaN or
        an end is not finite: such points are never left out.
        """
        return _largest(self.excess(metric))

    def position(self, metric: str | None = None) -> float:
        """Return the place on the line, from 0 to 1, where the barrier is highest (or a value first not finite)."""
        values = self._as_loss(metric or self.metric)
        bad = [t for t, value in zip(self.alphas, values, strict=True) if not math.isfinite(value)]
        excess = self.excess(metric)
        return bad[0] if bad else self.alphas[excess.index(max(excess))]

    @property
    def nonfinite(self) -> tuple[tuple[str, float], ...]:
        """Each metric and place at which a value is NaN or infinite."""
        return tuple(
            (metric, t)
            for metric, values in self.curves.items()
            for t, value in zip(self.alphas, values, strict=True)
            if not math.isfinite(value)
        )

    def plot(self, metric: str | None = None, *, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Draw one metric along the line, with the straight line between its ends, and return the axes.

        Points that are not finite are marked at the upper edge. Draw several barriers into one ``ax`` to compare them.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from permgraph.connectivity.plots import plot_barrier

        return plot_barrier(self, metric or self.metric, ax=ax, label=label)

    def __str__(self) -> str:
        heights = ", ".join(f"{metric} {height:.4g}" for metric, height in self.barriers.items())
        of = f" in {self.metric}" if len(self.curves) > 1 else ""
        where = f", highest{of} at {self.position():.3g}" if 0 < self.barrier < math.inf else ""
        text = f"barrier: {heights} ({len(self.alphas)} points{where})"
        if self.nonfinite:
            text += f"; not finite at {', '.join(f'{metric}[{t:.3g}]' for metric, t in self.nonfinite)}"
        return "\n".join((text, *self.notes))

    def _repr_html_(self) -> str:
        return barrier_table(self)

    def _as_loss(self, metric: str) -> tuple[float, ...]:
        if metric not in self.curves:
            raise EvaluationError(f"no metric {metric!r} was measured, only {', '.join(map(repr, self.curves))}")
        values = self.curves[metric]
        return tuple(-value for value in values) if metric in self.higher_is_better else values


def barrier(
    a: Network,
    b: Network,
    evaluate: Evaluate,
    points: int | Sequence[float] = 25,
    *,
    model: nn.Module | None = None,
    prepare: Prepare | None = None,
    higher_is_better: Collection[str] = ("accuracy",),
    progress: StepProgress | None = None,
) -> Barrier:
    """Evaluate the networks on the line from ``a`` to ``b``, and return the height of the barrier between them.

    Args:
        a: a module, or a state dict.
        b: a module or a state dict of the same keys and shapes, for example the ``state_dict`` of an alignment.
        evaluate: called with a scratch copy of the network at each point; returns one number, taken as a loss, or
            several by name. ``evaluate_on(loader)`` makes one for classifiers.
        points: how many points, evenly spaced and with both ends, or the points themselves, ascending from 0 to 1.
        model: the module to put state dicts in, when neither ``a`` nor ``b`` is one.
        prepare: called as ``prepare(network, t)`` before each evaluation, returns the network to evaluate. To
            recalibrate BatchNorm: ``lambda net, t: recalibrate_batchnorm(net, loader)``.
        higher_is_better: the names of the metrics that fall when a network gets worse.
        progress: called as ``progress(done, points)`` after each point.

    The module, and ``a`` and ``b``, must be in evaluation mode, and none of them is changed. The barrier is reported
    for the metric called ``"loss"``, or for the first one; ``Barrier.barriers`` has them all.

    Raises:
        MismatchError: ``a`` and ``b`` differ in a key or a shape.
        EvaluationError: there is no module, it is in training mode, the points do not run from 0 to 1, or
            ``evaluate`` returned other metrics than before.

    Example:
        >>> a, b = nn.Linear(1, 1).eval(), nn.Linear(1, 1).eval()
        >>> barrier(a, b, lambda net: net.weight.item() ** 2, points=5).barrier  # a convex loss has none
        0.0
    """
    alphas = _alphas(points)
    template = template_of(model, a=a, b=b)
    first, last = as_state_dict(a), as_state_dict(b)
    check_same_keys(first, last)
    if model is not None:
        check_same_keys(first, model.state_dict(), ("a", "model"))
    return barrier_along(
        lambda t: interpolate(first, last, t),
        evaluate,
        alphas,
        model=template,
        prepare=prepare,
        higher_is_better=higher_is_better,
        progress=progress,
    )


@waits("measuring the path")
def barrier_along(
    path: Callable[[float], Mapping[str, Tensor]],
    evaluate: Evaluate,
    points: int | Sequence[float] = 25,
    *,
    model: nn.Module,
    prepare: Prepare | None = None,
    higher_is_better: Collection[str] = ("accuracy",),
    progress: StepProgress | None = None,
) -> Barrier:
    """Evaluate the networks on any path, and return its barrier over the line between the losses of its ends.

    Args:
        path: gives the state dict at each t from 0 to 1; a ``Curve``, say.
        model: the module to put the state dicts in, in evaluation mode.
        evaluate, points, prepare, higher_is_better, progress: as for ``barrier``.

    Raises:
        EvaluationError: the module is in training mode, the points do not run from 0 to 1, or ``evaluate`` returned
            other metrics than before.

    Example:
        >>> net = nn.Linear(1, 1, bias=False).eval()
        >>> path = lambda t: {"weight": torch.tensor([[t * (1 - t)]])}
        >>> barrier_along(path, lambda net: net.weight.item(), points=3, model=net).barrier
        0.25
    """
    start = time.perf_counter()
    if not callable(evaluate):
        kind = type(evaluate).__name__
        raise EvaluationError(
            f"evaluate must be a function of a network, as evaluate_on(loader) makes one, not a {kind}"
        )
    alphas = _alphas(points)
    template = template_of(model)
    curves: dict[str, list[float]] = {}
    with undisturbed():
        scratch = copy.deepcopy(template)
        own = scratch.state_dict()
        for done, t in enumerate(alphas, start=1):
            scratch.load_state_dict(redistributed_state(dict(path(t)), own))
            for metric, value in measure(evaluate, prepared(scratch, prepare, t), curves, f"t = {t:.3g}").items():
                curves.setdefault(metric, []).append(value)
            if progress is not None:
                progress(done, len(alphas))
    result = Barrier(
        alphas=alphas,
        curves=MappingProxyType({metric: tuple(values) for metric, values in curves.items()}),
        higher_is_better=frozenset(higher_is_better) & curves.keys(),
        metric="loss" if "loss" in curves else next(iter(curves)),
        seconds=time.perf_counter() - start,
        notes=(AS_INTERPOLATED,) if prepare is None and running_norms(model) else (),
    )
    if result.nonfinite:
        logger.warning("the path between the networks has values that are not finite: %s", result)
    return result


def _alphas(points: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(points, int):
        if points < 2:
            raise EvaluationError(f"points must be at least 2, the two ends, not {points}")
        return tuple(i / (points - 1) for i in range(points))
    alphas = tuple(float(t) for t in points)
    if len(alphas) < 2 or alphas[0] != 0 or alphas[-1] != 1 or any(s >= t for s, t in pairwise(alphas)):
        raise EvaluationError(f"points must ascend from 0 to 1 and hold both, not {alphas}")
    return alphas


def prepared(network: nn.Module, prepare: Prepare | None, t: float) -> nn.Module:
    """The network to evaluate at a point: this one, or what ``prepare`` makes of a copy of it."""
    if prepare is None:
        return network
    made = prepare(copy.deepcopy(network), t)
    if not isinstance(made, nn.Module):
        raise EvaluationError(f"prepare must return the network to evaluate, not {type(made).__name__}")
    return made


def measure(evaluate: Evaluate, network: nn.Module, before: Collection[str] | None, at: str) -> dict[str, float]:
    """What ``evaluate`` says of a network, by name, where the metrics must be those ``before``, if there are any."""
    values = evaluate(network)
    named = dict(values) if isinstance(values, Mapping) else {"loss": values}
    if not named:
        raise EvaluationError("evaluate returned no metric: return a number, or a mapping such as {'loss': ...}")
    if before and named.keys() != set(before):
        raise EvaluationError(
            f"evaluate returned the metrics {sorted(named)} at {at}, but {sorted(before)} before: "
            "it must return the same ones at each point"
        )
    try:
        return {metric: float(value) for metric, value in named.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        said = in_one_line(error)
        raise EvaluationError(f"evaluate returned {named}, not a number, or numbers by name: {said}") from error


def _largest(values: Sequence[float]) -> float:
    """``max`` that does not lose a NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values)
