"""The lattice of structures against the sets themselves, on few indices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from permgraph.errors import SpecError
from permgraph.structures import NAMES, Structure, is_member, is_within, larger, meet, random_element
from permgraph.structures.lattice import dimension

#: What groups of pairs have in common with these has no name in the lattice, but for those that hold one another.
PAIRED = ("T", "T2", "R", "R2")
OTHERS = ("O", "O1", "M", "P", "B", "S±", *PAIRED)
UNNAMED = {
    frozenset((pairs, other))
    for pairs in PAIRED
    for other in OTHERS
    if not is_within(pairs, other) and not is_within(other, pairs)
}


def _pool(n: int) -> np.ndarray:
    """All matrices with few entries, all monomial ones with more, and orthogonal ones with fractions."""
    entries = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0) if n == 2 else (-1.0, 0.0, 1.0)
    every = np.array(list(itertools.product(entries, repeat=n * n))).reshape(-1, n, n) if n < 4 else np.empty((0, n, n))
    places = np.eye(n)[np.array(list(itertools.permutations(range(n))))]
    factors = np.array(list(itertools.product((-2.0, -1.0, 1.0, 0.5), repeat=n)))
    monomial = (places[:, None] * factors[None, :, :, None]).reshape(-1, n, n)
    mirror = np.eye(n) - 2 / n * np.ones((n, n))
    turn = np.eye(n)
    turn[:2, :2] = [[0.6, -0.8], [0.8, 0.6]]
    generator = np.random.default_rng(0)
    drawn = [
        random_element(name, n, generator) for name in NAMES if name not in PAIRED or n % 2 == 0 for _ in range(20)
    ]
    more = [mirror, -mirror, turn, turn @ mirror @ turn.T, mirror @ places[-1]]
    return np.concatenate([every, monomial, np.array(drawn + more)])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_meets_are_intersections(n: int) -> None:
    pool = _pool(n)
    member = {name: is_member(name, pool) for name in NAMES if name not in PAIRED or n % 2 == 0}
    for a, b in itertools.product(member, repeat=2):
        both, said = member[a] & member[b], member[meet(a, b)]
        assert not (said & ~both).any(), (a, b)
        if frozenset((a, b)) not in UNNAMED:
            assert (said == both).all(), (a, b)


def test_the_order_is_inclusion() -> None:
    pool = _pool(4)
    member = {name: is_member(name, pool) for name in NAMES}
    for a, b in itertools.product(NAMES, repeat=2):
        assert is_within(a, b) == bool((member[a] <= member[b]).all()), (a, b)


def test_the_meet_is_a_meet() -> None:
    for a, b, c in itertools.product(NAMES, repeat=3):
        assert meet(a, b) == meet(b, a)
        assert meet(a, meet(b, c)) == meet(meet(a, b), c)
        assert is_within(c, meet(a, b)) == (is_within(c, a) and is_within(c, b))
    for name in NAMES:
        assert meet(name, name) == name
        assert all(is_within(name, above) and name != above for above in larger(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [4, 6])
def test_random_elements_are_members_well_conditioned_and_in_no_smaller_group(name: str, n: int) -> None:
    generator = np.random.default_rng(1)
    drawn = np.array([random_element(name, n, generator) for _ in range(50)])
    assert is_member(name, drawn).all()
    singular = np.linalg.svd(drawn, compute_uv=False)
    assert singular.min() >= 0.5 - 1e-12 and singular.max() <= 2 + 1e-12
    for other in NAMES:
        if not is_within(name, other):
            assert not is_member(other, drawn).all(), f"all elements of {name} are in {other}"


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_dimensions_are_those_of_the_tangent_space(n: int) -> None:
    """How many independent directions the group has at the identity, from its equations there."""
    units = np.eye(n * n).reshape(-1, n, n)
    transposed = np.swapaxes(units, 1, 2)
    skew = np.linalg.matrix_rank((units - transposed).reshape(n * n, -1)) if n > 1 else 0
    assert dimension("GL", n) == n * n
    assert dimension("O", n) == skew
    stacked = np.concatenate([(units + transposed).reshape(n * n, -1), units.sum(-1)], axis=1)
    assert dimension("O1", n) == n * n - np.linalg.matrix_rank(stacked)
    assert [dimension(name, n) for name in ("M", "P", "B", "S±", "S", "1")] == [n, n, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "text", ["S", "S±", "B", "P", "M", "O", "O1", "GL", "T", "T2", "M×P", "M^3×B^2", "P^2", "B×S±"]
)
def test_structures_are_read_as_they_are_written(text: str) -> None:
    assert str(Structure.parse(text)) == text


@pytest.mark.parametrize("text", ["", "GL×P", "X", "O^2", "M×", "T×S"])
def test_what_is_no_structure_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="no structure"):
        Structure.parse(text)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SpecError, match="no structure"):
        meet("O", "U")
