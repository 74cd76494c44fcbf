"""Low-loss curves between two networks: Bézier curves and polygons whose bends are trained.

Garipov, Izmailov, Podoprikhin, Vetrov & Wilson (2018), "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
train the bends of a curve whose ends are two networks, so that the loss is low all along it. Tatro, Chen, Das, Melnyk,
Sattigeri & Lai (2020), "Optimizing Mode Connectivity via Neuron Alignment", align the networks first, and then let the
permutation of one end take part: proximal alternating minimisation of bends and permutation.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from permgraph.connectivity.barriers import Barrier, Evaluate, Prepare, barrier_along
from permgraph.conventions.choices import require_choice
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.outcomes import StepProgress, TrainingOutcome
from permgraph.conventions.renamed import renamed
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError
from permgraph.networks.batches import Loader, Loss, MakeOptimizer, require_rereadable
from permgraph.networks.blended import Parts, Perturb, Workbench
from permgraph.networks.descend import adam, descend, first_batches, mean_loss
from permgraph.networks.evaluate import template_of
from permgraph.weights.combine import blend, interpolate
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys

log = logging.getLogger(__name__)

Shape: TypeAlias = Literal["bezier", "polygon"]


@dataclass(frozen=True, repr=False)
class Curve(Displayed):
    """A path from one network to another, given by points: its two ends, and the bends between them.

    Called with t from 0 to 1 it returns the state dict there, so that ``barrier_along`` takes it as a path.

    Attributes:
        points: state dicts of the same keys, at least two; the curve begins at the first and ends at the last.
        shape: "bezier": the Bernstein combination of all points, a parabola for three; "polygon": straight from each
            point to the next, each piece taking an equal part of t.
        history: the mean training loss on the curve in each epoch of the bends' training.
        losses: the mean loss on the measured batches, of the curve where training began, and of this one.
        seconds: how long that took.
        outcome: "done": all epochs of it were run; "interrupted": by the keyboard, and this is the best so far.

    Example:
        >>> ends = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}
        >>> curve = Curve((ends[0], {"w": torch.tensor(3.0)}, ends[1]))
        >>> curve(0.5)["w"], curve(1.0)["w"]
        (tensor(1.7500), tensor(1.))
    """

    points: tuple[Mapping[str, Any], ...] = field(repr=False)
    shape: Shape = "bezier"
    history: tuple[float, ...] = field(default=(), compare=False)
    losses: tuple[float, ...] = field(default=(), compare=False)
    seconds: float = field(default=0.0, compare=False)
    outcome: TrainingOutcome = field(default="done", compare=False)

    def __post_init__(self) -> None:
        require_choice("shape", self.shape, "bezier", "polygon", error=EvaluationError)
        if len(self.points) < 2:
            raise EvaluationError(f"a curve has at least its two ends, not {len(self.points)} points")
        for number, point in enumerate(self.points[1:], start=1):
            check_same_keys(self.points[0], point, ("point 0", f"point {number}"))

    @classmethod
    def straight(cls, a: Network, b: Network, *, bends: int = 1, shape: Shape = "bezier") -> Curve:
        """The straight line from ``a`` to ``b`` as a curve with so many bends, evenly spaced on it."""
        if bends < 0:
            raise EvaluationError(f"bends={bends}: it cannot be negative")
        places = [number / (bends + 1) for number in range(bends + 2)]
        return cls(tuple(interpolate(a, b, place) for place in places), shape)

    def coefficients(self, t: float) -> tuple[float, ...]:
        """How much each point counts at t; they add up to 1.

        Raises:
            EvaluationError: t is not between 0 and 1.
        """
        if not 0 <= t <= 1:
            raise EvaluationError(f"t={t}: a curve runs from 0 to 1")
        pieces = len(self.points) - 1
        if self.shape == "bezier":
            return tuple(math.comb(pieces, k) * t**k * (1 - t) ** (pieces - k) for k in range(pieces + 1))
        at = min(int(t * pieces), pieces - 1)
        share = t * pieces - at
        return tuple(1 - share if k == at else share if k == at + 1 else 0.0 for k in range(pieces + 1))

    def __str__(self) -> str:
        bends = len(self.points) - 2
        text = f"{self.shape} curve with {bends} bend{'s' * (bends != 1)}"
        if self.losses:
            text += f", {self.outcome} after {len(self.history)} epochs in {self.seconds:.2f} s: "
            text += f"mean loss on the curve {self.losses[0]:.4g} -> {self.losses[-1]:.4g}"
        return text

    def __call__(self, t: float) -> dict[str, Any]:
        """The state dict at t: the ends exactly, integers from the first point, ties as there."""
        return blend(self.points, self.coefficients(t))

    def barrier(
        self,
        evaluate: Evaluate,
        points: int | Sequence[float] = 25,
        *,
        model: nn.Module,
        prepare: Prepare | None = None,
    ) -> Barrier:
        """Measure the curve as ``barrier`` measures the line; ``model`` is the module that runs the state dicts."""
        return barrier_along(self, evaluate, points, model=model, prepare=prepare)


@renamed(start="init")
@waits("fitting the curve")
def fit_curve(
    a: Network,
    b: Network,
    loader: Loader,
    *,
    shape: Shape = "bezier",
    bends: int = 1,
    init: Curve | None = None,
    epochs: int = 10,
    measured_batches: int = 4,
    loss: Loss = nn.functional.cross_entropy,
    optimizer: MakeOptimizer = adam,
    perturb: Perturb | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> Curve:
    """Train the bends of a curve from ``a`` to ``b`` so that the loss is low all along it.

    Each step takes one batch and one place t, drawn evenly, and follows the gradient of the loss there to the bends;
    the ends stay. Only parameters are trained; running statistics lie on the straight line, so recalibrate BatchNorm
    when the curve is measured (``prepare=``). The bends begin on the straight line. The optimizer's rate is constant
    for half of the epochs and falls to a hundredth over the rest.

    The loss on the curve is measured before and after, on the same batches and places. Should it not have fallen, the
    bends are those it began with, and a warning is logged: no curve is worse than its start on those batches. Ctrl-C
    ends the training and returns the curve so far.

    Args:
        a: a module or a state dict, in evaluation mode.
        b: another of the same architecture; aligned to ``a``, or not.
        loader: batches with targets, as for ``evaluate_on``, that can be read once for each epoch.
        shape: "bezier" or "polygon".
        bends: how many points between the ends are trained; one makes a parabola, or a chain of two.
        init: a curve whose bends to go on with, in place of ``shape`` and ``bends``; its ends are not used.
        epochs: how often to go through the loader.
        measured_batches: on how many batches, at five places of the curve each, it is compared with its start.
        loss: called with the network's output (or its ``.logits``) and the targets, gives the mean.
        optimizer: makes an optimizer for a list of tensors; Adam with rate 3e-3 by default.
        perturb: called as ``perturb(network, batch)`` before each step, with the network on the curve, returns the
            batch to use: an adversarial one, for a curve of robust networks.
        model: the module to run state dicts in, when neither ``a`` nor ``b`` is one.
        seed: for the places, and for what the loader draws.
        progress: called as ``progress(done, epochs)`` after each epoch.

    Nothing of the networks is changed, nor torch's random state.

    Raises:
        MismatchError: ``a``, ``b`` and ``init`` differ in a key or a shape.
        EvaluationError: there is no module, or it is in training mode; the loader is empty, or a generator;
            ``measured_batches`` is below 1.
        NonFiniteError: the loss became NaN or infinite.

    References:
        Garipov et al. 2018; Tatro et al. 2020 for curves between aligned networks.

    Example:
        >>> a, b = nn.Linear(2, 2).eval(), nn.Linear(2, 2).eval()
        >>> data = [(torch.randn(16, 2), torch.randint(2, (16,)))]
        >>> curve = fit_curve(a, b, data, epochs=3)
        >>> len(curve.points), len(curve.history), torch.equal(curve(1.0)["bias"], b.bias)
        (3, 3, True)
    """
    began = time.perf_counter()
    if measured_batches < 1:
        raise EvaluationError(f"measured_batches={measured_batches}: give 1 or more")
    template = template_of(model, a=a, b=b)
    first, last = as_state_dict(a), as_state_dict(b)
    curve = Curve.straight(a, b, bends=bends, shape=shape)
    if init is not None:
        curve = Curve((curve.points[0], *init.points[1:-1], curve.points[-1]), init.shape)
    bench = Workbench(template, first, loss, perturb)
    ends = bench.parameters_of(first), bench.parameters_of(last)
    free = [bench.parameters_of(point, free=True) for point in curve.points[1:-1]]

    def parts_at(t: float) -> Parts:
        return list(zip(curve.coefficients(t), (ends[0], *free, ends[1]), strict=True))

    if epochs:
        require_rereadable(loader)
    chosen = first_batches(loader, measured_batches, bench, seed)
    before = mean_loss(bench, chosen, parts_at, seed)
    training = descend(
        bench,
        free,
        lambda draw: parts_at(float(torch.rand((), generator=draw))),
        loader,
        epochs=epochs,
        optimizer=optimizer,
        seed=seed,
        progress=progress,
    )
    after = mean_loss(bench, chosen, parts_at, seed)
    bends_and_places = zip(free, curve.points[1:-1], strict=True)
    inner: list[Mapping[str, Any]] = [bench.state_dict(state, point) for state, point in bends_and_places]
    if after > before:
        log.warning(
            "training raised the mean loss on the curve from %.4g to %.4g, so its bends stay where they began: give "
            "more epochs=, or an optimizer= of a lower rate",
            before,
            after,
        )
        inner, after = list(curve.points[1:-1]), before
    points = (curve.points[0], *inner, curve.points[-1])
    seconds = time.perf_counter() - began
    fitted = Curve(points, curve.shape, training.history, (before, after), seconds, training.outcome)
    log.info("%s", fitted)
    return fitted
