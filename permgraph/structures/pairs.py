"""Which indices of an axis make the pairs of `T`, `T2`, `R` and `R2`."""

from __future__ import annotations


def pairs_of(name: str, n: int) -> tuple[slice, slice]:
    """The first and the second index of each pair.

    >>> pairs_of("T", 6), pairs_of("T2", 6)
    ((slice(0, 3, None), slice(3, 6, None)), (slice(0, 6, 2), slice(1, 6, 2)))
    """
    return (slice(0, n // 2), slice(n // 2, n)) if name in ("T", "R") else (slice(0, n, 2), slice(1, n, 2))
