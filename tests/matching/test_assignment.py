"""What an assignment is, that its cost is scipy's, and that certificates can be refused."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from permgraph.assignment import solve as assignment
from permgraph.assignment.certificate import certify, prices_of
from permgraph.assignment.solve import assign, assign_limited
from permgraph.errors import NonFiniteError, PermgraphError

SOLVERS = ["auto", "scipy", "lapx", lambda cost: linear_sum_assignment(cost)[1]]


def costs(seed: int, *shape: int, kind: str = "normal") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(0, 3, shape).astype(np.float64)
    if kind == "gram":  # of two layers with a decaying spectrum, as trained ones have
        scale = np.arange(1.0, 65.0) ** -0.7
        return (rng.standard_normal((*shape[:-1], 64)) * scale) @ np.swapaxes(
            rng.standard_normal((*shape[:-2], shape[-1], 64)) * scale, -1, -2
        )
    return rng.standard_normal(shape)


def optimum(cost: np.ndarray, maximise: bool) -> float:
    rows, columns = linear_sum_assignment(cost, maximize=maximise)
    return float(cost[rows, columns].sum())


@pytest.mark.parametrize("solver", SOLVERS, ids=["auto", "scipy", "lapx", "function"])
@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "gram"])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33, 150])
def test_costs_what_scipy_says(solver, maximise, kind, n):
    cost = costs(n, n, n, kind=kind)
    found = assign(cost, maximise=maximise, solver=solver)
    assert sorted(found.columns) == list(range(n))
    assert found.value == pytest.approx(optimum(cost, maximise), rel=1e-12, abs=1e-9)
    assert found.value == pytest.approx(cost[np.arange(n), found.columns].sum(), rel=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_equals_brute_force(seed, n, maximise):
    cost = costs(seed, n, n)
    totals = [sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n))]
    best = max(totals) if maximise else min(totals)
    assert assign(cost, maximise=maximise).value == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("solver", ["auto", "scipy", "lapx"])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 4), (4, 1), (20, 31), (31, 20)])
def test_rectangles(shape, solver):
    cost = costs(1, *shape)
    found = assign(cost, maximise=True, solver=solver)
    kept = found.columns[found.columns >= 0]
    assert found.columns.shape == (shape[0],)
    assert len(kept) == len(set(kept)) == min(shape)
    assert found.value == pytest.approx(optimum(cost, True), rel=1e-12)


@pytest.mark.parametrize("solver", ["auto", "scipy", "lapx"])
def test_a_batch_is_its_members(solver):
    cost = costs(2, 3, 4, 6, 6)
    found = assign(cost, solver=solver)
    assert found.columns.shape == (3, 4, 6)
    for at in itertools.product(range(3), range(4)):
        assert found.value[at] == pytest.approx(optimum(cost[at], False), rel=1e-12)


def test_float32_loses_nothing():
    """Row minima far above the differences: subtracted in float32 they would drown them."""
    rng = np.random.default_rng(3)
    cost = (rng.integers(0, 1000, (64, 64)) + rng.integers(0, 2**20, (64, 1)) * 8).astype(np.float32)
    assert assign(cost, solver="lapx").value == optimum(cost.astype(np.float64), False)


def test_torch_in_any_dtype():
    cost = torch.from_numpy(costs(4, 9, 9))
    for tensor in (cost, cost.float(), cost.bfloat16(), cost.t(), cost.clone().requires_grad_()):
        reference = tensor.detach().double().numpy()
        assert assign(tensor).value == pytest.approx(optimum(reference, False), rel=1e-6)
    assert assign(torch.tensor([[4, 1], [2, 3]])).columns.tolist() == [1, 0]


def test_ties_are_broken_alike_each_time():
    cost = costs(5, 40, 40, kind="ties")
    assert np.array_equal(assign(cost).columns, assign(cost.copy()).columns)


@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "gram"])
def test_certificate_of_the_optimum(kind, maximise):
    cost = costs(6, 60, 60, kind=kind).astype(np.float32)
    found = assign(cost, maximise=maximise, certified=True)
    assert found.gap == 0.0
    assert found.proven


@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans(), st.integers(0, 3))
def test_the_gap_bounds_what_is_lost(seed, n, maximise, passes):
    cost = costs(seed, n, n)
    columns = np.random.default_rng(seed).permutation(n)
    lost = abs(optimum(cost, maximise) - cost[np.arange(n), columns].sum())
    gap = certify(cost, columns, maximise=maximise, passes=passes)
    assert gap >= lost - 1e-9
    if lost > 1e-6:
        assert gap > 0


def test_a_wide_problem_is_bounded(monkeypatch):
    """The float32 route, at a width where scipy can still check it."""
    monkeypatch.setattr(assignment, "WIDE", 64)
    cost = costs(7, 200, 200, kind="gram").astype(np.float32)
    found = assign(cost, maximise=True, solver="lapx", certified=True)
    lost = optimum(cost.astype(np.float64), True) - float(found.value)
    assert -1e-9 <= lost <= 200 * 2**-24 * np.ptp(cost)
    assert found.gap is not None
    assert found.gap >= lost - 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [3, 30])
@pytest.mark.parametrize("maximise", [False, True])
def test_refuses_what_is_not_finite(bad, n, maximise):
    cost = costs(8, n, n)
    cost[1, 2] = bad
    with pytest.raises(NonFiniteError, match="the Gram matrix of fc1 holds NaN or infinity"):
        assign(cost, maximise=maximise, name="the Gram matrix of fc1")


def test_refuses_what_is_no_matrix():
    with pytest.raises(PermgraphError, match="rows and columns"):
        assign(np.zeros(3))
    with pytest.raises(PermgraphError, match="unknown assignment solver 'simplex'"):
        assign(np.zeros((3, 3)), solver="simplex")
    with pytest.raises(PermgraphError, match="square"):
        certify(np.zeros((2, 3)), np.arange(2))
    with pytest.raises(PermgraphError, match="one matrix at a time"):
        assign(np.zeros((2, 3, 3)), certified=True)


@pytest.mark.parametrize("answer", [[0, 0, 1], [0, 1], [0, 1, 3], [0.0, 1.0, 2.0]])
def test_refuses_a_solver_that_does_not_assign(answer):
    with pytest.raises(PermgraphError, match="did not return 3 distinct columns"):
        assign(costs(9, 3, 3), solver=lambda cost: np.array(answer))


def test_empty():
    assert assign(np.zeros((0, 4))).columns.shape == (0,)
    assert assign(np.zeros((2, 0, 0))).value.tolist() == [0.0, 0.0]


def test_all_that_assigns_works_where_lapx_is_not_installed():
    script = """
