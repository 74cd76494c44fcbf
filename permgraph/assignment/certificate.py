"""What an assignment is, and the proof that it is the best: dual prices, and the gap that they leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from permgraph.errors import PermgraphError


@dataclass(frozen=True)
class Assignment:
    """The best partner of each row.

    Attributes:
        columns: integers (*batch, rows); the column of each row, -1 for a row left over in a tall matrix.
        value: float64 (*batch,); the total of the chosen entries, summed in float64 over the matrix as given.
        gap: how far `value` can be from the optimum, where `certify` has bounded it; None where nobody asked.
    """

    columns: np.ndarray
    value: np.ndarray
    gap: float | None = None

    @property
    def proven(self) -> bool:
        """Whether a dual certificate shows that no assignment is better, but for float64 rounding."""
        return self.gap == 0.0


def certify(matrix: np.ndarray, columns: np.ndarray, *, maximise: bool = False, passes: int = 1000) -> float:
    """Bound how much better than this assignment any other can be, by linear programming duality.

    Potentials v with c[i, columns[i]] - v[columns[i]] <= c[i, j] - v[j] for all i, j prove the assignment optimal.
    They are shortest paths in the residual graph, found here by passes of Bellman and Ford over those rows whose
    own potential fell. Whatever v is reached, sum_i min_j (c[i, j] - v[j]) + sum_j v[j] is a bound, so that stopping
    early is safe. Costs O(n^2) for a pass over all rows, in blocks, and no second matrix.

    Args:
        matrix: real numbers (n, n) as given to `assign`, square.
        columns: integers (n,), the assignment.
        maximise: whether the assignment was to maximise.
        passes: stop after so many.

    Returns:
        The gap in the units of the matrix; 0.0 where it is within float64 rounding of the total, thus proven optimal.

    Raises:
        PermgraphError: the matrix is not square, or `columns` is not a permutation.
    """
    n = len(matrix)
    if matrix.shape != (n, n) or not np.array_equal(np.sort(columns), np.arange(n)):
        raise PermgraphError(f"a certificate needs a square matrix and a permutation, not {matrix.shape}")
    sign = -1.0 if maximise else 1.0
    block = max(1, (1 << 22) // n)
    matched = sign * matrix[np.arange(n), columns].astype(np.float64)
    v = _potentials(matrix, columns, np.zeros(n), sign, passes)
    # Rows that are stale no longer obey their own inequality: the minimum over j repairs that, at the bound's cost.
    lowest = np.concatenate(
        [(sign * matrix[s : s + block].astype(np.float64) - v).min(axis=1) for s in range(0, n, block)]
    )
    gap = float(np.sum(matched - v[columns] - lowest))
    scale = float(np.abs(matched).sum() + np.abs(v).sum()) + float(np.abs(lowest).sum())
    return 0.0 if gap <= 8 * np.finfo(np.float64).eps * np.sqrt(n) * scale else gap


def prices_of(
    matrix: np.ndarray,
    columns: np.ndarray,
    start: np.ndarray | None = None,
    *,
    maximise: bool = False,
    passes: int = 10,
) -> np.ndarray:
    """What to give `assign` as `prices` for a matrix that is much like this one, whose assignment is known.

    They are nearly the dual prices: the paths that `certify` follows to their ends are followed for a few passes only,
    in the precision of the matrix, which makes nine tenths of the difference.

    Args:
        matrix: real numbers (n, n) as given to `assign`.
        columns: integers (n,), the assignment.
        start: prices to begin with, of another matrix that was like this one.
        maximise: whether the assignment was to maximise.
        passes: how many.

    Example:
        >>> costs = np.array([[4.0, 1.0], [2.0, 0.0]])
        >>> prices_of(costs, np.array([1, 0]))
        array([ 0., -2.])
    """
    begin = np.zeros(len(matrix)) if start is None else start
    return _potentials(matrix, columns, begin.astype(matrix.dtype), -1.0 if maximise else 1.0, passes)


def _potentials(matrix: np.ndarray, columns: np.ndarray, start: np.ndarray, sign: float, passes: int) -> np.ndarray:
    """The potentials v of `certify`, or such as so many passes from `start` come to, in the precision of `start`."""
    n = len(matrix)
    block = max(1, (1 << 22) // n)
    v = start.copy()
    matched = sign * matrix[np.arange(n), columns].astype(v.dtype)
    stale = np.arange(n)
    for _ in range(passes):
        before = v.copy()
        for first in range(0, len(stale), block):
            rows = stale[first : first + block]
            reach = matrix[rows].astype(v.dtype, copy=False)
            if sign < 0:
                np.negative(reach, out=reach)
            reach -= (matched[rows] - before[columns[rows]])[:, None]
            np.minimum(v, reach.min(axis=0), out=v)
        stale = np.flatnonzero((v < before)[columns])
        if len(stale) == 0:
            break
    return v
