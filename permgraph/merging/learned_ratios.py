"""`learn_ratios`: how far from one network to another each layer should go, learned on a little data.

One ratio for all layers is a point on the line between two networks; a ratio for each layer is a point in the box that
they span. Yang et al. (2024), "AdaMerging: Adaptive Model Merging for Multi-Task Learning", section 3.2, learn
coefficients by layer so, of task vectors and without labels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.conventions.choices import require_choice
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.outcomes import StepProgress, TrainingOutcome
from permgraph.conventions.waiting import waits
from permgraph.errors import EvaluationError
from permgraph.networks.batches import Loader, Loss, MakeOptimizer, batches, require_rereadable, seeded
from permgraph.networks.blended import Parts, Workbench
from permgraph.networks.descend import descend
from permgraph.weights.ratios import Ratios, layer_of, ratios_of
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys

By: TypeAlias = Literal["layer", "parameter"]


@dataclass(frozen=True, repr=False)
class LearnedRatios(Displayed):
    """How far each parameter goes from A (0) to B (1).

    Attributes:
        ratios: by the names of parameters and buffers, as `interpolate` takes them.
        losses: the mean loss on the loader at the ratios where learning began, and at these.
        history: the mean loss in each epoch.
        outcome: "done", or "interrupted" by the keyboard.
        seconds: how long it took.
    """

    ratios: dict[str, float]
    losses: tuple[float, float]
    history: tuple[float, ...]
    outcome: TrainingOutcome
    seconds: float


@waits("learning ratios")
def learn_ratios(
    a: nn.Module,
    b: Network,
    loader: Loader,
    loss: Loss = nn.functional.cross_entropy,
    *,
    start: Ratios = 0.5,
    by: By = "layer",
    epochs: int = 20,
    optimizer: MakeOptimizer | None = None,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> LearnedRatios:
    """Learn how far from A to B each layer goes, by gradient descent on the loss of the network there.

    B is one that was aligned to A. What is learned are few numbers, so a few hundred examples will do. They may leave
    the range from 0 to 1. If the loss does not fall, the ratios are those of the start.

    Args:
        a: a module, at whose architecture the networks between are run. BatchNorm runs by the statistics of each batch;
            recalibrate them afterwards.
        b: another one, or its state dict.
        loader: labelled batches, as for `evaluate_on`, which can be read again.
        loss: called with the network's output (or its ``.logits``) and the targets.
        start: the ratios to begin with, as `interpolate` takes them.
        by: a ratio for each ``"layer"``, as a schedule of ratios counts them, or for each ``"parameter"``.
        epochs: passes over the loader.
        optimizer: makes an optimizer for a list of tensors; Adam with learning rate 0.05 by default.
        seed: for the order of the data.
        progress: called as ``progress(done, epochs)`` after each epoch.

    Raises:
        MismatchError: A and B differ in their parameters.
        EvaluationError: the loader is empty or can be read only once, epochs is negative, or the model does not run.
        NonFiniteError: a loss is NaN or infinite.

    Example:
        >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = a.weight.data.fill_(0.0), b.weight.data.fill_(1.0)
        >>> data = [(torch.ones(4, 1), torch.full((4, 1), 0.75))]
        >>> found = learn_ratios(a, b, data, nn.functional.mse_loss, epochs=100)
        >>> round(found.ratios["weight"], 2)
        0.75
    """
    require_choice("by", by, "layer", "parameter")
    require_rereadable(loader)
    if epochs < 0:
        raise EvaluationError(f"epochs={epochs}: it cannot be negative")
    started = time.perf_counter()
    states = as_state_dict(a), as_state_dict(b)
    check_same_keys(*states, ("A", "B"))
    bench = Workbench(a, states[0], loss)
    given = ratios_of(states[0], start)
    layers = {name: name for name in states[0]}
    if by == "layer":  # names outside of layers go with the module that holds them
        layers = {name: layer_of(name) or name.rpartition(".")[0] for name in layers}
    members: dict[str, list[str]] = {}
    for name in bench.names:
        members.setdefault(layers[name], []).append(name)
    means = {layer: sum(given[name] for name in names) / len(names) for layer, names in members.items()}
    free = {layer: torch.tensor(t, device=bench.device).requires_grad_() for layer, t in means.items()}
    ends = [bench.parameters_of(state) for state in states]

    def at(ratios: Mapping[str, Tensor | float]) -> Parts:
        mixed = {
            name: torch.lerp(ends[0][name], ends[1][name], torch.as_tensor(ratios[layers[name]]).to(ends[0][name]))
            for name in bench.names
        }
        return [(1.0, mixed)]

    def mean(ratios: Mapping[str, Tensor | float]) -> float:
        with seeded(seed, bench.device), torch.no_grad():
            values = [float(bench.loss_on(batch, at(ratios))) for batch in batches(loader)]
        return sum(values) / len(values)

    before = mean(means)
    training = descend(
        bench, [free], lambda _: at(free), loader, epochs=epochs, optimizer=optimizer or _adam, seed=seed,
        progress=progress,
    )  # fmt: skip
    learned = {layer: float(t.detach()) for layer, t in free.items()}
    after = mean(learned)
    if not after < before:
        learned, after = means, before
    ratios = {name: learned.get(layers[name], given[name]) for name in states[0]}
    seconds = time.perf_counter() - started
    return LearnedRatios(ratios, (before, after), training.history, training.outcome, seconds)


def _adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)
