"""Groups and indices that stay where they are, and limits on how many move."""

from __future__ import annotations

import numpy as np
import pytest

from permgraph.errors import PermgraphError
from permgraph.matching import StreamedWeightMatching, WeightMatching
from permgraph.spec.permutation import Permutation
from tests.matching.examples import SPECS, every, inner, planted, state

BOTH = pytest.mark.parametrize("matcher", [WeightMatching, StreamedWeightMatching])
KINDS = ["mlp", "residual", "attention", "grouped query", "grouped convolution", "experts", "recurrent heads"]


def often(matcher, **settings):
    """The matcher, restarted where it can be."""
    return matcher(**settings, **({"restarts": 3} if matcher is WeightMatching else {}))


@BOTH
@pytest.mark.parametrize("init", ["identity", "barycentre"])
@pytest.mark.parametrize("name", KINDS)
def test_a_frozen_group_stays_and_the_others_move(name, init, matcher):
    spec = SPECS[name]
    a, b, _ = planted(spec, 1)
    for frozen in spec.moving:
        found = often(matcher, init=init, frozen=[frozen]).match(a, b, spec, 0)
        assert (found.permutation.arrays[frozen] == np.arange(spec.groups[frozen].size)).all()
        assert found.objective == pytest.approx(inner(a, found.permutation.apply(b)), rel=1e-5)
        assert found.objective >= found.objective_before - 1e-6
        assert sum(found.permutation.moved().values()) > 0


@BOTH
def test_a_frozen_group_stays_where_init_has_it(matcher):
    spec = SPECS["attention"]
    a, b = state(spec, 1), state(spec, 2)
    start = spec.random(3)
    found = often(matcher, init=start, frozen=["h", "d1"]).match(a, b, spec, 0)
    for name in ("h", "d1"):
        assert np.array_equal(found.permutation.arrays[name], start.arrays[name])
    assert found.permutation != start


@BOTH
def test_what_is_frozen_stays_even_where_the_identity_would_be_better(matcher):
    spec = SPECS["mlp"]
    a = state(spec, 1)
    start = spec.random(3)
    found = matcher(init=start, frozen=["h1"]).match(a, a, spec, 0)  # the identity is the best there is
    assert found.objective < found.objective_before == pytest.approx(inner(a, a), rel=1e-5)
    assert np.array_equal(found.permutation.arrays["h1"], start.arrays["h1"])
    assert found.objective > inner(a, start.apply(a))


@BOTH
def test_all_frozen_but_what_was_planted_is_recovered(matcher):
    spec = SPECS["attention"]
    a = state(spec, 1)
    secret = Permutation(spec, {"d2": spec.random(4).arrays["d2"]})
    found = matcher(frozen=["c", "h", "d1"]).match(a, secret.inverse().apply(a), spec, 0)
    assert found.permutation == secret


@BOTH
@pytest.mark.parametrize("init", ["identity", "barycentre"])
def test_held_indices_stay_and_the_rest_is_the_best(init, matcher):
    spec = SPECS["one index"].parse("w 5x4 h . \n v 3x5 . h \n groups: h 5")
    a, b = state(spec, 1), state(spec, 2)
    found = often(matcher, init=init, frozen={"h": [1, 3]}).match(a, b, spec, 0)
    allowed = [p for p in every(spec) if list(p.arrays["h"][[1, 3]]) == [1, 3]]
    assert found.permutation.arrays["h"][[1, 3]].tolist() == [1, 3]
    assert found.objective == pytest.approx(max(inner(a, p.apply(b)) for p in allowed), rel=1e-5)


@BOTH
@pytest.mark.parametrize("init", ["identity", "barycentre"])
@pytest.mark.parametrize("name", KINDS)
def test_no_more_move_than_may(name, init, matcher):
    spec = SPECS[name]
    a, b, _ = planted(spec, 1)
    reached = []
    for most in (0, 2, 4, 1000):
        found = often(matcher, init=init, max_moves=most).match(a, b, spec, 0)
        for group, moved in found.permutation.moved().items():
            assert moved <= most or spec.groups[group].parents
        assert found.objective >= found.objective_before - 1e-6
        reached.append(found.objective)
    assert reached[0] <= max(reached[2:]) + 1e-6
    assert matcher(init=init, max_moves=1000).match(a, b, spec, 0).objective == pytest.approx(
        matcher(init=init).match(a, b, spec, 0).objective
    )


@BOTH
def test_the_limit_holds_over_sweeps_and_with_held_indices(matcher):
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    found = matcher(max_moves={"h1": 5, "h2": 3}, frozen={"h1": [0, 1]}).match(a, b, spec, 0)
    moved = found.permutation.moved()
    assert 0 < moved["h1"] <= 5
    assert 0 < moved["h2"] <= 3
    assert found.permutation.arrays["h1"][:2].tolist() == [0, 1]
    again = matcher(max_moves={"h1": 5, "h2": 3}, init=found.permutation).match(a, b, spec, 0)
    assert again.objective >= found.objective


def test_a_streamed_run_with_limits_that_was_stopped_ends_where_an_unbroken_one_does():
    spec = SPECS["mlp"]
    a, b = state(spec, 4), state(spec, 5)
    limits = {"max_moves": {"h1": 9, "h2": 6}, "frozen": {"h2": [2]}}
    kept = []
    whole = StreamedWeightMatching(keep=lambda *sweep: kept.append(sweep), **limits).match(a, b, spec, 2)
    assert len(kept) > 1
    for number, reached in kept:
        went_on = StreamedWeightMatching(init=reached, done=number, **limits).match(a, b, spec, 2)
        assert went_on.permutation == whole.permutation


@BOTH
def test_refuses_limits_that_mean_nothing(matcher):
    spec = SPECS["attention"]
    a, b = state(spec, 1), state(spec, 2)
    for settings, message in (
        ({"frozen": ["x*"]}, "no group is called so"),
        ({"frozen": {"c": [99]}}, "index 99 of group 'c'"),
        ({"frozen": {"d1": [0]}}, "fibred over others"),
        ({"max_moves": {"d1": 2}}, "fibred over others"),
        ({"max_moves": -1}, "give 0 or more"),
        ({"max_moves": 1, "init": spec.random(0)}, "obeys the limits"),
    ):
        with pytest.raises(PermgraphError, match=message):
            matcher(**settings).match(a, b, spec, 0)