import sys
sys.modules["lap"] = None
import numpy as np
from permgraph.assignment import assign, assign_wide
from permgraph.assignment import solve
solve.CROWDED = 20
cost = np.random.default_rng(0).standard_normal((40, 40)) + 9 * np.random.default_rng(1).standard_normal(40)
for maximise in (False, True):
    wide = assign_wide(cost, maximise=maximise)
    assert wide.proven and abs(wide.value - assign(cost, maximise=maximise).value) < 1e-9
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_lapx(monkeypatch):
    monkeypatch.setattr(assignment, "lapjvr_batch", None)
    cost = costs(10, 40, 40)
    assert assign(cost).value == pytest.approx(optimum(cost, False), rel=1e-12)
    with pytest.raises(PermgraphError, match="pip install -U lapx"):
        assign(cost, solver="lapx")


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 6))
def test_limited_moves_against_brute_force(seed, n, most):
    values, rng = costs(seed, n, n), np.random.default_rng(seed)
    stay = rng.permutation(n)
    found = assign_limited(values, stay, most)
    every = [np.array(p) for p in itertools.permutations(range(n)) if np.sum(np.array(p) != stay) <= most]
    best = max(values[np.arange(n), p].sum() for p in every)
    assert sorted(found.columns) == list(range(n))
    assert np.sum(found.columns != stay) <= most
    assert found.value == pytest.approx(values[np.arange(n), found.columns].sum(), abs=1e-12)
    assert found.gap is not None
    assert found.value <= best + 1e-9 <= found.value + found.gap + 2e-9
    if found.proven:
        assert found.value == pytest.approx(best, abs=1e-9)


