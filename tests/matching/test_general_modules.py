"""Modules that change places, in streams that turn: planted elements of the whole group come back in every matcher."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import permgraph as pg
from permgraph.matching import StreamedWeightMatching
from permgraph.matching.cost import estimate
from tests.general.whole_networks import Mixture, State, away, distance, inputs, network, noisy, spec_of

NAME = "mixture"


@cache
def pair(seed: int) -> tuple[State, State, State]:
    """A; A with noise; and that under a random element of the whole group."""
    a = network(NAME, seed).state_dict()
    copy = noisy(NAME, a, 0.02, seed + 10)
    return a, copy, spec_of(NAME).random(seed + 20, every_group=True).apply(copy)


def module(state: State) -> Mixture:
    model = Mixture().double().eval()
    model.load_state_dict(state)
    return model


MATCHERS = {
    "weights": pg.WeightMatching(),
    "streamed": StreamedWeightMatching(),
    "Frank-Wolfe": pg.FrankWolfe(),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MATCHERS)
def test_planted_elements_come_back(name: str, seed: int) -> None:
    a, copy, b = pair(seed)
    fit = pg.align(module(a), module(b), MATCHERS[name], spec=spec_of(NAME))
    assert fit.transformation is not None and fit.transformation.spec == spec_of(NAME)
    assert away(NAME, b, fit.state_dict) < 1e-9
    assert distance(a, fit.state_dict) < 1.05 * distance(a, copy)


@pytest.mark.parametrize("seed", range(3))
def test_activations_bring_experts_and_units_back(seed: int) -> None:
    """All permutations exactly; the rotation that is best for activations is not the one that is best for weights."""
    a, copy, b = pair(seed)
    fit = pg.align(module(a), module(b), pg.ActivationMatching([inputs(NAME)]), spec=spec_of(NAME))
    planted = spec_of(NAME).random(seed + 20, every_group=True)
    assert (fit.permutation @ planted.permutation).is_identity
    assert away(NAME, b, fit.state_dict) < 1e-9
    assert distance(a, fit.state_dict) < 2 * distance(a, copy) < distance(a, b) / 5


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_at(state: State) -> float:
    ids, targets = batches()[0]
    with torch.no_grad():
        return float(loss(module(state)(ids), targets))


def batches(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(inputs(NAME), module(pair(seed)[0])(inputs(NAME)).argmax(-1))]


@pytest.mark.parametrize(
    "matcher",
    [pg.LearnedMatching(batches(), loss, steps=4), pg.Sinkhorn("midpoint", batches(), loss, steps=3),
     pg.StraightThrough(batches(), loss=loss, epochs=1)],
    ids=lambda matcher: type(matcher).__name__,
)  # fmt: skip
def test_matching_by_loss_is_no_worse_than_by_weights_and_keeps_the_function(matcher: pg.Matcher) -> None:
    a, _, b = pair(0)
    fit = pg.align(module(a), module(b), matcher, spec=spec_of(NAME))
    assert fit.transformation is not None
    assert away(NAME, b, fit.state_dict) < 1e-9
    assert loss_at(pg.interpolate(a, fit.state_dict, 0.5)) < loss_at(pg.interpolate(a, b, 0.5))


def test_without_modules_experts_stay_where_they_are() -> None:
    a, copy, b = pair(0)
    plain = pg.auto_spec(Mixture(), (inputs(NAME),), symmetry="general")
    assert distance(a, pg.align(a, b, spec=plain).state_dict) > 3 * distance(a, copy)


def test_begins_at_an_element_that_it_is_given() -> None:
    a, copy, b = pair(1)
    found = pg.align(a, b, spec=spec_of(NAME)).transformation
    again = pg.align(a, b, pg.WeightMatching(init=found), spec=spec_of(NAME))
    assert distance(a, again.state_dict) < 1.05 * distance(a, copy)


def test_plan_counts_what_is_in_stacks() -> None:
    cost = estimate(spec_of(NAME))
    assert cost.elements == sum(tensor.numel() for tensor in Mixture().state_dict().values())
