"""Ctrl-C, wherever it comes: the best so far, its true objective, an outcome that says so, and a run that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.matching import (
    ActivationMatching,
    FrankWolfe,
    Sinkhorn,
    StraightThrough,
    StreamedWeightMatching,
    WeightMatching,
    activation_matching,
)
from permgraph.matching.ascent import step
from tests.matching.examples import SPECS, inner, state

Data = list[tuple[torch.Tensor, torch.Tensor]]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).eval()


def data() -> Data:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(3)]


MATCHERS: dict[str, Any] = {
    "weights": WeightMatching(restarts=3),
    "weights, as many runs as cost little": WeightMatching(),
    "weights, random order": WeightMatching(restarts=2, order="random", init="identity"),
    "streamed": StreamedWeightMatching(),
    "Frank-Wolfe": FrankWolfe(max_steps=4),
    "Sinkhorn": Sinkhorn(steps=6, round_every=2),
    "activations": ActivationMatching(data()),
    "straight through": StraightThrough(data(), epochs=2, project_every=2),
}


class CtrlC:
    """An assignment that is interrupted when it is asked for the nth time, and at no other."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self.assign = at, 0, step.assign

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.assign(*arguments, **keywords)


@pytest.mark.parametrize("kind", MATCHERS)
def test_at_any_assignment(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = network(0), network(1)
    spec = pg.auto_spec(a, (data()[0][0],))
    counter = CtrlC(0)
    monkeypatch.setattr(step, "assign", counter)
    whole = pg.align(a, b, MATCHERS[kind], spec=spec)
    assert counter.calls > 1
    for at in {1, min(3, counter.calls), (counter.calls + 1) // 2, counter.calls}:
        monkeypatch.setattr(step, "assign", interrupt := CtrlC(at))
        interrupt.assign = counter.assign
        fit = pg.align(a, b, MATCHERS[kind], spec=spec)
        assert fit.outcome == "interrupted"
        # Nothing goes on as if it had not been; Frank-Wolfe still rounds its two groups.
        assert interrupt.calls - at in ((0, 2) if kind == "Frank-Wolfe" else (0,))
        assert fit.objective_before == pytest.approx(whole.objective_before, rel=1e-6)
        assert fit.objective >= fit.objective_before
        if "weights" in kind or kind in ("streamed", "Frank-Wolfe"):
            true = sum(
                float((x * y).sum()) for x, y in zip(a.state_dict().values(), fit.state_dict.values(), strict=True)
            )
            assert fit.objective + dict_rest(a, b) == pytest.approx(true, rel=1e-5)


def dict_rest(a: nn.Module, b: nn.Module) -> float:
    """What the parameters that no group touches add to the inner product."""
    return float((a.state_dict()["4.bias"] * b.state_dict()["4.bias"]).sum())


@pytest.mark.parametrize("init", ["barycentre", "identity"])
@pytest.mark.parametrize("name", ["mlp", "attention", "residual", "experts", "recurrent heads"])
@pytest.mark.parametrize("matcher", [WeightMatching(restarts=2), StreamedWeightMatching()], ids=["memory", "streamed"])
def test_what_is_reported_is_what_was_reached(
    matcher: Any, name: str, init: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    a, b = state(spec, 1), state(spec, 2)
    matcher = replace(matcher, init=init)
    for at in range(1, 14):
        monkeypatch.setattr(step, "assign", interrupt := CtrlC(at))
        found = matcher.match(a, b, spec, 3)
        monkeypatch.undo()
        assert found.outcome == ("interrupted" if interrupt.calls >= at else "converged")
        assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5, abs=1e-4)
        assert found.objective >= found.objective_before
        on = replace(matcher, init=found.permutation).match(a, b, spec, 3)
        assert on.outcome == "converged"
        assert on.objective >= found.objective - 1e-4


def test_between_two_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first run had reached is not lost where the second only draws its beginning."""
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    first = WeightMatching(restarts=1).match(a, b, spec, 0)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pg.PermutationSpec, "random", interrupted)
    found = WeightMatching(restarts=3).match(a, b, spec, 0)
    assert found.outcome == "interrupted" or found.runs == (first.objective,) * 3
    assert found.outcome == "interrupted"
    assert found.objective >= first.objective


@pytest.mark.parametrize("matcher", [WeightMatching, StreamedWeightMatching])
def test_what_is_frozen_stays_where_init_has_it(matcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["mlp"]
    a, start = state(spec, 1), spec.random(3)
    monkeypatch.setattr(step, "assign", CtrlC(1))
    found = matcher(init=start, frozen=["h1"]).match(a, a, spec, 0)  # the identity is the best there is
    assert found.outcome == "interrupted"
    assert np.array_equal(found.permutation.arrays["h1"], start.arrays["h1"])
    assert found.objective == pytest.approx(inner(a, found.permutation.apply(a)), rel=1e-5)


class Interrupted:
    """A loader that is interrupted after so many batches."""

    def __init__(self, batches: Data, after: int) -> None:
        self.batches, self.after = batches, after

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[: self.after]
        raise KeyboardInterrupt


def test_activations_are_matched_by_what_has_been_seen() -> None:
    a, b = network(0), network(1)
    fit = pg.align(a, b, ActivationMatching(Interrupted(data(), 2)))
    seen = pg.align(a, b, ActivationMatching(data()[:2]))
    assert fit.outcome == "interrupted"
    assert fit.permutation == seen.permutation
    assert fit.objective == seen.objective
    assert any("interrupted in batch 2" in note for note in fit.notes)
    assert seen.outcome == "converged"
    with pytest.raises(KeyboardInterrupt):  # nothing has been seen
        pg.align(a, b, ActivationMatching(Interrupted(data(), 0)))


def test_a_sum_that_was_interrupted_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(activation_matching.Moments):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "sums" and self.__dict__.get("count"):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    monkeypatch.setattr(activation_matching, "Moments", Torn)
    with pytest.raises(KeyboardInterrupt):
        pg.align(network(0), network(1), ActivationMatching(data()))


def test_in_the_middle_of_an_epoch() -> None:
    matcher = StraightThrough(Interrupted(data(), 2), epochs=2)
    with pytest.raises(KeyboardInterrupt):  # while it measures the identity: there is nothing to return
        pg.align(network(0), network(1), matcher)
    fit = pg.align(network(0), network(1), replace(matcher, max_batches=1))
    assert fit.outcome == "interrupted"
    assert fit.objective >= fit.objective_before
