"""Wide assignments: few candidates for each row, solved exactly, and then priced against the whole matrix.

A dense solver needs the matrix a second time, with each row's least entry subtracted. Here the matrix is only read, a
block of rows at a time. A sparse problem with the cheapest candidates of each row is solved exactly; shortest paths in
its residual graph are dual prices; at these prices every row looks over all its columns. One that would rather have
another than its own adds it to the candidates, and the problem is solved again. When none would, the answer is optimal
for the whole matrix. When rounds run out, what the rows would gain in total bounds what is lost.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from permgraph.errors import NonFiniteError, PermgraphError
from permgraph.matching.assignment import Assignment

_BLOCK = 1 << 24
"""Elements that are looked at in one piece."""


def assign_wide(
    matrix: np.ndarray,
    *,
    maximise: bool = False,
    candidates: int = 24,
    rounds: int = 50,
    start: np.ndarray | None = None,
    name: str = "the cost matrix",
) -> Assignment:
    """Choose one column for each row of a square matrix, no column twice, without a second matrix.

    Args:
        matrix: real numbers (n, n); float32 is read as it is, and all sums are in float64.
        maximise: take the greatest total.
        candidates: columns for each row to begin with, and how many a row may add in a round,
            twice as many every five rounds.
        rounds: stop after so many solutions.
        start: integers (n,), an assignment that is known, which makes sure that there is one among the candidates;
            row i with column i by default.
        name: what an error calls the matrix.

    Returns:
        The assignment. Its `gap` bounds how far it is from the optimum; 0 means that it is proven optimal.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        PermgraphError: the matrix is not square, or `start` is no permutation.

    Takes O(n^2) for each round to look at the matrix, and memory for the candidates.

    Example:
        >>> assign_wide(np.array([[4.0, 1.0], [2.0, 3.0]])).columns
        array([1, 0])
    """
    n = len(matrix)
    columns = np.arange(n) if start is None else np.asarray(start)
    if matrix.shape != (n, n) or not np.array_equal(np.sort(columns), np.arange(n)):
        raise PermgraphError(f"{name} must be square, and start a permutation, not {matrix.shape} and {columns.shape}")
    sign = -1.0 if maximise else 1.0
    rows = np.arange(n)
    prices = _cheapest(matrix, sign)
    wanted, _, _ = _wanted(matrix, sign, prices, np.full(n, np.inf), candidates, name)
    edges = np.unique(np.concatenate([rows * n + columns, wanted]))
    best, gap = columns, np.inf
    lowest = np.inf
    for made in range(rounds):
        # Few candidates make for small problems; where they are too few for long, rows may add more.
        most = candidates << min(made // 5, 20)
        costs = sign * matrix.reshape(-1)[edges].astype(np.float64)
        columns = _sparse(edges, costs - prices[edges % n], n)
        matched = sign * matrix[rows, columns].astype(np.float64)
        prices = _prices(edges, costs, columns, matched, n)
        wanted, shortfall, scale = _wanted(matrix, sign, prices, matched - prices[columns], most, name)
        total = float(matched.sum())
        if total < lowest:
            lowest, best = total, columns
        # This solution is optimal among the candidates, so that the bound is on it and on any that costs no more.
        gap = min(gap, shortfall)
        if shortfall <= 8 * np.finfo(np.float64).eps * np.sqrt(n) * scale:
            gap, best = 0.0, columns
            break
        edges = np.union1d(edges, wanted)
    value = float(matrix[rows, best].astype(np.float64).sum())
    return Assignment(best, np.asarray(value), gap)


def _cheapest(matrix: np.ndarray, sign: float) -> np.ndarray:
    """The least entry of each column: prices at which not all rows want the same few columns."""
    n = len(matrix)
    step = max(1, _BLOCK // max(1, n))
    least = np.full(n, np.inf)
    for first in range(0, n, step):
        block = matrix[first : first + step]
        np.minimum(least, block.min(axis=0) if sign > 0 else -block.max(axis=0), out=least)
    return np.where(np.isfinite(least), least, 0.0)


def _wanted(
    matrix: np.ndarray, sign: float, prices: np.ndarray, own: np.ndarray, most: int, name: str
) -> tuple[np.ndarray, float, float]:
    """The entries (row n + column) that rows would rather have at these prices; what they would gain; and its scale.

    `own` is what each row pays, less the price of its column.
    """
    n = len(matrix)
    most = min(most, n)
    step = max(1, _BLOCK // max(1, n))
    found: list[np.ndarray] = []
    shortfall, scale = 0.0, 0.0
    for first in range(0, n, step):
        block = sign * matrix[first : first + step].astype(np.float64) - prices
        least = block.min(axis=1)
        if not (np.isfinite(least).all() and np.isfinite(block.max())):
            raise NonFiniteError(f"{name} holds NaN or infinity; an assignment needs finite costs")
        mine = own[first : first + step]
        short = np.where(np.isfinite(mine), mine - least, np.inf)
        tolerance = 8 * np.finfo(np.float64).eps * (np.abs(least) + np.abs(np.where(np.isfinite(mine), mine, 0.0)))
        unhappy = np.flatnonzero(short > tolerance)
        if np.isfinite(mine).all():
            shortfall += float(np.maximum(short, 0.0).sum())
            scale += float(np.abs(least).sum() + np.abs(mine).sum())
        if len(unhappy):
            few = np.argpartition(block[unhappy], most - 1, axis=1)[:, :most]
            better = np.take_along_axis(block[unhappy], few, axis=1) < mine[unhappy, None]
            flat = (unhappy[:, None] + first) * n + few
            found.append(flat[better])
    return (
        (np.concatenate(found) if found else np.empty(0, dtype=np.int64)),
        shortfall,
        scale + float(np.abs(prices).sum()),
    )


def _sparse(edges: np.ndarray, costs: np.ndarray, n: int) -> np.ndarray:
    """The best assignment among the candidates."""
    starts = np.searchsorted(edges, np.arange(n) * n)
    # A constant for a row changes nothing; near zero the solver has least to do, but a zero itself is no edge to it.
    reduced = costs - np.repeat(np.minimum.reduceat(costs, starts), np.diff(starts, append=len(edges)))
    reduced += 1e-3 * float(reduced.mean()) + 1e-300
    graph = csr_array((reduced, edges % n, np.append(starts, len(edges))), shape=(n, n))
    return np.asarray(min_weight_full_bipartite_matching(graph)[1], dtype=np.int64)


def _prices(edges: np.ndarray, costs: np.ndarray, columns: np.ndarray, matched: np.ndarray, n: int) -> np.ndarray:
    """Prices at which every row is content with its column among its candidates: shortest paths by Bellman and Ford."""
    order = np.argsort(edges % n, kind="stable")
    row, column = edges[order] // n, edges[order] % n
    length = costs[order] - matched[row]
    starts = np.searchsorted(column, np.arange(n))
    prices = np.zeros(n)
    source = columns[row]
    for _ in range(n):
        new = np.minimum(prices, np.minimum.reduceat(prices[source] + length, starts))
        if np.allclose(new, prices, rtol=0.0, atol=1e-13 * float(np.abs(costs).max(initial=1.0))):
            break
        prices = new
    return prices
