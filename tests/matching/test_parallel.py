"""Assignments side by side: on as many workers as joblib is told, with the same answer to the last bit."""

from __future__ import annotations

import builtins
import pickle
import threading
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from permgraph.assignment import parallel
from permgraph.assignment import solve as assignment
from permgraph.assignment.solve import assign
from permgraph.errors import NonFiniteError
from permgraph.matching import FrankWolfe, WeightMatching
from permgraph.matching.ascent import step
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.order import ranks
from permgraph.spec import PermutationSpec
from tests.matching.examples import SPECS, state

#: A stream that all hidden layers meet, and that these meet each other nowhere else.
STREAM = PermutationSpec.parse(
    "\n".join(f"up{i} 9x7 m{i} c \n down{i} 7x9 c m{i}" for i in range(4))
    + "\n embed 5x7 . c \n groups: c 7 · "
    + " · ".join(f"m{i} 9" for i in range(4))
)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Hands out even the smallest problems, and tells which threads solved them."""
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)
    seen: set[int] = set()
    meet = threading.Barrier(2)
    solve = assignment._solve_piece

    def watched(*arguments: Any) -> np.ndarray:
        here = threading.get_ident()
        others = seen - {threading.main_thread().ident}
        if here not in seen and threading.current_thread() is not threading.main_thread() and len(others) < 2:
            seen.add(here)
            meet.wait(timeout=20)  # until another worker has a task too: one alone would wait in vain
        seen.add(here)
        return solve(*arguments)

    monkeypatch.setattr(assignment, "_solve_piece", watched)
    return seen


@pytest.mark.parametrize("solver", ["auto", "scipy", "lapx"])
def test_a_batch_is_shared_by_the_workers(solver: Any, threads: set[int]) -> None:
    costs = np.random.default_rng(0).standard_normal((11, 6, 6)).astype(np.float32)
    with joblib.parallel_config(n_jobs=2):
        shared = assign(costs, solver=solver)
    assert len(threads) == 2
    assert threading.main_thread().ident not in threads
    threads.clear()
    alone = assign(costs, solver=solver)
    assert threads == {threading.main_thread().ident}
    assert np.array_equal(shared.columns, alone.columns)
    assert np.array_equal(shared.value, alone.value)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = np.random.default_rng(1).integers(0, 3, (9, 4, 7)).astype(float)
    for given_costs in (costs, np.swapaxes(costs, 1, 2)):
        whole = assign(given_costs)
        monkeypatch.setattr(assignment, "_SCRATCH", 60)  # two problems at a time
        parts = assign(given_costs)
        monkeypatch.undo()
        assert np.array_equal(whole.columns, parts.columns)


def test_no_piece_of_a_batch_takes_more_room_than_its_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    solve = assignment._solve_piece
    monkeypatch.setattr(assignment, "_solve_piece", lambda rows, *rest: sizes.append(rows.size) or solve(rows, *rest))
    monkeypatch.setattr(assignment, "_SCRATCH", 200)
    assign(np.random.default_rng(2).standard_normal((20, 8, 8)))
    assert max(sizes) == 192
    assert sum(sizes) == 20 * 64


@pytest.mark.parametrize(
    ("name", "matcher"),
    [
        *((name, WeightMatching()) for name in ("mlp", "attention", "experts", "concatenation", "recurrent heads")),
        ("stream", WeightMatching(restarts=2, order="random")),
        ("stream", WeightMatching(memory=0, max_moves={"m1": 4})),
        ("stream", FrankWolfe(max_steps=5)),
    ],
)
def test_a_match_is_the_same_with_any_number_of_workers(
    name: str, matcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = STREAM if name == "stream" else SPECS[name]
    a, b = state(spec, 1), state(spec, 2)
    alone = matcher.match(a, b, spec, 3)
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)
    for count in (2, 3):
        with joblib.parallel_config(n_jobs=count):
            shared = matcher.match(a, b, spec, 3)
        assert shared.permutation == alone.permutation
        assert shared.objective == alone.objective
        assert shared.runs == alone.runs
        for one, other in zip(shared.history, alone.history, strict=True):
            assert (one.objective, one.moved, one.gains) == (other.objective, other.moved, other.gains)


def test_groups_that_do_not_meet_are_solved_side_by_side(threads: set[int]) -> None:
    a, b = state(STREAM, 1), state(STREAM, 2)
    with joblib.parallel_config(n_jobs=2):
        WeightMatching(max_sweeps=1, init="identity").match(a, b, STREAM)
    assert len(threads - {threading.main_thread().ident}) == 2


def test_tasks_can_be_sent_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever engine is named, all that it is given survives pickling."""
    seen = []

    def sent(work: Any, tasks: Any, effort: int) -> list[Any]:
        seen.append(work)
        work, tasks = pickle.loads(pickle.dumps((work, tasks)))
        return [work(*task) for task in tasks]

    a, b = state(STREAM, 1), state(STREAM, 2)
    expected = WeightMatching().match(a, b, STREAM).permutation
    for module in (assignment, step):
        monkeypatch.setattr(module, "side_by_side", sent)
    assert WeightMatching().match(a, b, STREAM).permutation == expected
    assert set(seen) == {assignment._solve_piece, step._choose}


