"""Several ascents side by side: the same steps as one makes alone, and what the default makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from permgraph.matching import FrankWolfe, WeightMatching, frank_wolfe, tuned
from permgraph.matching.ascent import restarts as module
from permgraph.matching.ascent.restarts import BatchedAscent, batch_width, worth_relaxing
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import pair
from permgraph.matching.tuned import LONG, WIDTH
from permgraph.spec import PermutationSpec
from permgraph.spec.permutation import Permutation
from tests.matching.examples import SPECS, inner, planted, state

SIMPLE = ("mlp", "residual without a square")
WIDE = PermutationSpec.parse("l1 4096x8 h . | l2 8x4096 k h | l3 2x8 . k | groups: h 4096 · k 8".replace(" | ", "\n"))
SPEC = {
    "mlp": SPECS["mlp"],
    "residual without a square": PermutationSpec.parse("""
        stem   8x3x3x3  c . . .
        conv1  6x8x3x3  m c . .
        conv2  8x6x3x3  c m . .
        scale  8        c
        head   5x8      . c
        groups: c 8 · m 6
    """),
}


def of(spec: PermutationSpec, a: Any, b: Any) -> BatchedAscent:
    compared = pair(a, b, spec)
    return BatchedAscent(Plan(spec, compared.a), compared)


def starts(spec: PermutationSpec, count: int) -> list[dict[str, np.ndarray]]:
    return [dict(spec.random(seed).arrays) for seed in range(count)]


@pytest.mark.parametrize("name", SIMPLE)
def test_values_are_those_of_the_definition(name: str) -> None:
    spec = SPEC[name]
    a, b = state(spec, 1), state(spec, 2)
    given = starts(spec, 4)
    stands = {group: torch.tensor(np.stack([start[group] for start in given])) for group in given[0]}
    expected = [inner(a, Permutation(spec, start).apply(b)) for start in given]
    assert of(spec, a, b).values(stands) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", SIMPLE)
def test_each_ends_where_no_step_helps_and_reports_what_it_reached(name: str) -> None:
    spec = SPEC[name]
    a, b = state(spec, 1), state(spec, 2)
    given = starts(spec, 5)
    found = of(spec, a, b).climb(given, np.random.default_rng(0), 100)
    assert len({round(ascent.objective, 3) for ascent in found}) > 1
    for start, ascent in zip(given, found, strict=True):
        permutation = Permutation(spec, ascent.arrays)
        assert ascent.converged and not ascent.interrupted
        assert ascent.objective == pytest.approx(inner(a, permutation.apply(b)), rel=1e-5)
        again = WeightMatching(init=permutation).match(a, b, spec)
        assert again.permutation == permutation
        objective = inner(a, Permutation(spec, start).apply(b))
        for sweep in ascent.history:  # each gain is what the objective rose by
            assert sweep.objective == pytest.approx(objective + sum(sweep.gains.values()), rel=1e-5)
            assert all(gain > 0 for gain in sweep.gains.values())
            objective = sweep.objective
        assert [sweep.number for sweep in ascent.history] == list(range(1, len(ascent.history) + 1))


def test_sweeps_can_be_limited() -> None:
    spec = SPECS["mlp"]
    found = of(spec, state(spec, 1), state(spec, 2)).climb(starts(spec, 3), np.random.default_rng(0), 1)
    assert all(len(ascent.history) == 1 and not ascent.converged for ascent in found)


@pytest.mark.parametrize("name", [*SPECS, *SIMPLE, "wide"])
def test_where_they_are_made(name: str) -> None:
    spec = WIDE if name == "wide" else {**SPECS, **SPEC}[name]
    plan = Plan(spec, spec.axes)
    fibred = any(group.parents for group in spec.groups.values())
    blocks = [block for found in plan.blocks.values() for block in found]
    meeting = any(len({leaf.group for leaf in block.leaves if leaf.group}) > 1 for block in blocks)
    meets_itself = any(move.quadratic for move in plan.moves)
    assert batch_width(plan) == (0 if fibred or meets_itself or name == "wide" or not meeting else WIDTH)


@pytest.mark.parametrize("objective", ["inner", "cosine", "l2"])
def test_the_default_is_at_least_one_run_and_says_what_it_did(objective: Any) -> None:
    spec, better = SPECS["mlp"], 0
    for seed in range(6):
        a, b = state(spec, seed), state(spec, 100 + seed)
        one = WeightMatching(restarts=1, objective=objective).match(a, b, spec, seed)
        found = WeightMatching(objective=objective).match(a, b, spec, seed)
        assert len(found.runs) == 1 + 2 * WIDTH
        assert found.runs[0] == one.objective
        assert found.objective == pytest.approx(max(found.runs), rel=1e-5)
        assert found.objective >= one.objective
        assert found.history[-1].objective == pytest.approx(found.objective, rel=1e-5)
        assert found.outcome == "converged"
        better += found.objective > one.objective * (1.001 if one.objective > 0 else 0.999)
    assert better


def test_a_start_or_a_limit_of_ones_own_is_one_run() -> None:
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    for how in (
        WeightMatching(init="identity"),
        WeightMatching(init=spec.random(0)),
        WeightMatching(max_moves=3),
        WeightMatching(max_sweeps=1),
    ):
        assert len(how.match(a, b, spec).runs) == 1


def test_what_is_frozen_stays() -> None:
    spec = SPECS["concatenation"]
    a, b = state(spec, 1), state(spec, 2)
    found = WeightMatching(frozen=["a"]).match(a, b, spec)
    assert len(found.runs) > 1
    assert found.permutation.arrays["a"].tolist() == list(range(6))
    assert found.permutation.arrays["b"].tolist() != list(range(5))


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("name", SIMPLE)
def test_how_either_is_numbered_changes_nothing(name: str, which: str) -> None:
    spec = SPEC[name]
    a, b = state(spec, 1), state(spec, 2)
    given = spec.random(3)
    found = WeightMatching().match(a, b, spec)
    assert found.objective > WeightMatching(restarts=1).match(a, b, spec).objective  # so chance had its part in it
    if which == "a":
        other = WeightMatching().match(given.apply(a), b, spec)
        assert other.permutation == given @ found.permutation
    else:
        other = WeightMatching().match(a, given.apply(b), spec)
        assert other.permutation @ given == found.permutation


def test_an_interruption_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    one = WeightMatching(restarts=1).match(a, b, spec)
    calls = 0

    def interrupt(sweep: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == one.sweeps + 2:
            raise KeyboardInterrupt

    found = WeightMatching().match(a, b, spec, 0, interrupt)
    assert found.outcome == "interrupted"
    assert calls == one.sweeps + 2
    assert found.objective >= one.objective
    assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5)

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "choose", refuse)
    found = WeightMatching().match(a, b, spec)
    assert found.outcome == "interrupted"
    assert found.objective == one.objective


def test_a_planted_permutation_is_found() -> None:
    for seed in range(5):
        a, b, secret = planted(SPECS["mlp"], seed)
        assert WeightMatching().match(a, b, SPECS["mlp"], seed).permutation == secret


MIDDLING = PermutationSpec.parse("l1 96x8 h . | l2 96x96 k h | l3 4x96 . k | groups: h 96 · k 96".replace(" | ", "\n"))
"""So wide that few ascents go side by side."""


def related(spec: PermutationSpec, seed: int) -> tuple[Any, Any]:
    """Two models that are noisy copies of one, renumbered, so that there are optima to choose from."""
    a, noise = state(spec, seed), state(spec, 50 + seed)
    b = spec.random(seed).apply({name: a[name] + 4 * noise[name] for name in a})
    return a, b


def test_a_long_ascent_of_a_middling_network_is_followed_by_a_relaxed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "WORTH", 0.0)  # no time for others
    monkeypatch.setattr(tuned, "LONG", 2)
    better = 0
    for seed in range(4):
        a, b = related(MIDDLING, seed)
        one = WeightMatching(restarts=1).match(a, b, MIDDLING, seed)
        assert one.sweeps >= 2
        found = WeightMatching().match(a, b, MIDDLING, seed)
        relaxed = FrankWolfe(polish=False).match(a, b, MIDDLING, seed)
        polished = WeightMatching(init=relaxed.permutation).match(a, b, MIDDLING, seed)
        assert found.runs == (one.objective, pytest.approx(polished.objective, rel=1e-6))
        assert found.objective == max(found.runs)
        assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5)
        better += found.objective > 1.0001 * one.objective
        # FrankWolfe compares with weight matching, but does not relax twice.
        assert FrankWolfe().match(a, b, MIDDLING, seed).runs[1:] == (one.objective,)
        assert len(WeightMatching(frozen=["h"]).match(a, b, MIDDLING, seed).runs) == 1
    assert better


def test_where_a_relaxation_is_worth_its_time() -> None:
    middling, small, wide = (Plan(spec, spec.axes) for spec in (MIDDLING, SPECS["mlp"], WIDE))
    assert not worth_relaxing(small, LONG)  # many ascents find as much
    assert not worth_relaxing(wide, LONG)  # too slow
    broad = PermutationSpec.parse(
        "l1 512x8 h . | l2 512x512 k h | l3 4x512 . k | groups: h 512 · k 512".replace(" | ", "\n")
    )
    assert worth_relaxing(Plan(broad, broad.axes), LONG)
    assert not worth_relaxing(Plan(broad, broad.axes), LONG - 1)
    assert worth_relaxing(middling, LONG) == (batch_width(middling) < WIDTH // 2)


def test_an_interrupted_relaxation_keeps_the_ascent_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "WORTH", 0.0)  # no time for others
    monkeypatch.setattr(tuned, "LONG", 1)
    a, b = related(MIDDLING, 1)
    one = WeightMatching(restarts=1).match(a, b, MIDDLING)

    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(frank_wolfe.Relaxation, "value_and_slope", interrupt)
    found = WeightMatching().match(a, b, MIDDLING)
    assert found.outcome == "interrupted"
    assert found.permutation == one.permutation
    assert found.runs == (one.objective,)
