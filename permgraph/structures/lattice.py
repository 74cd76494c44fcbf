"""The lattice of matrix groups on n indices: which lies within which, what two have in common, who belongs.

========  ============================================================  =================
name      group                                                         dimension
========  ============================================================  =================
``GL``    all invertible matrices                                       n²
``O``     orthogonal matrices                                           n (n - 1) / 2
``O1``    orthogonal Q with Q·1 = ±1: what taking the mean out allows   (n - 1) (n - 2) / 2
``M``     monomial: a permutation, and a factor for each index          n
``P``     the same with positive factors                                n
``B``     the same with factors ±1                                      0
``S±``    a permutation, and one sign for all indices                   0
``S``     permutations                                                  0
``T``     a complex factor for each pair (j, j + n/2) of indices        n
``T2``    the same for each pair (2 j, 2 j + 1)                         n
``R``     a factor for each pair (j, j + n/2), of either sign           n / 2
``R2``    the same for each pair (2 j, 2 j + 1)                         n / 2
``1``     the identity                                                  0
========  ============================================================  =================

::

                  GL
               /   |   \\
             O     M     T, T2
            / \\   / \\    |
          O1    B    P   |
            \\  /    /    |
             S±    /     |
               \\  /      |
                S        |
                 \\      /
                    1

R lies within both T and M, and R2 within both T2 and M.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from permgraph.errors import SpecError

Matrix = npt.NDArray[np.float64]

_BELOW = {
    "1": "",
    "R": "1",
    "R2": "1",
    "S": "1",
    "S±": "S",
    "P": "S",
    "B": "S±",
    "O1": "S±",
    "O": "O1 B",
    "M": "B P R R2",
    "T": "R",
    "T2": "R2",
    "GL": "O M T T2",
}

NAMES: tuple[str, ...] = tuple(_BELOW)
"""The names of the groups, none before one that lies within it."""


def _within(name: str) -> frozenset[str]:
    return frozenset((name,)).union(*(_within(below) for below in _BELOW[name].split()))


_WITHIN = {name: _within(name) for name in NAMES}


def is_within(small: str, large: str) -> bool:
    """Whether every element of one group belongs to the other, whatever n.

    >>> is_within("B", "M"), is_within("P", "O")
    (True, False)
    """
    return small in _WITHIN[_known(large)]


def meet(a: str, b: str) -> str:
    """The largest group of the lattice within both.

    It is their intersection; only of groups of pairs it may be smaller: what T has in common with O, rotations of each
    pair, has no name here.

    >>> meet("O", "M"), meet("O1", "B"), meet("P", "O")
    ('B', 'S±', 'S')
    """
    common = _WITHIN[_known(a)] & _WITHIN[_known(b)]
    return next(name for name in reversed(NAMES) if name in common and common <= _WITHIN[name])


def larger(name: str) -> tuple[str, ...]:
    """The next larger groups.

    >>> larger("S")
    ('S±', 'P')
    """
    _known(name)
    return tuple(above for above, below in _BELOW.items() if name in below.split())


def dimension(name: str, n: int) -> int:
    """The dimension of the group as a manifold: how many real numbers an element near the identity has."""
    return {
        "GL": n * n,
        "O": n * (n - 1) // 2,
        "O1": (n - 1) * (n - 2) // 2 if n > 1 else 0,
        "M": n,
        "P": n,
        "T": n,
        "T2": n,
        "R": n // 2,
        "R2": n // 2,
    }.get(_known(name), 0)


def is_member(name: str, matrices: Matrix, tolerance: float = 1e-9) -> npt.NDArray[np.bool_]:
    """Of matrices of shape ``(..., n, n)``, which belong to the group, up to errors of this size.

    An invertible one, or one that turns and scales pairs, is so with errors of this size relative to its own: of the
    first, the condition number is less than the inverse.

    >>> bool(is_member("S", np.eye(3)[[2, 0, 1]])), bool(is_member("P", -np.eye(3)))
    (True, False)
    """
    n = matrices.shape[-1]
    present = np.abs(matrices) > tolerance

    def close(left: Matrix | float, right: Matrix | float) -> npt.NDArray[np.bool_]:
        return np.asarray((np.abs(left - right) <= tolerance).all(axis=(-2, -1)))

    monomial = (present.sum(-1) == 1).all(-1) & (present.sum(-2) == 1).all(-1)
    orthogonal = close(matrices @ np.swapaxes(matrices, -1, -2), np.eye(n))
    if name == "GL":
        return _invertible(matrices, tolerance)
    if name == "M":
        return np.asarray(monomial)
    if name == "P":
        return np.asarray(monomial & (matrices >= -tolerance).all((-2, -1)))
    if name == "B":
        return np.asarray(monomial & orthogonal)
    if name == "S±":
        return np.asarray(is_member("S", matrices, tolerance) | is_member("S", -matrices, tolerance))
    if name == "S":
        return np.asarray(is_member("B", matrices, tolerance) & is_member("P", matrices, tolerance))
    if name == "O":
        return orthogonal
    if name == "O1":
        sums = matrices.sum(-1, keepdims=True)
        return np.asarray(orthogonal & (close(sums, 1.0) | close(sums, -1.0)))
    if name in ("T", "T2", "R", "R2"):
        matrices = matrices / np.maximum(1.0, np.abs(matrices).max((-1, -2), keepdims=True, initial=0.0))
    if name in ("R", "R2"):
        diagonal = close(matrices * ~np.eye(n, dtype=bool), 0.0)
        return np.asarray(diagonal & is_member({"R": "T", "R2": "T2"}[name], matrices, tolerance))
    if name in ("T", "T2") and n % 2:
        return np.zeros(matrices.shape[:-2], dtype=bool)
    if name == "T2":
        return is_member("T", _as_halves(matrices), tolerance)
    if name == "T":
        half = n // 2
        a, b, c, d = (matrices[..., i : i + half, j : j + half] for i in (0, half) for j in (0, half))
        off = ~np.eye(half, dtype=bool)
        diagonal = close(a * off, 0.0) & close(b * off, 0.0)
        sizes = np.sqrt((a * a + b * b).sum(-1))  # of the complex factors
        invertible = (sizes > tolerance * sizes.max(-1, keepdims=True)).all(-1)
        return np.asarray(diagonal & close(a, d) & close(b, -c) & invertible)
    _known(name)
    return close(matrices, np.eye(n))


def _invertible(matrices: Matrix, tolerance: float) -> npt.NDArray[np.bool_]:
    """Of matrices of shape ``(..., n, n)``, which have a condition number (of row sums) below 1 / tolerance."""
    found = np.zeros(matrices.shape[:-2], dtype=bool)
    for at in np.ndindex(found.shape):
        try:
            back = np.linalg.inv(matrices[at])
        except np.linalg.LinAlgError:
            continue
        found[at] = tolerance * np.abs(matrices[at]).sum(-1).max() * np.abs(back).sum(-1).max() < 1
    return found


def random_element(name: str, n: int, generator: np.random.Generator) -> Matrix:
    """A random element whose singular values lie within [1/2, 2], and that in no smaller group but by chance.

    Raises SpecError where n is odd and the group is one of pairs.
    """
    if name == "GL":
        left, right = _random_orthogonal(n, generator), _random_orthogonal(n, generator)
        return np.asarray((left * factors(n, generator)) @ right)
    if name == "O":
        return _random_orthogonal(n, generator)
    if name == "O1":
        # A reflection that takes the first unit vector to 1/√n, around an orthogonal matrix of the others.
        first = np.eye(n)[0] - np.full(n, n**-0.5)
        length = float(first @ first)
        mirror = np.eye(n) - (2 * np.outer(first, first) / length if length > 1e-12 else 0.0)
        inner = np.eye(n)
        inner[1:, 1:] = _random_orthogonal(n - 1, generator)
        inner[0, 0] = generator.choice((-1.0, 1.0))
        return np.asarray(mirror @ inner @ mirror)
    if name in ("T", "T2", "R", "R2") and n % 2:
        raise SpecError(f"{name} acts on pairs of indices, and {n} is odd")
    if name in ("R", "R2"):
        scale = factors(n // 2, generator) * generator.choice((-1.0, 1.0), n // 2)
        return np.diag(np.tile(scale, 2) if name == "R" else np.repeat(scale, 2))
    if name in ("T", "T2"):
        scale, angle = factors(n // 2, generator), generator.uniform(0, 2 * np.pi, n // 2)
        cosine, sine = np.diag(scale * np.cos(angle)), np.diag(scale * np.sin(angle))
        halves = np.block([[cosine, -sine], [sine, cosine]])
        return halves if name == "T" else _as_neighbours(halves)
    if _known(name) == "1":
        return np.eye(n)
    moved = np.eye(n)[generator.permutation(n)]
    if name == "S±":
        return np.asarray(moved * generator.choice((-1.0, 1.0)))
    if name in ("P", "M"):
        moved = moved * factors(n, generator)[:, None]
    if name in ("B", "M"):
        moved = moved * generator.choice((-1.0, 1.0), n)[:, None]
    return np.asarray(moved)


def factors(shape: int | tuple[int, ...], generator: np.random.Generator) -> Matrix:
    """Random positive factors within [1/2, 2], whose logarithms are uniform."""
    return np.asarray(np.exp2(generator.uniform(-1, 1, shape)))


def _random_orthogonal(n: int, generator: np.random.Generator) -> Matrix:
    q, r = np.linalg.qr(generator.standard_normal((n, n)))
    return np.asarray(q * np.where(np.diagonal(r) < 0, -1.0, 1.0))


def _as_halves(matrices: Matrix) -> Matrix:
    """Matrices on pairs (2j, 2j + 1), on an axis where the same pairs are (j, j + n/2)."""
    order = np.arange(matrices.shape[-1]).reshape(-1, 2).T.reshape(-1)
    return np.asarray(matrices[..., order, :][..., order])


def _as_neighbours(matrix: Matrix) -> Matrix:
    order = np.arange(matrix.shape[-1]).reshape(2, -1).T.reshape(-1)
    return np.asarray(matrix[order][:, order])


def _known(name: str) -> str:
    if name not in _BELOW:
        raise SpecError(f"{name!r} is no structure; there are {', '.join(NAMES)}")
    return name
