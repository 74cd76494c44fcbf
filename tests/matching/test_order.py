"""The order in which groups take their turns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from permgraph import PermutationSpec
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.order import informed_order


def test_the_informed_order_is_a_good_one():
    """Every move once; and no other order of these few has a higher expected gain where the search can see it."""
    spec = PermutationSpec.parse("""
        first   9x5    stream .
        up1     7x9    one stream
        down1   9x7    stream one
        up2     8x9    two stream
        down2   9x8    stream two
        head    3x9    . stream
        groups: stream 9 · one 7 · two 8
    """)
    plan = Plan(spec, spec.shapes)
    for seed in range(5):
        order = informed_order(plan, dict.fromkeys(spec.shapes, 1.0), np.random.default_rng(seed))
        assert sorted(order) == [0, 1, 2]
        # The stream has evidence of its own, and each of the others sees nothing without it.
        assert plan.moves[order[0]].name == "stream"
    without = dict.fromkeys(spec.shapes, 1.0) | {"first": 0.0, "head": 0.0, "up1": 0.0}
    assert sorted(informed_order(plan, without, np.random.default_rng(0))) == [0, 1, 2]


def test_the_informed_order_begins_at_the_end_that_knows_more():
    spec = PermutationSpec.parse("""
        w1  8x40  one .
        w2  8x8   two one
        w3  8x8   three two
        w4  3x8   . three
        groups: one 8 · two 8 · three 8
    """)
    plan = Plan(spec, spec.shapes)
    for seed in range(20):
        assert informed_order(plan, dict.fromkeys(spec.shapes, 1.0), np.random.default_rng(seed)) == [0, 1, 2]


def test_the_informed_order_does_not_begin_where_nothing_is_known():
    spec = PermutationSpec.parse("""
        w1  9x5   a .
        w2  9x9   b a
        w3  9x9   c b
        groups: a 9 · b 9 · c 9
    """)
    plan = Plan(spec, spec.shapes)
    for seed in range(5):
        order = informed_order(plan, dict.fromkeys(spec.shapes, 1.0), np.random.default_rng(seed))
        assert [plan.moves[number].name for number in order] == ["a", "b", "c"]


def expected(plan, spread, order):
    """What the first sweep gains by the module's formula, said once more: block by block, for chains of matrices."""
    total = 0.0
    for at, number in enumerate(order):
        group = plan.moves[number].name
        before = {plan.moves[other].name for other in order[:at]}
        seen = 0.0
        for name, blocks in plan.blocks.items():
            met = {leaf.group for leaf in blocks[0].leaves} - {None}
            if group in met and met - {group} <= before:
                seen += blocks[0].size * spread[name]
        size = plan.spec.groups[group].size
        total += np.sqrt(2 * size * np.log(size) * seen)
    return total


@pytest.mark.parametrize("seed", range(10))
def test_moving_one_group_from_the_informed_order_gains_nothing(seed):
    """Nor is it far from the best of all orders."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 30, 6).tolist()
    lines = [f"in{n} {size}x{rng.integers(2, 40)} g{n} ." for n, size in enumerate(sizes) if n in (0, 3)]
    pairs = [(n, m) for n, m in itertools.combinations(range(6), 2) if m == n + 1 or rng.random() < 0.4]
    lines += [f"w{n}{m} {sizes[m]}x{sizes[n]} g{m} g{n}" for n, m in pairs]
    spec = PermutationSpec.parse("\n".join([*lines, "groups: " + " · ".join(f"g{n} {s}" for n, s in enumerate(sizes))]))
    plan = Plan(spec, spec.shapes)
    spread = {name: float(rng.gamma(1.0)) for name in spec.shapes}
    found = informed_order(plan, spread, rng)
    value = expected(plan, spread, found)
    for one, place in itertools.product(range(6), range(6)):
        other = [number for number in found if number != one]
        other.insert(place, one)
        assert expected(plan, spread, other) <= value * (1 + 1e-9)
    best = max(expected(plan, spread, order) for order in itertools.permutations(range(6)))
    assert value > 0.97 * best


def test_hundreds_of_groups_on_one_stream_are_put_in_order_by_what_they_meet():
    """All see the stream, and nothing else: the order is found without looking at every pair of them."""
    count = 700
    lines = ["first 8x5 stream .", *(f"up{n} 3x8 g{n} stream" for n in range(count))]
    groups = "groups: stream 8 · " + " · ".join(f"g{n} 3" for n in range(count))
    spec = PermutationSpec.parse("\n".join([*lines, groups]))
    plan = Plan(spec, spec.shapes)
    order = informed_order(plan, dict.fromkeys(spec.shapes, 1.0), np.random.default_rng(0))
    assert sorted(order) == list(range(count + 1))
    assert plan.moves[order[0]].name == "stream"