def test_limited_moves_are_mostly_proven():
    proven = 0
    for seed in range(20):
        values = costs(seed, 30, 30, kind="gram")
        found = assign_limited(values, np.arange(30), 12)
        assert np.sum(found.columns != np.arange(30)) <= 12
        assert found.value > np.trace(values)
        proven += found.proven
    assert proven >= 5


def test_limited_moves_refuse_what_they_cannot_mean():
    with pytest.raises(PermgraphError, match="a limit on moves"):
        assign_limited(np.zeros((3, 3)), np.array([0, 0, 1]), 1)
    with pytest.raises(PermgraphError, match="a limit on moves"):
        assign_limited(np.zeros((3, 3)), np.arange(3), -1)


@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_want_the_same_columns_are_priced_first(monkeypatch, maximise, dtype):

    cost = costs(3, assignment.CROWDED, assignment.CROWDED, kind="gram").astype(dtype)
    best = assign(cost, maximise=maximise, solver="lapx").value
    found = assign(cost, maximise=maximise)
    assert found.value == pytest.approx(best, rel=1e-12)
    asked = []

    def hopeless(matrix, **settings):
        asked.append(len(matrix))
        return assignment.Assignment(np.arange(len(matrix)), np.zeros(()), 1.0)

    monkeypatch.setattr(assignment, "assign_wide", hopeless)
    assert assign(cost, maximise=maximise).value == pytest.approx(best, rel=1e-12)
    assign(costs(3, assignment.CROWDED, assignment.CROWDED))
    assert asked == [assignment.CROWDED]
    cost[5, 6] = np.nan
    monkeypatch.undo()
    with pytest.raises(NonFiniteError, match="holds NaN"):
        assign(cost, maximise=maximise)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 40), maximise=st.booleans(), wrong=st.sampled_from([0.0, 1.0, 100.0])
)
def test_prices_right_or_wrong_never_change_what_is_best(seed, n, maximise, wrong):
    random = np.random.default_rng(seed)
    cost = random.standard_normal((n, n))
    best = assign(cost, maximise=maximise)
    prices = prices_of(cost, best.columns, maximise=maximise) + wrong * random.standard_normal(n)
    for dtype in (np.float64, np.float32):
        found = assign(cost.astype(dtype), maximise=maximise, prices=prices.astype(dtype), solver="lapx")
        assert found.value == pytest.approx(best.value, rel=1e-4, abs=1e-4)


def test_prices_followed_to_their_end_prove_the_assignment():
    random = np.random.default_rng(0)
    cost = random.standard_normal((60, 60))
    columns = assign(cost).columns
    prices = prices_of(cost, columns, passes=1000)
    assert lost(cost, columns, prices) == pytest.approx(0.0, abs=1e-9)
    # From prices of a matrix much like it fewer passes are needed than from none.
    other = cost + 1e-3 * random.standard_normal((60, 60))
    columns = assign(other).columns
    near, far = prices_of(other, columns, prices, passes=2), prices_of(other, columns, passes=2)
    assert lost(other, columns, near) < 0.1 * lost(other, columns, far)


def lost(cost, columns, prices):
    """By how much rows would rather have another column, at these prices."""
    net = cost - prices
    return float((net[np.arange(len(net)), columns] - net.min(axis=1)).sum())


@pytest.mark.parametrize(("shape", "prices"), [((3, 3), 2), ((2, 3, 3), 3), ((2, 3), 3)])
def test_refuses_prices_that_do_not_fit(shape, prices):
    with pytest.raises(PermgraphError, match="prices"):
        assign(np.zeros(shape), prices=np.zeros(prices))
