"""Models that join one after another: what each is matched to, where learning looks, and what comes out."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import permgraph as pg
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import LearnedMatching
from permgraph.matching.matcher import MatchResult
from tests.matching.learnable import Reader, perceptron, points, texts, trained

NETWORKS = {"perceptron": (perceptron, points), "layer norm": (Reader, texts)}


@dataclass(frozen=True)
class Watched(LearnedMatching):
    """Learned matching that keeps what it was given and what it found."""

    seen: list[Any] = field(default_factory=list)

    def match(self, a: Any, b: Any, spec: Any, seed: int = 0, progress: Any = None) -> MatchResult:
        result = super().match(a, b, spec, seed, progress)
        self.seen.append((self, dict(a), dict(b), result))
        return result


@functools.cache
def case(name: str) -> tuple[list[nn.Module], pg.PermutationSpec, list[Any]]:
    """Three networks, the group of their architecture, and what they were trained on."""
    make, data = NETWORKS[name]
    x, y = data()
    models = [trained(make, (x, y), seed, steps=60) for seed in range(3)]
    spec = pg.auto_spec(models[0], symmetry="general", example_inputs=(x[:3],))
    return models, spec, list(zip(x.split(64), y.split(64), strict=True))


def mean_loss(model: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        total = sum(float(cross_entropy(model(x), y)) * len(y) for x, y in batches)
    return total / sum(len(y) for _, y in batches)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_learns_where_the_new_mean_will_lie(name: str) -> None:
    models, spec, batches = case(name)
    matcher = Watched(batches, steps=4, measure_every=2, max_batches=None, measured=(0.5,), points=(0.2, 0.8))
    merged = pg.merge(models, pg.Joining(matcher), spec=spec)
    assert [one.points for one, *_ in matcher.seen] == [pytest.approx((0.4 / n, 1.6 / n)) for n in (2, 3)]
    assert [one.measured for one, *_ in matcher.seen] == [pytest.approx((1 / n,)) for n in (2, 3)]
    assert merged.elements[0].is_identity and merged.outcome == "sweep limit" and merged.rounds == 1
    there = [element.apply(model.state_dict()) for element, model in zip(merged.elements, models, strict=True)]
    for number, (_, target, _, found) in enumerate(matcher.seen, start=1):
        before, after = pg.average(there[:number]), pg.average(there[: number + 1])
        assert all(torch.allclose(target[key], tensor, atol=1e-5) for key, tensor in before.items())
        centre = copy.deepcopy(models[0])
        centre.load_state_dict(after)
        assert -found.objective == pytest.approx(mean_loss(centre, batches), rel=1e-4)
    assert mean_loss(merged.model(), batches) == pytest.approx(-matcher.seen[-1][3].objective, rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_model_computes_what_it_did(name: str) -> None:
    models, spec, batches = case(name)
    merged = pg.merge(models, pg.Joining(LearnedMatching(batches, steps=10)), spec=spec)
    for element, model in zip(merged.elements, models, strict=True):
        moved = copy.deepcopy(model)
        moved.load_state_dict(element.apply(model.state_dict()))
        with torch.no_grad():
            assert torch.allclose(moved(batches[0][0]), model(batches[0][0]), atol=1e-3)
    assert sum(not element.is_identity for element in merged.elements) == 2


def test_learning_helps_the_mean_of_three() -> None:
    models, spec, batches = case("layer norm")
    losses = {}
    for steps in (0, 60):
        matcher = LearnedMatching(batches, steps=steps, measured=(0.5,), max_batches=None)
        losses[steps] = mean_loss(pg.merge(models, pg.Joining(matcher), spec=spec).model(), batches)
    assert losses[60] < losses[0]


def test_over_permutations_alone() -> None:
    models, spec, batches = case("perceptron")
    merged = pg.merge(models, pg.Joining(LearnedMatching(batches, steps=10)), spec=spec.permutations())
    assert merged.transformations is None
    assert merged.permutations[0].is_identity


def test_what_it_refuses() -> None:
    models, spec, batches = case("perceptron")
    matcher = LearnedMatching(batches, steps=1)
    for one in (replace(matcher, init=spec.identity()), replace(matcher, checkpoint="run.pt")):
        with pytest.raises(PermgraphError, match="of one pair of models"):
            pg.Joining(one)
    with pytest.raises(MismatchError, match="runs the networks: give merge"):
        pg.merge([model.state_dict() for model in models], pg.Joining(matcher), spec=spec)
