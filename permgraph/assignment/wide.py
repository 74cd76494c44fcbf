"""Wide assignments: few candidates for each row, solved exactly, and then priced against the whole matrix.

A dense solver needs the matrix a second time, with each row's least entry subtracted. Here the matrix is only read, a
block of rows at a time. Prices for the columns come first: rows spread over the columns as a softmax says, columns
that get more than one row become dearer, and the temperature falls (Sinkhorn's iteration; Kosowsky & Yuille 1994).
The sparse problem with the cheapest candidates of each row at these prices is solved exactly; shortest paths in
its residual graph make the prices exact too; at these every row looks over all its columns. One that would rather have
another than its own adds it to the candidates, and the problem is solved again. When none would, the answer is optimal
for the whole matrix. When rounds run out, what the rows would gain in total bounds what is lost.

Prices that are optimal for the candidates are seldom unique. Those in the middle between the highest and the lowest
are taken: at either end, many rows seem to want what they would not get. With the temperature and this, a problem of
4,096 rows that all want the same columns takes 2 or 3 rounds and 13 candidates a row, without them 12 and 230.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from permgraph.assignment.certificate import Assignment, certify
from permgraph.conventions.renamed import renamed
from permgraph.errors import NonFiniteError, PermgraphError

lapmod: Callable[..., Any] | None
try:
    from lap import lapmod
except ImportError:  # scipy's dense solver is exact too, with a second matrix
    lapmod = None

_BLOCK = 1 << 22
"""Elements that are looked at in one piece."""
_CACHED = 1 << 18
"""Elements of which several passes are made."""


@renamed(start="init")
def assign_wide(
    matrix: np.ndarray,
    *,
    maximise: bool = False,
    candidates: int = 12,
    rounds: int = 50,
    init: np.ndarray | None = None,
    name: str = "the cost matrix",
) -> Assignment:
    """Choose one column for each row of a square matrix, no column twice, without a second matrix.

    Args:
        matrix: real numbers (n, n); float32 is read as it is, and all sums are in float64.
        maximise: take the greatest total.
        candidates: about how many columns each row has to begin with, and may add in a round,
            twice as many every five rounds.
        rounds: stop after so many solutions.
        init: integers (n,), an assignment that is known, which makes sure that there is one among the candidates;
            row i with column i by default.
        name: what an error calls the matrix.

    Returns:
        The assignment. Its `gap` bounds how far it is from the optimum; 0 means that it is proven optimal.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        PermgraphError: the matrix is not square, or `init` is no permutation.

    Without lapx it is a dense solver's, with a second matrix.

    Takes O(n^2) for each temperature and each round to look at the matrix, and memory for the candidates.

    Example:
        >>> assign_wide(np.array([[4.0, 1.0], [2.0, 3.0]])).columns
        array([1, 0])
    """
    n = len(matrix)
    columns = np.arange(n) if init is None else np.asarray(init)
    if matrix.shape != (n, n) or not np.array_equal(np.sort(columns), np.arange(n)):
        raise PermgraphError(f"{name} must be square, and init a permutation, not {matrix.shape} and {columns.shape}")
    step = max(1, _BLOCK // max(1, n))
    if not all(np.isfinite(matrix[first : first + step]).all() for first in range(0, n, step)):
        raise NonFiniteError(f"{name} holds NaN or infinity; an assignment needs finite costs")
    sign = -1.0 if maximise else 1.0
    rows = np.arange(n)
    if lapmod is None:
        columns = linear_sum_assignment(matrix, maximize=maximise)[1]
        gap = certify(matrix, columns, maximise=maximise)
        return Assignment(columns, np.asarray(matrix[rows, columns].astype(np.float64).sum()), gap)
    prices = _cooled(matrix, sign)
    wanted, _, _ = _wanted(matrix, sign, prices, np.full(n, np.inf), candidates)
    edges = np.unique(np.concatenate([rows * n + columns, wanted]))
    best, gap = columns, np.inf
    lowest = np.inf
    for made in range(rounds):
        # Few candidates make for small problems; where they are too few for long, rows may add more.
        most = candidates << min(made // 5, 20)
        costs = sign * matrix[edges // n, edges % n].astype(np.float64)
        columns = _sparse(edges, costs - prices[edges % n], n)
        matched = sign * matrix[rows, columns].astype(np.float64)
        prices = _prices(edges, costs, columns, matched, prices)
        wanted, shortfall, scale = _wanted(matrix, sign, prices, matched - prices[columns], most)
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


def _cooled(matrix: np.ndarray, sign: float) -> np.ndarray:
    """Prices at which the rows want different columns, mostly: nearly optimal ones.

    Each row is spread over the columns as the softmax of what they cost it, and the price of a column goes up by the
    temperature times the logarithm of what it gets of all rows. The temperature falls from the spread of the matrix.
    Where most rows already want a column that no other does, that is enough.
    """
    n = len(matrix)
    with np.errstate(over="ignore"):
        spread = float(matrix[:: max(1, n // 64)].std(dtype=np.float64)) if n > 1 else 0.0
    if not 0.0 < spread < np.inf:
        return np.zeros(n)
    step = max(1, _CACHED // n)
    room = np.empty((step, n), dtype=np.float32)
    worth = np.zeros(n, dtype=np.float32)
    for cooling in range(_TEMPERATURES):
        temperature = _COOLING**cooling
        given = np.zeros(n, dtype=np.float32)
        first_choices = np.zeros(n, dtype=bool)
        for first in range(0, n, step):
            block = room[: min(step, n - first)]
            np.multiply(matrix[first : first + step], -sign / spread, out=block, casting="same_kind")
            block += worth
            top = block.argmax(axis=1)
            first_choices[top] = True
            block -= np.take_along_axis(block, top[:, None], axis=1)
            block *= 1 / temperature
            # What is less is as good as nothing, and takes ten times as long.
            np.maximum(block, -80.0, out=block)
            np.exp(block, out=block)
            given += (1 / block.sum(axis=1)) @ block
        worth -= np.float32(temperature) * np.log(given)
        if first_choices.mean() > _SETTLED:
            break
    return worth.astype(np.float64) * spread


_TEMPERATURES = 14
_COOLING = 0.65
_SETTLED = 0.75


def _wanted(
    matrix: np.ndarray, sign: float, prices: np.ndarray, own: np.ndarray, most: int
) -> tuple[np.ndarray, float, float]:
    """The entries (row n + column) that rows would rather have at these prices; what they would gain; and its scale.

    `own` is what each row pays, less the price of its column. Of each row about the `most` cheapest are returned.
    """
    n = len(matrix)
    step = max(1, _BLOCK // max(1, n))
    found: list[np.ndarray] = []
    shortfall, scale = 0.0, 0.0
    for first in range(0, n, step):
        block = sign * matrix[first : first + step].astype(np.float64)
        block -= prices
        mine = own[first : first + step]
        least = block.min(axis=1)
        known = np.isfinite(mine)
        short = np.where(known, mine - least, np.inf)
        tolerance = 8 * np.finfo(np.float64).eps * (np.abs(least) + np.abs(np.where(known, mine, 0.0)))
        unhappy = np.flatnonzero(short > tolerance)
        if known.all():
            shortfall += float(np.maximum(short, 0.0).sum())
            scale += float(np.abs(least).sum() + np.abs(mine).sum())
        if len(unhappy):
            few = block if len(unhappy) == len(block) else block[unhappy]
            limit = np.minimum(_about(few, most), np.nextafter(mine[unhappy], -np.inf))
            row, column = np.nonzero(few <= limit[:, None])
            # Where many entries are equal, the limit keeps few of them out.
            place = np.arange(len(row)) - np.searchsorted(row, np.arange(len(few)))[row]
            row, column = row[place < 4 * most], column[place < 4 * most]
            found.append((unhappy[row] + first) * n + column)
    return (
        (np.concatenate(found) if found else np.empty(0, dtype=np.int64)),
        shortfall,
        scale + float(np.abs(prices).sum()),
    )


def _about(block: np.ndarray, most: int) -> np.ndarray:
    """For each row a limit that at least `most` of its entries, and not many more, do not exceed."""
    n = block.shape[1]
    parts = n // 32
    if parts > 2 * most:
        # The least entries of so many parts are as many entries; partitioning all would take ten times as long.
        block = block[:, : 32 * parts].reshape(len(block), 32, parts).min(axis=1)
    most = min(most, block.shape[1])
    return np.asarray(np.partition(block, most - 1, axis=1)[:, most - 1])


def _sparse(edges: np.ndarray, costs: np.ndarray, n: int) -> np.ndarray:
    """The best assignment among the candidates.

    By lapmod (Volgenant 1996). SciPy's sparse solver runs for ever on some small matrices with ties in them.
    """
    starts = np.append(np.searchsorted(edges, np.arange(n) * n), len(edges))
    # A constant for a row changes nothing, and near zero the solver has least to do.
    reduced = costs - np.repeat(np.minimum.reduceat(costs, starts[:-1]), np.diff(starts))
    # A million is infinite to it; no path through numbers of at most 1 is as long. A power of two rounds nothing.
    reduced = np.ldexp(reduced, -int(np.frexp(reduced.max())[1]))
    assert lapmod is not None
    columns, _ = lapmod(n, reduced, starts.astype(np.int32), (edges % n).astype(np.int32), return_cost=False)
    return np.asarray(columns, dtype=np.int64)


def _prices(
    edges: np.ndarray, costs: np.ndarray, columns: np.ndarray, matched: np.ndarray, near: np.ndarray
) -> np.ndarray:
    """Prices at which every row is content with its column among its candidates, near those given.

    Shortest paths by Bellman and Ford: from the given prices down to the highest that are nowhere above them, and up
    to the lowest that are nowhere below them; the mean of two such is one, too.
    """
    n = len(columns)
    row, column = edges // n, edges % n
    length = costs - matched[row]
    enough = 1e-14 * float(np.abs(costs).max(initial=1e-300))
    order = np.argsort(column, kind="stable")
    source, along = columns[row[order]], length[order]
    starts = np.searchsorted(column[order], np.arange(n))
    low = near
    for _ in range(n):
        new = np.minimum(low, np.minimum.reduceat(low[source] + along, starts))
        fell = float((low - new).max())
        low = new
        if fell <= enough:
            break
    starts = np.searchsorted(row, np.arange(n))
    high = near.copy()
    for _ in range(n):
        new = np.maximum(high[columns], np.maximum.reduceat(high[column] - length, starts))
        rose = float((new - high[columns]).max())
        high[columns] = new
        if rose <= enough:
            break
    return np.asarray((low + high) / 2)
