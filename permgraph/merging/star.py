"""The centre of a star: one network from which the loss is low on the lines to several others.

Sonthalia, Rubinstein, Abbasnejad & Oh (2024), "Do Deep Neural Network Solutions Form a Star Domain?", conjecture that
solutions form a star domain up to permutation rather than a convex set, and train its centre ("Starlight"): the loss
is minimised at places drawn from the lines between the centre and the networks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from permgraph.conventions.displayed import Displayed
from permgraph.conventions.outcomes import StepProgress, TrainingOutcome
from permgraph.conventions.renamed import renamed
from permgraph.conventions.waiting import waits
from permgraph.errors import MismatchError
from permgraph.networks.batches import Loader, Loss, MakeOptimizer
from permgraph.networks.blended import State, Workbench
from permgraph.networks.descend import adam, descend
from permgraph.networks.evaluate import template_of
from permgraph.weights.combine import average
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys


@dataclass(frozen=True, repr=False)
class Star(Displayed):
    """A network trained to be connected to several others.

    Attributes:
        state_dict: of the centre.
        history: in each epoch, the mean training loss at the places drawn from the lines.
        seconds: of wall time.
        outcome: "done": all epochs were run; "interrupted": by the keyboard, and this is the centre so far.
    """

    state_dict: dict[str, Any] = field(repr=False)
    history: tuple[float, ...]
    seconds: float
    outcome: TrainingOutcome = "done"

    def __str__(self) -> str:
        losses = f": mean loss {self.history[0]:.4g} -> {self.history[-1]:.4g}" if self.history else ""
        return f"star, {self.outcome} after {len(self.history)} epochs in {self.seconds:.2f} s{losses}"


@renamed(start="init")
@waits("training the centre")
def fit_star(
    networks: Sequence[Network],
    loader: Loader,
    *,
    init: Network | None = None,
    epochs: int = 10,
    loss: Loss = nn.functional.cross_entropy,
    optimizer: MakeOptimizer = adam,
    model: nn.Module | None = None,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> Star:
    """Train the centre of a star, so that the loss is low on the lines from it to each of several networks.

    The networks stay as they are, and are to be in one numbering: merge them first, and give the permuted ones. Each
    step draws a network and a place on the line from the centre to it. Measure the star with ``star_connectivity``.

    Args:
        networks: two or more modules or state dicts, in evaluation mode.
        loader: batches with targets, as for ``evaluate_on``, that can be read once for each epoch.
        init: where the centre begins; the networks' mean by default.
        epochs: how often to go through the loader.
        loss: called with the network's output (or its ``.logits``) and the targets, gives the mean over the batch.
        optimizer: makes an optimizer for a list of tensors; Adam with rate 3e-3 by default.
        model: the module to run state dicts in, when no network is one.
        seed: for networks and places, and for what the loader draws.
        progress: called as ``progress(done, epochs)`` after each epoch.

    Only parameters are trained. Ctrl-C ends the training and returns the centre so far. Recalibrate BatchNorm in the
    centre afterwards (``recalibrate_batchnorm``).

    Raises:
        MismatchError: fewer than two networks, or networks that differ in a key or a shape.
        EvaluationError: there is no module, or one is in training mode; the loader is empty, or a generator.
        NonFiniteError: the loss became NaN or infinite.

    References:
        Sonthalia et al. 2024.

    Example:
        >>> networks = [nn.Linear(2, 2).eval() for _ in range(3)]
        >>> star = fit_star(networks, [(torch.randn(16, 2), torch.randint(2, (16,)))], epochs=2)
        >>> sorted(star.state_dict), len(star.history)
        (['bias', 'weight'], 2)
    """
    began = time.perf_counter()
    if len(networks) < 2:
        raise MismatchError(f"fit_star() was given {len(networks)} networks: it needs at least two")
    template = template_of(model, **{f"networks[{number}]": network for number, network in enumerate(networks)})
    states = [as_state_dict(network) for network in networks]
    for number, state in enumerate(states[1:], start=1):
        check_same_keys(states[0], state, ("network 0", f"network {number}"))
    first: Mapping[str, Any] = average(states) if init is None else as_state_dict(init)
    check_same_keys(states[0], first, ("network 0", "init"))
    bench = Workbench(template, states[0], loss)
    ends = [bench.parameters_of(state) for state in states]
    centre = bench.parameters_of(first, free=True)

    def blend(draw: torch.Generator) -> Sequence[tuple[float, State]]:
        end = ends[int(torch.randint(len(ends), (), generator=draw))]
        t = float(torch.rand((), generator=draw))
        return [(1 - t, centre), (t, end)]

    training = descend(bench, [centre], blend, loader, epochs=epochs, optimizer=optimizer, seed=seed, progress=progress)
    return Star(bench.state_dict(centre, first), training.history, time.perf_counter() - began, training.outcome)
