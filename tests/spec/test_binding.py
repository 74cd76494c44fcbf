from __future__ import annotations

import pytest

from permgraph.errors import SpecError
from permgraph.spec import Group
from permgraph.spec.binding import bind, check_groups, coordinates
from permgraph.spec.expressions import parse_axes, parse_axis

GROUPS = {
    group.name: group
    for group in [
        Group("a", 2),
        Group("b", 3),
        Group("h", 2),
        Group("d", 3, ("h",)),
        Group("q", 2, ("h",)),
        Group("r", 2, ("h", "q")),
        Group("g", 2),
        Group("x", 2, ("g", "h")),
        Group("p", 2, ("h",)),
        Group("y", 2, ("h", "q", "p")),
        Group("f", 2, fixed=True),
        Group("z", 3, ("f",)),
        Group("zz", 3, ("h",), fixed=True),
    ]
}


def places(text: str) -> dict[tuple[str, int, tuple[int, ...]], list[tuple[int, tuple[int, ...]]]]:
    found = bind(parse_axes(text), GROUPS).occurrences
    return {(o.group, o.dim, o.path): [(parent.dim, parent.path) for parent in o.parents] for o in found}


def test_the_only_one_in_another_dimension_binds():
    assert places("h d") == {("h", 0, ()): [], ("d", 1, ()): [(0, ())]}
    assert places("d (a h)")["d", 0, ()] == [(1, (1,))]


def test_the_same_product_binds_first():
    assert places("(h d) (h d)") == {
        ("h", 0, (0,)): [],
        ("d", 0, (1,)): [(0, (0,))],
        ("h", 1, (0,)): [],
        ("d", 1, (1,)): [(1, (0,))],
    }


def test_an_enclosing_product_binds():
    assert places("(h [d + 2]) h")["d", 0, (1, 0)] == [(0, (0,))]
    assert places("[(h d) + (h d 2)]") == {
        ("h", 0, (0, 0)): [],
        ("d", 0, (0, 1)): [(0, (0, 0))],
        ("h", 0, (1, 0)): [],
        ("d", 0, (1, 1)): [(0, (1, 0))],
    }


def test_of_enclosing_products_the_innermost_binds():
    assert places("(h [(h d) + 6])")["d", 0, (1, 0, 1)] == [(0, (1, 0, 0))]
    assert places("(h q) p y")["y", 2, ()] == [(0, (0,)), (0, (1,)), (1, ())]


def test_every_level_binds():
    found = places("h q r")
    assert found["q", 1, ()] == [(0, ())]
    assert found["r", 2, ()] == [(0, ()), (1, ())]


def test_a_parent_brings_its_own_parents():
    # Of the two axes of h, r obeys the one that its q obeys.
    assert places("(h q) h r")["r", 2, ()] == [(0, (0,)), (0, (1,))]


def test_fixed_groups_bind_as_others_do():
    assert places("f z")["z", 1, ()] == [(0, ())]
    assert places("h zz")["zz", 1, ()] == [(0, ())]


def test_a_parent_may_stand_at_the_same_part_of_a_labelled_axis():
    assert places("s:[h + 1] {d | b}@s")["d", 1, (0,)] == [(0, (0, 0))]
    assert places("({h | a}@s {d | b}@s) s:[1 + 1]")["d", 0, (1, 0)] == [(0, (0, 0))]


def test_occurrences_meet_unless_parts_exclude_each_other():
    (one, two, outer) = bind(parse_axes("[a + a] b"), GROUPS).occurrences
    assert not one.meets(two)
    assert one.meets(outer)
    assert one.meets(one)
    (one, two) = bind(parse_axes("a a"), GROUPS).occurrences
    assert one.meets(two)
    (_, one, two, inside) = bind(parse_axes("s:[h + a] {b | b}@s"), GROUPS).occurrences
    assert not two.meets(inside)
    assert not one.meets(two) or one.group == "a"


