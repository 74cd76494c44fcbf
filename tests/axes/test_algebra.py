"""The algebra against brute force, and its laws: order does not matter, nothing is lost, everything comes to rest."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from permgraph.algebra import Axes, Index, Kind, Pinned
from permgraph.algebra.limits import MAX_DEPTH, TOO_INTRICATE
from permgraph.errors import ConflictError
from tests.axes.systems import Constraint, Join, Pin, Slice, Tie, View, brute_force, solve, systems

System = tuple[list[int], list[Constraint]]


@given(systems())
@settings(max_examples=150)
def test_exactly_the_permutations_that_satisfy_the_constraints(system: System) -> None:
    solved = solve(*system)
    found, wanted = set(solved.elements()), brute_force(*system)
    assert found <= wanted, "the algebra allows what the constraints forbid"
    if not solved.gave_up():
        assert found == wanted, "the algebra forbids what the constraints allow"
    assert len(found) == math.prod(math.factorial(atom.size) for atom in solved.atoms()), "atoms are independent"


@given(systems(), st.randoms(use_true_random=False))
def test_the_order_of_constraints_does_not_matter(system: System, shuffler: random.Random) -> None:
    sizes, constraints = system
    shuffled = list(constraints)
    shuffler.shuffle(shuffled)
    assert solve(sizes, shuffled).text() == solve(sizes, constraints).text()


@given(systems())
def test_once_at_rest_nothing_moves_it(system: System) -> None:
    sizes, constraints = system
    solved = solve(sizes, constraints)
    before, text = solved.axes.changes, solved.text()
    solved.impose(constraints)
    assert solved.axes.changes == before
    assert solved.text() == text


@given(systems())
def test_sizes_stay(system: System) -> None:
    sizes, constraints = system
    solved = solve(sizes, constraints)
    assert [solved.axes.resolve(slot).size for slot in solved.slots] == sizes
    for slot, size in zip(solved.slots, sizes, strict=True):
        assert math.prod(f.size for f in solved.axes.factors(slot)) == size
        assert sum(part.size for part in solved.axes.parts(slot)) == size


@given(systems(most=3), st.data())
def test_a_refinement_is_a_subgroup(system: System, data: st.DataObject) -> None:
    sizes, constraints = system
    fewer: list[Constraint] = data.draw(st.lists(st.sampled_from(constraints), unique=True))
    before, after = set(solve(sizes, fewer).elements()), set(solve(sizes, constraints).elements())
    assert after <= before


@given(systems(most=3), st.data())
def test_unifying_is_symmetric(system: System, data: st.DataObject) -> None:
    sizes, constraints = system
    pairs = [(a, b) for a in range(len(sizes)) for b in range(a) if sizes[a] == sizes[b]]
    assume(pairs)
    a, b = data.draw(st.sampled_from(pairs))
    assert solve(sizes, [*constraints, Tie(a, b)]).text() == solve(sizes, [*constraints, Tie(b, a)]).text()


@given(systems(most=3), st.data())
def test_unifying_with_itself_or_twice_does_nothing(system: System, data: st.DataObject) -> None:
    sizes, constraints = system
    solved = solve(sizes, constraints)
    slot = solved.slots[data.draw(st.integers(0, len(sizes) - 1))]
    before = solved.axes.changes
    solved.axes.unify(slot, slot)
    assert solved.axes.changes == before


# -- by hand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "constraints", "text"),
    [
        ([6, 2, 3], [View((0,), (1, 2))], "(0:2 1:3) ; 0:2 ; 1:3"),
        ([6, 2, 4], [Join((1, 2), 0)], "[0:2 + 1:4] ; 0:2 ; 1:4"),
        ([6, 2], [Slice(0, 2, 1)], "[0:2 + 1:2 + 2:2] ; 1:2"),
        ([6, 6, 2, 3], [View((0,), (2, 3)), Tie(0, 1), Pin(2)], "(.2 0:3) ; (.2 0:3) ; .2 ; 0:3"),
        ([24, 4, 6, 8, 3], [View((0,), (1, 2)), View((0,), (3, 4))],
         "(0:4 1:2 2:3) ; 0:4 ; (1:2 2:3) ; (0:4 1:2) ; 2:3"),
        ([24, 4, 6], [View((0,), (1, 2)), View((0,), (2, 1))], ".24 ; .4 ; .6"),
        ([4, 2, 3], [Slice(0, 0, 1), Slice(0, 1, 2)], "[.2 + 0:2] ; .2 ; [.1 + 0:2]"),
        ([5, 4, 4], [Slice(0, 0, 1), Slice(0, 1, 2), Tie(1, 2)], ".5 ; .4 ; .4"),
    ],
)  # fmt: skip
def test_by_hand(sizes: list[int], constraints: list[Constraint], text: str) -> None:
    assert solve(sizes, constraints).text() == text


def test_families() -> None:
    axes = Axes()
    parts = [axes.atom(2), axes.atom(3)]
    total = axes.sum(parts)
    assert total.index is not None
    left, right = axes.atom(5), axes.atom(5)
    family = axes.family(total.index, [left, right])
    assert family.kind is Kind.FAMILY
    assert axes.family(total.index, [left, right]) is family, "made once"
    assert axes.family(total.index, [left, left]) is left, "equal members are one axis"

    _, restriction = axes.slice(total, 2, 5)
    assert axes.restrict(family, restriction) is right, "in the second part it is the second member"
    _, elsewhere = axes.slice(axes.sum([axes.atom(1), axes.atom(4)]), 0, 1)
    assert axes.restrict(family, elsewhere) is family, "another sum says nothing of it"

    flat = axes.product([total, family])
    assert [axes.resolve(part).kind for part in axes.parts(flat)] == [Kind.PRODUCT, Kind.PRODUCT]
    assert [f is g for f, g in zip(axes.factors(axes.parts(flat)[0]), [parts[0], left], strict=True)] == [True, True]

    axes.collapse(family)
    assert axes.resolve(family) is axes.resolve(left) is axes.resolve(right)


def test_an_axis_of_families_may_be_one_of_its_members() -> None:
    axes = Axes()
    total = axes.sum([axes.atom(2), axes.atom(3)])
    assert total.index is not None
    left, right = axes.atom(5), axes.atom(5)
    axes.unify(left, axes.family(total.index, [left, right]))
    assert axes.resolve(left) is axes.resolve(right)


def test_what_was_cut_is_made_cut_the_next_time() -> None:
    first = Axes()
    first.start_node(7)
    whole = first.atom(12)
    three, four = first.split(whole, [3, 4])
    first.slice(three, 0, 1)
    second = Axes(first.named.cuts_seen(first))
    second.start_node(7)
    rows, columns = second.split(second.atom(12), [3, 4])
    assert [part.size for part in second.parts(rows)] == [1, 2]
    assert columns.kind is Kind.FAMILY
    assert [member.size for member in columns.children] == [4, 4]
    assert first.resolve(four).kind is Kind.ATOM


def test_refusals_name_the_sizes() -> None:
    axes = Axes()
    with pytest.raises(ConflictError, match=r"cannot tie an axis of 3 a3 to one of 2 a2"):
        axes.unify(axes.atom(3), axes.atom(2))
    with pytest.raises(ConflictError, match=r"cannot view an axis of 6 a6 as 4x2"):
        axes.split(axes.atom(6), [4, 2])
    with pytest.raises(ConflictError, match=r"cannot take 2:9 of an axis of 6 a6"):
        axes.slice(axes.atom(6), 2, 9)


def test_a_pin_keeps_its_first_reason() -> None:
    axes = Axes()
    atom = axes.atom(6)
    axes.pin(atom, Pinned("the first", 3))
    axes.pin(atom, Pinned("the second", 4))
    two, three = axes.split(atom, [2, 3])
    assert two.pinned == three.pinned == Pinned("the first", 3)


@pytest.mark.parametrize("size", [MAX_DEPTH - 4, 4 * MAX_DEPTH])
def test_a_shifted_copy_is_followed_up_to_a_depth_and_pinned_beyond(size: int) -> None:
    axes = Axes()
    for _ in range(2):  # the first leaves nothing behind that would hold the second back
        atom = axes.atom(size)
        axes.unify(axes.sum([axes.one, atom], Index()), axes.sum([atom, axes.one], Index()))
        assert axes.still(atom)
        reasons = {a.pinned.reason for a in axes.atoms(atom) if a.pinned is not None}
        assert reasons == (set() if size < MAX_DEPTH else {TOO_INTRICATE})


def test_an_empty_slice_is_always_the_same_and_changes_nothing() -> None:
    axes = Axes()
    atom = axes.atom(6)
    empty, restriction = axes.slice(atom, 2, 2)
    assert empty is axes.slice(axes.atom(4), 0, 0)[0] is axes.atom(0) is axes.product([empty, atom])
    assert axes.sum([empty, atom, empty]) is atom
    before = axes.changes
    axes.unify(empty, axes.atom(0))
    zero, three = axes.split(empty, [0, 3])
    assert (restriction, zero, three.size, three.pinned) == ({}, empty, 3, None)
    assert axes.split(empty, [0, 3])[1] is three
    assert axes.changes == before


def test_no_new_cuts_leaves_the_old_ones() -> None:
    """The query, key and value of a fused projection stay three where something else is cut at ever new places."""
    axes = Axes()
    three, elsewhere = axes.sum([axes.one] * 3), axes.atom(6)
    assert three.index is not None
    channels = axes.family(three.index, [axes.atom(5) for _ in range(3)])
    axes.may_cut = False
    _, restriction = axes.slice(three, 1, 2)
    assert axes.restrict(channels, restriction) is channels.children[1]
    assert [part.size for part in axes.parts(three)] == [1, 1, 1]
    axes.slice(elsewhere, 1, 2)
    assert elsewhere.pinned is not None
