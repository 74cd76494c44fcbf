"""Wide assignments are scipy's, say when they are proven, and bound the gap when they are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from permgraph.assignment.wide import assign_wide
from permgraph.errors import NonFiniteError, PermgraphError
from tests.matching.test_assignment import costs, optimum


@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "gram"])
@pytest.mark.parametrize("n", [1, 2, 30, 200])
def test_costs_what_scipy_says_and_proves_it(n, kind, maximise):
    cost = costs(n, n, n, kind=kind).astype(np.float32)
    found = assign_wide(cost, maximise=maximise, candidates=4)
    assert sorted(found.columns) == list(range(n))
    assert found.proven
    assert found.value == pytest.approx(optimum(cost.astype(np.float64), maximise), rel=1e-12, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 4), st.booleans())
def test_the_gap_bounds_what_is_lost(seed, n, rounds, maximise):
    cost, rng = costs(seed, n, n), np.random.default_rng(seed)
    start = rng.permutation(n)
    found = assign_wide(cost, maximise=maximise, candidates=1, rounds=rounds, init=start)
    best = optimum(cost, maximise)
    lost = best - found.value if maximise else found.value - best
    assert sorted(found.columns) == list(range(n))
    assert found.value == pytest.approx(cost[np.arange(n), found.columns].sum(), abs=1e-12)
    assert -1e-9 <= lost <= found.gap + 1e-9
    if found.proven:
        assert lost == pytest.approx(0.0, abs=1e-9)


def test_rows_that_all_want_the_same_columns():
    rng = np.random.default_rng(0)
    cost = np.outer(rng.random(150), rng.random(150)) * 100 + 1e-3 * rng.random((150, 150))
    found = assign_wide(cost, candidates=2)
    assert found.proven
    rows, columns = linear_sum_assignment(cost)
    assert found.value == pytest.approx(cost[rows, columns].sum(), rel=1e-12)


def test_prices_from_falling_temperatures_leave_little_to_add():
    found = assign_wide(costs(0, 600, 600, kind="gram").astype(np.float32), rounds=4)
    assert found.proven


@pytest.mark.parametrize("n", [7, 30, 61])
def test_many_ties_end(n):
    for seed in range(20):
        cost = costs(seed, n, n, kind="ties")
        found = assign_wide(cost, candidates=4)
        assert found.proven
        assert found.value == optimum(cost, False)


def test_entries_beyond_float32():
    cost = costs(3, 50, 50)
    assert np.array_equal(assign_wide(cost * 1e200 + 1e201).columns, assign_wide(cost).columns)
    assert assign_wide(np.full((5, 5), 1e300)).proven


def test_nothing_is_changed():
    cost = costs(1, 40, 40)
    cost.flags.writeable = False
    assert np.array_equal(assign_wide(cost).columns, assign_wide(cost).columns)


def test_refuses_bad_input():
    with pytest.raises(PermgraphError, match="must be square"):
        assign_wide(np.zeros((2, 3)))
    with pytest.raises(PermgraphError, match="init a permutation"):
        assign_wide(np.zeros((2, 2)), init=np.array([0, 0]))
    for bad in (np.nan, np.inf, -np.inf):
        cost = costs(2, 9, 9)
        cost[3, 4] = bad
        with pytest.raises(NonFiniteError, match="the Gram matrix holds"):
            assign_wide(cost, name="the Gram matrix")
