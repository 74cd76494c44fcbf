"""Linear assignment: exact solvers behind one function, and a certificate that an answer is optimal.

Measured on the cost matrices of weight matching (`benchmarks/assignment.py`), the `lapjvr` solver of the package
lapx is the fastest exact one from n = 16 upward, once each row's minimum is subtracted; below, scipy's has less to
set up. Potentials are float64 in both. The subtraction is done in float64 up to `WIDE`, so that float32 costs lose
nothing. Wider problems stay in float32, which halves the memory and may cost n 2^-24 of the spread of the costs;
`certify` proves such an answer optimal, or bounds what is lost; `wide.assign_wide` needs no second matrix at all.
Whoever has no use for more than float32 can say so (`precise`), which takes a third less time as well from `ROUGH` on.
Where all rows want the same few columns, as the units of trained layers do, a dense solver has most to do and prices
have least; from `CROWDED` on such a matrix goes to `assign_wide` first, and to the dense solver only without a proof.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from permgraph.assignment.certificate import Assignment, certify
from permgraph.assignment.parallel import side_by_side, workers
from permgraph.assignment.wide import assign_wide
from permgraph.errors import NonFiniteError, PermgraphError

lapjvr_batch: Callable[..., Any] | None
try:
    from lap import lapjvr_batch
except ImportError:  # scipy's solver is exact too, only slower
    lapjvr_batch = None

Solver: TypeAlias = Literal["auto", "scipy", "lapx"] | Callable[[np.ndarray], Any]
"""A solver by name, or a function from a cost matrix (n, m) with n <= m to the column of each row (n,)."""

# Measured by `benchmarks/assignment.py` on two cores.
SMALL = 16
"""The width below which scipy has less to set up than lapx."""

WIDE = 8192
"""The width from which float32 costs are never copied to float64."""

ROUGH = 1024
"""The same, where float32 is precise enough for the caller."""

CROWDED = 1024
"""The width from which a matrix whose rows want the same columns is priced first."""


def assign(
    matrix: np.ndarray | torch.Tensor,
    *,
    maximise: bool = False,
    solver: Solver = "auto",
    certified: bool = False,
    precise: bool = True,
    prices: np.ndarray | None = None,
    name: str = "the cost matrix",
) -> Assignment:
    """Choose one column for each row, no column twice, with the least total, or the greatest if `maximise`.

    Args:
        matrix: real numbers (*batch, n, m). Problems of a batch are independent. Where n > m, n - m rows stay
            without a column.
        maximise: take the greatest total.
        solver: "auto", "scipy", "lapx" or a function; every one of them is expected to be exact.
        certified: bound the gap to the optimum (`Assignment.gap`); for a single matrix only.
        prices: real numbers (m,), one for each column of a single square matrix: those of `prices_of` for a similar
            matrix. Nearly right ones save most of the time that the fast solver takes, and no prices change what is
            best; of several that are equally good they may lead to another one.
        precise: if false, float32 costs may lose n 2^-24 of their spread from a width of 1,024 on; else from 8,192 on.
        name: what an error calls the matrix.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        PermgraphError: the matrix has fewer than two dimensions, or the solver did not return an assignment.

    Equal inputs give equal answers, ties included.

    Example:
        >>> assign(np.array([[4.0, 1.0], [2.0, 3.0]])).columns
        array([1, 0])
    """
    if isinstance(matrix, torch.Tensor):
        exact = matrix.dtype in (torch.float32, torch.float64)
        given = (matrix if exact else matrix.double()).detach().cpu().numpy()
    else:
        given = np.asarray(matrix)
    if given.ndim < 2:
        raise PermgraphError(f"{name} has shape {given.shape}; an assignment needs rows and columns")
    if given.dtype not in (np.float32, np.float64):
        given = given.astype(np.float64)
    *batch, n, m = given.shape
    if given.size == 0:
        return Assignment(np.full((*batch, n), -1, dtype=np.int64), np.zeros(batch), 0.0 if certified else None)
    rows = given.reshape(-1, n, m)
    if prices is not None and (prices.shape != (m,) or rows.shape != (1, m, m)):
        raise PermgraphError(f"{name} of shape {given.shape} takes no prices of shape {prices.shape}: one per column")
    columns = _solve(rows, maximise, solver, name, WIDE if precise else ROUGH, prices)
    value = _value(rows, columns).reshape(batch)
    found = Assignment(columns.reshape(*batch, n), value)
    if certified:
        if len(rows) > 1:
            raise PermgraphError(f"{name} is a batch of {len(rows)}; certificates are for one matrix at a time")
        found = replace(found, gap=certify(rows[0], columns[0], maximise=maximise))
    return found


def assign_limited(
    matrix: np.ndarray,
    stay: np.ndarray,
    most: int,
    *,
    solver: Solver = "auto",
    name: str = "the value matrix",
) -> Assignment:
    """The assignment of greatest total in which at most `most` rows leave the column where they are.

    A bonus on staying is searched for by bisection (Lagrangian relaxation): an answer with exactly as many rows moved
    as are allowed is optimal. Not every number is reached by some bonus; then the cycles in which the answers for the
    next smaller and the next greater bonus differ are taken while there is room, the best for each row first.

    Args:
        matrix: real numbers (n, n), the value of each pairing.
        stay: integers (n,), a permutation: the column where each row is.
        most: how many rows may leave it.
        solver, name: as in `assign`.

    Returns:
        The assignment; its `gap` is 0 where it is proven optimal, else a bound on what a better one could gain.

    Raises:
        PermgraphError: the matrix is not square, `stay` is no permutation, or `most` is negative.
    """
    n = len(matrix)
    if matrix.shape != (n, n) or not np.array_equal(np.sort(stay), np.arange(n)) or most < 0:
        raise PermgraphError(
            f"{name}: a limit on moves needs a square matrix, a permutation to stay at, and a number of rows from 0 "
            f"up, not {matrix.shape}, {np.shape(stay)} and {most}"
        )
    rows = np.arange(n)
    values = matrix.astype(np.float64)
    free = assign(values, maximise=True, solver=solver, name=name).columns
    if np.count_nonzero(free != stay) <= most:
        return Assignment(free, values[rows, free].sum(), 0.0)
    inside, outside = np.array(stay), free
    bound = float(values[rows, free].sum())
    # At this bonus nothing moves: leaving a column loses it, and gains no more than the spread.
    low, high = 0.0, 2.0 * float(np.ptp(values)) + 1.0
    for _ in range(_BISECTIONS):
        bonus = (low + high) / 2
        values[rows, stay] += bonus
        columns = assign(values, maximise=True, solver=solver, name=name).columns
        # Whoever moves no more rows than are allowed keeps the bonus on all others.
        bound = min(bound, float(values[rows, columns].sum()) - bonus * (n - most))
        values[rows, stay] = matrix[rows, stay]
        moved = int(np.count_nonzero(columns != stay))
        if moved <= most:
            inside, high = columns, bonus
        else:
            outside, low = columns, bonus
        if moved == most or high - low <= 1e-12 * high:
            break
    columns = _filled(values, stay, most, inside, outside)
    value = float(values[rows, columns].sum())
    gap = bound - value
    scale = float(np.abs(values[rows, columns]).sum()) + high * n
    return Assignment(columns, np.asarray(value), 0.0 if gap <= 64 * np.finfo(np.float64).eps * scale else gap)


_BISECTIONS = 40


def _filled(values: np.ndarray, stay: np.ndarray, most: int, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """`inside`, with those cycles that lead to `outside` for which there is room."""
    n = len(stay)
    rows = np.arange(n)
    owner = np.empty(n, dtype=np.int64)
    owner[inside] = rows
    count, cycle = connected_components(coo_array((np.ones(n, dtype=np.int8), (rows, owner[outside])), shape=(n, n)))
    gains = np.bincount(cycle, values[rows, outside] - values[rows, inside], count)
    more = np.bincount(cycle, (outside != stay).astype(float) - (inside != stay), count)
    room = most - int(np.count_nonzero(inside != stay))
    taken = np.zeros(count, dtype=bool)
    for at in np.argsort(-gains / np.maximum(more, 0.5), kind="stable"):
        if gains[at] > 0 and more[at] <= room:
            taken[at] = True
            room -= int(more[at])
    return np.where(taken[cycle], outside, inside)


def _solve(
    rows: np.ndarray, maximise: bool, solver: Solver, name: str, wide: int, prices: np.ndarray | None = None
) -> np.ndarray:
    """Columns (b, n) for costs (b, n, m), in pieces that workers may share; float32 costs stay so from `wide`."""
    count, n, m = rows.shape
    if n > m:
        across = _solve(np.swapaxes(rows, 1, 2), maximise, solver, name, wide)
        columns = np.full(rows.shape[:2], -1, dtype=np.int64)
        np.put_along_axis(columns, across, np.arange(m)[None], axis=1)
        return columns
    if solver == "auto" and lapjvr_batch and n == m >= CROWDED and any(crowded(one, maximise, prices) for one in rows):
        return np.stack([_priced(one, maximise, name, wide) for one in rows])
    if solver == "auto":
        solver = "scipy" if (m < SMALL and count < 4) or lapjvr_batch is None else "lapx"
    if solver == "lapx" and lapjvr_batch is None:
        raise PermgraphError("the solver 'lapx' needs the package lapx with lapjvr_batch: pip install -U lapx")
    if not callable(solver) and solver not in ("scipy", "lapx"):
        raise PermgraphError(f"unknown assignment solver {solver!r}; choose 'auto', 'scipy', 'lapx' or a function")
    # A user's function may hold the lock, or keep a state.
    share = -(-count // (1 if callable(solver) else workers(rows.size)))
    piece = max(1, min(share, _SCRATCH // (n * m)))
    tasks = [(rows[first : first + piece], maximise, solver, name, wide, prices) for first in range(0, count, piece)]
    found = side_by_side(_solve_piece, tasks, 0 if callable(solver) else rows.size)
    return found[0] if len(found) == 1 else np.concatenate(found)


def crowded(matrix: np.ndarray, maximise: bool, prices: np.ndarray | None = None) -> bool:
    """Whether the rows of a square matrix, of which some are looked at, mostly want a column that another wants.

    That is what makes an assignment hard, and what prices are good for.
    """
    some = matrix[:: max(1, len(matrix) // 256)]
    if prices is not None:
        some = some + prices if maximise else some - prices
    wanted = some.argmax(axis=1) if maximise else some.argmin(axis=1)
    return 2 * len(np.unique(wanted)) < len(some)


def _priced(matrix: np.ndarray, maximise: bool, name: str, wide: int) -> np.ndarray:
    """The columns for a crowded square matrix."""
    found = assign_wide(matrix, maximise=maximise, rounds=10, name=name)
    return found.columns if found.proven else _solve(matrix[None], maximise, "lapx", name, wide)[0]


def _solve_piece(
    rows: np.ndarray, maximise: bool, solver: Solver, name: str, wide: int, prices: np.ndarray | None = None
) -> np.ndarray:
    """Columns (b, n) for costs (b, n, m), n <= m, by a solver that is there."""
    _, n, m = rows.shape
    # The least entry of each row, which the fast solver wants subtracted, also tells whether all of it is finite.
    edge = rows.max(axis=2) if maximise else rows.min(axis=2)
    other = rows.min() if maximise else rows.max()
    if not (np.isfinite(edge).all() and np.isfinite(other)):
        raise NonFiniteError(f"{name} holds NaN or infinity; an assignment needs finite costs")
    if solver == "scipy":
        return np.stack([linear_sum_assignment(one, maximize=maximise)[1] for one in rows])
    if solver == "lapx":
        assert lapjvr_batch is not None
        reduced = _reduced(rows, edge, maximise, wide)
        if prices is not None:
            reduced -= prices
            reduced -= reduced.min(axis=2, keepdims=True)
        chosen = lapjvr_batch(reduced, extend_cost=True, return_cost=False, n_threads=1)[1]
        return np.asarray(np.stack(chosen), dtype=np.int64)
    assert callable(solver)
    answers = [np.asarray(solver(-one if maximise else one)) for one in rows]
    for answer in answers:
        taken = np.zeros(m, dtype=np.int64)
        if answer.shape == (n,) and answer.dtype.kind in "iu" and answer.min() >= 0 and answer.max() < m:
            np.add.at(taken, answer, 1)
        if taken.sum() != n or taken.max() > 1:
            raise PermgraphError(f"the solver {solver!r} did not return {n} distinct columns below {m} for {name}")
    return np.stack(answers).astype(np.int64)


def _reduced(rows: np.ndarray, edge: np.ndarray, maximise: bool, wide: int) -> np.ndarray:
    """Costs to minimise, the least of each row being 0."""
    dtype = np.dtype(np.float64) if rows.shape[2] < wide else rows.dtype
    first, second = (edge[:, :, None], rows) if maximise else (rows, edge[:, :, None])
    out: np.ndarray | None = None
    if rows.size * dtype.itemsize <= 8 * _SCRATCH:
        # The solver only reads this while it runs. Fresh pages would cost more than the subtraction does.
        if getattr(_ROOM, "array", None) is None or _ROOM.array.nbytes < rows.size * dtype.itemsize:
            _ROOM.array = np.empty(-(-rows.size * dtype.itemsize // 8))
        out = _ROOM.array.view(dtype)[: rows.size].reshape(rows.shape)
    reduced: np.ndarray = np.subtract(first, second, out=out, dtype=dtype)
    return reduced


_ROOM = threading.local()
_SCRATCH = 1 << 22
"""Elements (32 MB) that each thread may keep for the next problem."""


def _value(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    chosen = np.take_along_axis(rows, np.maximum(columns, 0)[:, :, None], axis=2)[:, :, 0].astype(np.float64)
    return np.asarray(np.where(columns >= 0, chosen, 0.0).sum(axis=1))
