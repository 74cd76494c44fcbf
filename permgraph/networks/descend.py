"""Training weights from which networks are blended: the bends of a curve, the centre of a star.

What is trained is not one network but tensors of which every network on a path is a linear combination. Each step draws
a place on the path, blends the network there, and follows the gradient of its loss back to the tensors that are free.

Places are drawn at random, so steps are noisy however large the batches, and bends that were trained at a constant
rate may end above the line on which they began. So the rate falls, as Garipov et al. (2018) let it: constant for the
first half of the epochs, then linearly to a hundredth at nine tenths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from permgraph.conventions.outcomes import StepProgress, TrainingOutcome
from permgraph.errors import EvaluationError
from permgraph.networks.batches import Loader, MakeOptimizer, batches, require_rereadable, seeded
from permgraph.networks.blended import Parts, State, Workbench

Blend: TypeAlias = Callable[[torch.Generator], Parts]
"""Draws a place, and returns the network there."""

PLACES = 5
"""At how many places, evenly spaced, the loss on a path is measured."""


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Attributes:
        history: the mean loss in each epoch that was finished.
        outcome: "done": all epochs were run; "interrupted": by the keyboard.
    """

    history: tuple[float, ...]
    outcome: TrainingOutcome


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Adam with learning rate 3e-3."""
    return torch.optim.Adam(parameters, lr=3e-3)


def descend(
    bench: Workbench,
    free: Sequence[State],
    blend: Blend,
    loader: Loader,
    *,
    epochs: int,
    optimizer: MakeOptimizer,
    seed: int,
    part: tuple[int, int] = (0, 1),
    penalty: Callable[[], Tensor] | None = None,
    progress: StepProgress | None = None,
) -> Training:
    """Train the tensors of ``free`` in place, for so many epochs or until Ctrl-C.

    Args:
        bench: where the networks run.
        free: what is trained, from `Workbench.parameters_of`.
        blend: draws the network to run.
        part: (k, n) where this is the k-th of n parts of a training, from 0; the rate falls over all of it.
        penalty: added to the loss at each step.
        progress: called as ``progress(done, epochs)`` after each epoch.

    Raises:
        EvaluationError: the loader is empty, or a generator, which cannot be read again.
        NonFiniteError: the loss is NaN or infinite.
    """
    if epochs < 0:
        raise EvaluationError(f"epochs={epochs}: it cannot be negative")
    if epochs > 1:
        require_rereadable(loader)
    history: list[float] = []
    # Adam rejects an empty list, and there is nothing to train in a network without parameters.
    leaves = list(itertools.chain.from_iterable(state.values() for state in free))
    with seeded(seed, bench.device) as draw:
        descent = optimizer(leaves) if leaves and epochs else None
        rates = [group["lr"] for group in descent.param_groups] if descent is not None else []
        try:
            for epoch in range(1, epochs + 1):
                if descent is not None:
                    share = falling((part[0] + (epoch - 0.5) / epochs) / part[1])
                    for group, rate in zip(descent.param_groups, rates, strict=True):
                        group["lr"] = rate * share
                total, count = 0.0, 0
                for batch in batches(loader):
                    with torch.enable_grad():
                        value = bench.loss_on(batch, blend(draw))
                        whole = value if penalty is None else value + penalty()
                    if descent is not None:
                        descent.zero_grad(set_to_none=True)
                        if whole.requires_grad:
                            whole.backward()  # type: ignore[no-untyped-call]
                        descent.step()
                    total, count = total + float(value.detach()), count + 1
                history.append(total / count)
                if progress is not None:
                    progress(epoch, epochs)
        except KeyboardInterrupt:
            return Training(tuple(history), "interrupted")
    return Training(tuple(history), "done")


def falling(done: float) -> float:
    """The rate as a share of its first value, where this share of the training is done (Garipov et al. 2018)."""
    if done <= 0.5:
        return 1.0
    return max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)


def mean_loss(
    bench: Workbench, chosen: Sequence[Any], parts_at: Callable[[float], Parts], seed: int, *, backward: bool = False
) -> float:
    """The mean loss over batches and evenly spaced places of a path; with its gradient, if asked for."""
    total, count = 0.0, len(chosen) * PLACES
    with seeded(seed, bench.device), torch.set_grad_enabled(backward):
        for batch in chosen:
            for place in range(PLACES):
                value = bench.loss_on(batch, parts_at((place + 0.5) / PLACES)) / count
                if backward:
                    value.backward()  # type: ignore[no-untyped-call]
                total += float(value.detach())
    return total


def first_batches(loader: Loader, count: int, bench: Workbench, seed: int) -> list[Any]:
    """The first batches of a loader, to measure on again and again."""
    with seeded(seed, bench.device):
        return [batch for batch, _ in zip(batches(loader), range(count), strict=False)]
