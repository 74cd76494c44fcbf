"""Small wreath products, every element of them, against SymPy's permutation groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sympy.combinatorics import Permutation as Oracle
from sympy.combinatorics import PermutationGroup

from permgraph.spec import PermutationSpec
from permgraph.spec.expressions import size_of
from tests.spec.reference import every_element


def cycles(size: int, *moves: dict[int, int]) -> PermutationGroup:
    return PermutationGroup([Oracle([move.get(i, i) for i in range(size)]) for move in moves])


def swap(*pairs: tuple[int, int]) -> dict[int, int]:
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


CASES = {
    # Inner S2 in each of three places, and S3 of the places: 2!^3 · 3!.
    "S2 wr S3": (
        "t 6 (h d)\ngroups: h 3 · d 2 per h",
        cycles(6, swap((0, 1)), swap((0, 2), (1, 3)), swap((2, 4), (3, 5))),
        2**3 * 6,
    ),
    "S3 wr S2": (
        "t 6 (h d)\ngroups: h 2 · d 3 per h",
        cycles(6, swap((0, 1)), swap((1, 2)), swap((0, 3), (1, 4), (2, 5))),
        6**2 * 2,
    ),
    "S2 wr S2 wr S2": (
        "t 8 (h k d)\ngroups: h 2 · k 2 per h · d 2 per h k",
        cycles(8, swap((0, 1)), swap((0, 2), (1, 3)), swap((0, 4), (1, 5), (2, 6), (3, 7))),
        2**4 * 2**2 * 2,
    ),
    "S2 ^ 3, over a fixed axis": (
        "t 6 (f d)\ngroups: f 3 fixed · d 2 per f",
        cycles(6, swap((0, 1)), swap((2, 3)), swap((4, 5))),
        2**3,
    ),
    "S3 x S2": (
        "t 6 (a b)\ngroups: a 2 · b 3",
        cycles(6, swap((0, 1), (3, 4)), swap((1, 2), (4, 5)), swap((0, 3), (1, 4), (2, 5))),
        12,
    ),
    "S2 wr S3, beside a fixed middle, over two dimensions": (
        "t 3x1x2 h . d\ngroups: h 3 · d 2 per h",
        cycles(6, swap((0, 1)), swap((0, 2), (1, 3)), swap((2, 4), (3, 5))),
        2**3 * 6,
    ),
    "S2 over two independent parents": (
        "t 8 (u v d)\ngroups: u 2 · v 2 · d 2 per u v",
        cycles(8, swap((0, 1)), swap((0, 2), (1, 3), (4, 6), (5, 7)), swap((0, 4), (1, 5), (2, 6), (3, 7))),
        2**4 * 2 * 2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_group(name):
    text, oracle, order = CASES[name]
    spec = PermutationSpec.parse(text)
    elements = every_element(spec)
    numbers = torch.arange(math.prod(spec.shapes["t"])).reshape(spec.shapes["t"])

    def action(p) -> tuple[int, ...]:
        return tuple(p.apply_to("t", numbers).flatten().tolist())

    actions = [action(p) for p in elements]
    assert len(elements) == len(set(actions)) == order == oracle.order()
    assert spec.log_order() == pytest.approx(math.log(order))
    assert set(actions) == {tuple(element.array_form) for element in oracle.elements}
    # Composition, on every pair (of the largest group, on a regular sample of pairs), as SymPy's: (x * y)(i) = y(x(i)).
    pairs = list(itertools.product(range(order), repeat=2))
    for i, j in pairs[:: max(1, len(pairs) // 2500)]:
        product = elements[i] @ elements[j]
        assert action(product) == tuple((Oracle(actions[i]) * Oracle(actions[j])).array_form)
    for p, moved in zip(elements, actions, strict=True):
        assert action(p.inverse()) == tuple((Oracle(list(moved)) ** -1).array_form)
        assert (p @ p.inverse()).is_identity
        assert (p.inverse() @ p).is_identity


def test_composition_is_associative():
    spec = PermutationSpec.parse(CASES["S2 wr S2 wr S2"][0])
    p, q, r = (spec.random(seed) for seed in range(3))
    assert (p @ q) @ r == p @ (q @ r)
    assert p @ spec.identity() == p == spec.identity() @ p
    assert (p @ q).inverse() == q.inverse() @ p.inverse()


def test_random_elements_are_spread_over_the_whole_group():
    spec = PermutationSpec.parse(CASES["S2 wr S3"][0])
    numbers = torch.arange(6)
    drawn = [tuple(spec.random(seed).apply_to("t", numbers).tolist()) for seed in range(1500)]
    counts = [drawn.count(element) for element in set(drawn)]
    assert len(counts) == 48
    # 1500 draws over 48 elements: 31 each, with a standard deviation of 5.5.
    assert 8 < min(counts) <= max(counts) < 62


@pytest.mark.parametrize(
    ("text", "log_order"),
    [
        ("t 12 (h d)\ngroups: h 3 · d 4 per h", math.lgamma(4) + 3 * math.lgamma(5)),
        (
            "t 24 (k g d)\ngroups: k 2 · g 3 per k · d 4 per k g",
            math.lgamma(3) + 2 * math.lgamma(4) + 6 * math.lgamma(5),
        ),
        ("t 12 (f d)\ngroups: f 3 fixed · d 4 per f", 3 * math.lgamma(5)),
        ("t 4 d\ngroups: d 4 · nowhere 9", math.lgamma(5)),
        ("t 4 .\ngroups: d 4", 0.0),
        ("t 9 [a + a + 1]\ngroups: a 4", math.lgamma(5)),
    ],
)
def test_log_order(text, log_order):
    spec = PermutationSpec.parse(text)
    assert spec.log_order() == pytest.approx(log_order)
    assert all(size_of(axis, spec.groups) for axes in spec.axes.values() for axis in axes)