def test_families_point_at_their_sum():
    layout = bind(parse_axes("(s:[1 + 1] {a | 2}@s) (s:[1 + 1] {2 | a}@s)"), GROUPS)
    assert layout.families == {(0, (1,)): (0, (0, 0)), (1, (1,)): (1, (0, 0))}
    assert [sorted(o.guards) for o in layout.occurrences] == [[(0, (0, 0), 0)], [(1, (0, 0), 1)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nix", r"dimension 0 \(nix\): there is no group named 'nix'"),
        ("(h q) (h p) y", "the parents of 'y' do not agree on which axis of 'h' they mean"),
        ("a d", r"dimension 1 \(d\): 'd' is fibred over 'h', which has no axis there"),
        ("h h d", "'d' is fibred over 'h', of which 2 axes could be meant"),
        ("(h h d)", "of which 2 axes could be meant"),
        ("[h + d]", "which has no axis there"),
        ("[h + 2] d", "which has no axis there"),
        ("h (h q) (h r)", "'r' and its parents do not agree on which axis of 'h' they are over"),
        ("r q", "'r' is fibred over 'q'|'q' is fibred over 'h', which has no axis there"),
        ("{a | a}@s", "is on 's', but no axis that is always there beside it is labelled so"),
        ("s:[1 + 1] s:[1 + 1] {a | a}@s", "more than one axis is labelled so"),
        ("s:[1 + 1 + 1] {a | a}@s", r"has 2 members for the 3 parts of \[1 \+ 1 \+ 1\]"),
        ("s:f {a | a}@s", "has 2 members for the 1 parts of f"),
        ("s:[{a | a}@s + 1]", "no axis that is always there"),
        ("[s:[1 + 1] + 2] {a | a}@s", "no axis that is always there"),
        ("{s:[1 + 1] | 2}@t {t:[1 + 1] | 2}@s", "in a circle"),
    ],
)
def test_what_cannot_be_bound(text, message):
    with pytest.raises(SpecError, match=message) as caught:
        bind(parse_axes(text), GROUPS, "parameter 'w'")
    assert str(caught.value).startswith("parameter 'w', dimension ")


def group_of(*groups: Group) -> dict[str, Group]:
    return {group.name: group for group in groups}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (group_of(Group("d", 2, ("d",))), "group 'd' is fibred over itself"),
        (group_of(Group("d", 2, ("h",))), "fibred over 'h', which is no group of this spec"),
        (group_of(Group("h", 2), Group("d", 2, ("h", "h"))), "names a parent twice"),
        (group_of(Group("a", 2, ("b",)), Group("b", 2, ("a",))), "group 'a' is fibred over itself by way of b"),
        (
            group_of(Group("a", 2, ("b",)), Group("b", 2, ("c",)), Group("c", 2, ("a",))),
            "group 'a' is fibred over itself by way of b, c",
        ),
        (
            group_of(Group("h", 2), Group("q", 2, ("h",)), Group("r", 2, ("q",))),
            "name 'h' among the parents of 'r' too",
        ),
        (group_of(Group("h", 2), Group("q", 2, ("h",)), Group("r", 2, ("q", "h"))), "write the outermost first"),
        ({"x": Group("y", 2)}, "the group under the key 'x' is named 'y'"),
    ],
)
def test_groups_that_contradict_themselves(groups, message):
    with pytest.raises(SpecError, match=message):
        check_groups(groups)


def test_sizes_of_groups():
    for size in (0, -1, 2.0, True, None):
        with pytest.raises(SpecError, match="a size is an integer, one or more"):
            Group("a", size)
    with pytest.raises(SpecError, match="must be a tuple"):
        Group("a", 2, ["h"])


def test_coordinates():
    axis = parse_axis("(a [b + 2])")
    assert coordinates(axis, (), GROUPS).tolist() == list(range(10))
    assert coordinates(axis, (0,), GROUPS).tolist() == [0] * 5 + [1] * 5
    assert coordinates(axis, (1, 0), GROUPS).tolist() == [0, 1, 2, -1, -1] * 2
    assert coordinates(axis, (1, 1), GROUPS).tolist() == [-1, -1, -1, 0, 1] * 2
    nested = parse_axis("[2 + (a b)]")
    assert coordinates(nested, (1, 1), GROUPS).tolist() == [-1, -1, 0, 1, 2, 0, 1, 2]
