"""Directions in which weights can move, index by index, without any effect: how many there are, near and far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NEGLIGIBLE, CERTAIN = 1e-6, 1e-8

Index = tuple[int, int]
"""Index j is added to index i; i and j may be one."""


def free_combinations(
    expected: int,
    places: int,
    tries: Sequence[Sequence[Index]],
    effect: Callable[[int, Index, float], Any],
    step: Callable[[dict[int, dict[Index, float]]], float],
    size: float,
) -> int:
    """The number of independent combinations without effect, or `expected` where there are no more for certain.

    Where an index has no influence by accident, such as a unit that is off, another one is tried. Where a combination
    has no effect near by, but for the smallness of an ε or for the numbers that were drawn, a step along it tells.

    Args:
        expected: how many are known.
        places: the number of places that may move, each by itself.
        tries: pairs of indices to move; each list of them is a try.
        effect: of a place, a pair and a small amount, the effect as a vector.
        step: of amounts for some pairs at some places, how large their effect is together.
        size: the small amount.
    """
    fewest = places * len(tries[0])
    for pairs in tries:
        columns = [
            (effect(place, pair, size) - effect(place, pair, -size)) / (2 * size)
            for place in range(places)
            for pair in pairs
        ]
        free = _free(columns)
        if len(free) <= expected:
            return expected
        chosen = free.T @ np.random.default_rng(0).standard_normal(len(free))
        chosen = (chosen / np.abs(chosen).max() * math.log(2)).reshape(places, len(pairs))
        amounts = {p: dict(zip(pairs, map(float, chosen[p]), strict=True)) for p in range(places)}
        if not step(amounts) <= CERTAIN:
            return expected
        fewest = min(fewest, len(free))
    return fewest


def _free(columns: Sequence[Any]) -> Any:
    """A basis of the combinations of these columns that vanish."""
    matrix = np.stack(columns, axis=1)
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1
    matrix = matrix / lengths
    if matrix.shape[0] < matrix.shape[1]:
        matrix = np.concatenate([matrix, np.zeros((matrix.shape[1] - matrix.shape[0], matrix.shape[1]))])
    _, values, rows = np.linalg.svd(matrix, full_matrices=False)
    return rows[values <= NEGLIGIBLE] / lengths
