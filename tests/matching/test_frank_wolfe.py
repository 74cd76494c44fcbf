"""Frank-Wolfe matching: the relaxation is the objective at its corners, and steps along it are exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import FrankWolfe, WeightMatching
from permgraph.matching.problem.objective import pair
from permgraph.matching.relaxation import Relaxation
from tests.matching.examples import SPECS, inner, planted, state


def relaxed(spec, seed):
    a, b = state(SPECS[spec], seed), state(SPECS[spec], seed + 1)
    double = [{name: tensor.double() for name, tensor in x.items()} for x in (a, b)]
    return Relaxation(pair(*double, SPECS[spec]), SPECS[spec])


def steps(found):
    return [sweep.objective for sweep in found.history[: int(found.details["steps"])]]


@pytest.mark.parametrize("spec", SPECS)
def test_the_relaxation_at_a_corner_is_the_objective(spec):
    relaxation = relaxed(spec, 0)
    for seed in range(3):
        permutation = SPECS[spec].random(seed)
        moved = {name: permutation.apply_to(name, t) for name, t in relaxation.compared.b.items()}
        corner = relaxation.corner(permutation.arrays)
        assert relaxation.value(corner) == pytest.approx(inner(relaxation.compared.a, moved), rel=1e-9, abs=1e-9)
        again = relaxation.round(corner, "auto")
        assert all(np.array_equal(again[name], permutation.arrays[name]) for name in again)


@pytest.mark.parametrize("spec", SPECS)
def test_the_barycentre_is_the_mean_over_the_group(spec):
    relaxation = relaxed(spec, 0)
    for matrix in relaxation.barycentre().values():
        assert torch.allclose(matrix.sum(-1), torch.ones((), dtype=matrix.dtype))
        assert torch.allclose(matrix.sum(-2), torch.ones((), dtype=matrix.dtype))


def test_the_relaxation_between_corners_is_the_expectation():
    """For groups that meet no parameter twice, the value at a mixture is the mean over independent draws."""
    relaxation = relaxed("mlp", 0)
    corners = {
        name: [relaxation.corner(SPECS["mlp"].random(seed).arrays)[name] for seed in (1, 2)] for name in ("h1", "h2")
    }
    mixed = {name: (one + other) / 2 for name, (one, other) in corners.items()}
    mean = sum(relaxation.value({"h1": x, "h2": y}) for x in corners["h1"] for y in corners["h2"]) / 4
    assert relaxation.value(mixed) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "nothing"])
def test_the_best_length_is_the_best_on_a_grid(spec):
    relaxation = relaxed(spec, 0)
    for seed in range(3):
        here = relaxation.barycentre() if seed == 0 else relaxation.corner(SPECS[spec].random(seed).arrays)
        value, slope = relaxation.value_and_slope(here)
        towards = relaxation.best_corner(slope, "auto")
        direction = {name: towards[name] - here[name] for name in here}
        rate = sum(float((slope[name] * step).sum()) for name, step in direction.items())
        if rate <= 1e-9:
            continue

        def along(length, here=here, direction=direction):
            return relaxation.value({name: m + length * direction[name] for name, m in here.items()})

        assert (along(1e-6) - value) / 1e-6 == pytest.approx(rate, rel=1e-3)
        best = along(relaxation.best_length(here, direction, value, rate))
        assert best >= max(along(x) for x in np.linspace(0, 1, 41)) - 1e-8 * relaxation.size


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("init", ["barycentre", "identity"])
def test_the_relaxed_objective_never_falls(spec, init):
    a, b = state(SPECS[spec], 3), state(SPECS[spec], 4)
    found = FrankWolfe(init=init).match(a, b, SPECS[spec])
    assert all(later > earlier for earlier, later in itertools.pairwise(steps(found)))
    assert found.objective >= found.details["rounded"] - 1e-4
    assert found.details["gap"] >= -1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_is_never_worse_than_weight_matching(spec):
    for seed in range(3):
        a, b = state(SPECS[spec], 30 + seed), state(SPECS[spec], 40 + seed)
        found = FrankWolfe(max_steps=8).match(a, b, SPECS[spec], seed)
        plain = WeightMatching().match(a, b, SPECS[spec], seed)
        assert found.objective == max(found.runs)
        assert found.objective >= plain.objective
        assert any("own start" in note for note in found.notes) == (found.objective > found.runs[0])
        assert not found.history or found.history[-1].objective == pytest.approx(found.objective, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("spec", ["mlp", "attention", "grouped convolution", "residual"])
def test_without_polish(spec):
    a, b, _ = planted(SPECS[spec], 5)
    found = FrankWolfe(polish=False).match(a, b, SPECS[spec])
    assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5)
    assert found.objective >= found.objective_before
    assert found.sweeps == found.details["steps"]


def test_starts_where_it_is_told():
    spec = SPECS["mlp"]
    a, b, secret = planted(spec, 6)
    found = FrankWolfe(init=secret, polish=False).match(a, b, spec)
    assert found.permutation == secret
    assert found.sweeps == 0
    with pytest.raises(MismatchError, match="another spec"):
        FrankWolfe(init=secret).match(state(SPECS["attention"], 0), state(SPECS["attention"], 1), SPECS["attention"])


def test_stops_and_says_so():
    spec = SPECS["residual"]
    a, b = state(spec, 0), state(spec, 1)
    seen = []
    found = FrankWolfe(max_steps=2, tolerance=0).match(a, b, spec, 0, seen.append)
    assert found.details["steps"] == 2
    assert "max_steps=2" in found.notes[0]
    assert tuple(seen[:2]) == found.history[:2]
    assert [sweep.number for sweep in found.history] == list(range(1, found.sweeps + 1))
    assert [sweep.number for sweep in seen] == list(range(1, len(seen) + 1))


def test_an_interrupted_run_is_rounded():
    def stop(sweep):
        raise KeyboardInterrupt

    spec = SPECS["mlp"]
    a, b = state(spec, 0), state(spec, 1)
    found = FrankWolfe().match(a, b, spec, 0, stop)
    assert found.outcome == "interrupted"
    assert found.sweeps == 1
    assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_the_objective_of_the_ascent_is_that_of_the_relaxation(kind):
    spec = SPECS["mlp"]
    a, b = state(spec, 0), state(spec, 1)
    found = FrankWolfe(matcher=WeightMatching(objective=kind)).match(a, b, spec)
    there = WeightMatching(objective=kind, init=found.permutation, max_sweeps=0).match(a, b, spec)
    assert found.objective == pytest.approx(there.objective, rel=1e-5)
    assert steps(found)[-1] == pytest.approx(found.details["relaxed"])


def test_refuses_bad_settings():
    with pytest.raises(PermgraphError, match="max_steps=-1"):
        FrankWolfe(max_steps=-1)
    with pytest.raises(PermgraphError, match="tolerance=nan"):
        FrankWolfe(tolerance=float("nan"))
    with pytest.raises(PermgraphError, match="unknown init 'middle'"):
        FrankWolfe(init="middle")