def test_what_a_worker_refuses_is_refused(threads: set[int]) -> None:
    costs = np.random.default_rng(4).standard_normal((8, 5, 5))
    costs[6, 1, 2] = np.inf
    with joblib.parallel_config(n_jobs=2), pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        assign(costs)


def test_a_function_of_the_users_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)
    seen = set()

    def solver(costs: np.ndarray) -> np.ndarray:
        seen.add(threading.get_ident())
        return linear_sum_assignment(costs)[1]

    with joblib.parallel_config(n_jobs=2):
        assign(np.random.default_rng(5).standard_normal((8, 5, 5)), solver=solver)
        WeightMatching(solver=solver).match(state(STREAM, 1), state(STREAM, 2), STREAM)
    assert seen == {threading.main_thread().ident}


def test_how_many_workers() -> None:
    much = parallel.WORTHWHILE
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert parallel.workers(much) == 3
        assert parallel.workers(much - 1) == 1
        with joblib.parallel_config(n_jobs=5):
            assert parallel.workers(much) == 5
        with joblib.parallel_config("threading"):
            assert parallel.workers(much) == 3
        with joblib.parallel_config("sequential"):
            assert parallel.workers(much) == 1
        # Inside a worker of somebody else's there are no more.
        inside = joblib.Parallel(n_jobs=2, prefer="threads")(joblib.delayed(parallel.workers)(much) for _ in range(2))
        assert inside == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_without_joblib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "joblib":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    costs = np.random.default_rng(6).standard_normal((6, 5, 5))
    expected = assign(costs).columns
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)
    monkeypatch.setattr(builtins, "__import__", without)
    assert parallel.workers(parallel.WORTHWHILE) == 1
    assert np.array_equal(assign(costs).columns, expected)


@given(st.permutations(range(9)), st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8))))
def test_ranks_keep_the_order_of_neighbours(order: list[int], edges: set[tuple[int, int]]) -> None:
    neighbours = [{b for a, b in edges if a == one and b != one} for one in range(9)]
    found = ranks(order, neighbours)
    assert sorted(one for rank in found for one in rank) == list(range(9))
    rank = {one: number for number, members in enumerate(found) for one in members}
    for at, one in enumerate(order):
        before = [other for other in order[:at] if other in neighbours[one] or one in neighbours[other]]
        assert all(rank[other] < rank[one] for other in before)
        assert rank[one] == 0 or any(rank[other] == rank[one] - 1 for other in before)  # no later than it must


def test_the_coupling_graph_of_a_stream() -> None:
    plan = Plan(STREAM, STREAM.axes)
    names = [move.name for move in plan.moves]
    stream = names.index("c")
    for number, neighbours in enumerate(plan.neighbours):
        assert neighbours == (set(range(5)) - {stream} if number == stream else {stream})
