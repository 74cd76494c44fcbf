from __future__ import annotations

import pytest
from hypothesis import given, settings

from permgraph.errors import SpecError
from permgraph.spec import Group
from permgraph.spec.expressions import (
    Family,
    Fixed,
    Label,
    Product,
    Ref,
    Sum,
    children,
    concatenation,
    normalise,
    parse_axes,
    parse_axis,
    product,
    refs,
    rename,
    size_of,
    walk,
)
from tests.spec.strategies import expressions

a, b = Ref("a"), Ref("b")
GROUPS = {"a": Group("a", 2), "b": Group("b", 3)}


@settings(deadline=None, max_examples=300)
@given(expressions)
def test_text_reads_back(axis):
    assert parse_axis(str(axis)) == axis
    assert parse_axes(f"{axis} {axis}") == (axis, axis)
    assert hash(parse_axis(str(axis))) == hash(axis)


@settings(deadline=None, max_examples=200)
@given(expressions)
def test_normal_form_is_one(axis):
    once = normalise(axis)
    assert normalise(once) == once
    for _, node in walk(once):
        if isinstance(node, Product):
            assert len(node.factors) > 1
            assert not any(isinstance(factor, Product) or factor == Fixed(1) for factor in node.factors)


@settings(deadline=None, max_examples=200)
@given(expressions)
def test_normal_form_keeps_size(axis):
    groups = {name: Group(name, 3) for name in refs(axis)}
    try:
        size = size_of(axis, groups)
    except SpecError:
        return  # a family whose members differ
    assert size_of(normalise(axis), groups) == size


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("7", Fixed(7)),
        ("layer1.0.conv2", Ref("layer1.0.conv2")),
        ("(a b 7)", Product((a, b, Fixed(7)))),
        ("[a+b + 3]", Sum((a, b, Fixed(3)))),
        ("s:[a + 1 + 1]", Label("s", Sum((a, Fixed(1), Fixed(1))))),
        ("{a | b | b}@s", Family("s", (a, b, b))),
        ("( s:[1 + 1]  {a|b} @ s)", Product((Label("s", Sum((Fixed(1), Fixed(1)))), Family("s", (a, b))))),
    ],
)
def test_text(text, axis):
    assert parse_axis(text) == axis


def test_normal_forms():
    assert product(product(a, Fixed(1)), product(b, Fixed(2))) == Product((a, b, Fixed(2)))
    assert product(Fixed(1)) == product() == Fixed(1)
    assert product(a) == concatenation(a) == a
    assert concatenation(a, concatenation(b, Fixed(1))) == Sum((a, b, Fixed(1)))
    assert product(Fixed(2), product(Fixed(3), a)) == Product((Fixed(6), a))
    assert concatenation(a, Fixed(2), concatenation(Fixed(3), a)) == Sum((a, Fixed(5), a))
    assert product(Fixed(2), Fixed(3)) == Fixed(6)


def test_parts_that_a_family_counts_are_kept():
    labelled = parse_axis("s:[[a + b] + 1]")
    assert normalise(labelled) == labelled
    assert normalise(parse_axis("s:[(a 1)]")) == parse_axis("s:[a]")


def test_sizes():
    assert size_of(parse_axis("(a b 7)"), GROUPS) == 42
    assert size_of(parse_axis("[a + b + 7]"), GROUPS) == 12
    assert size_of(parse_axis("(s:[1 + 1] {b | 3}@s)"), GROUPS) == 6
    with pytest.raises(SpecError, match=r"no group named 'c'"):
        size_of(parse_axis("(a c)"), GROUPS)
    with pytest.raises(SpecError, match=r"\{a \| b\}@s differ in size: \[2, 3\]"):
        size_of(parse_axis("{a | b}@s"), GROUPS)


def test_rename_and_children():
    axis = parse_axis("(s:[a + 1] {a | b}@s [a + b])")
    assert str(rename(axis, str.upper)) == "(s:[A + 1] {A | B}@s [A + B])"
    assert refs(axis) == ("a", "a", "b", "a", "b")
    assert children(a) == ()
    assert dict(walk(axis))[0, 0, 1] == Fixed(1)


def test_a_dot_is_a_whole_dimension():
    assert parse_axis(".", size=5) == Fixed(5)
    assert parse_axes("a . .", (2, 3, 4)) == (a, Fixed(3), Fixed(4))
    with pytest.raises(SpecError, match=r"column 2 of '\(\.\)'|column 2"):
        parse_axis("(.)", size=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends there"),
        ("(a", "ends there"),
        ("a)", r"expected the end of the axis, but found '\)' at column 2"),
        ("[a b]", r"expected ']', but found 'b' at column 4"),
        ("{a | b}", "expected '@'"),
        ("{a | b}@7", "expected an axis or a name, but found '7'"),
        ("a:", "ends there"),
        ("a = b", "cannot read '=' at column 3"),
        ("[a + ]", "found ']'"),
    ],
)
def test_malformed_text_names_the_column(text, message):
    with pytest.raises(SpecError, match=message):
        parse_axis(text)


def test_axes_of_another_number():
    with pytest.raises(SpecError, match="1 axes for the 2 dimensions"):
        parse_axes("a", (2, 3))
    with pytest.raises(SpecError, match="has 1 dimensions, no more axes are due, but found 'b'"):
        parse_axes("a b", (2,))


@pytest.mark.parametrize("name", ["", " ", "a b", "7", ".", "a:b", "(", "x@y", "a|b", "p+q", '"', "k=v", "a·b", None])
def test_names_that_are_none(name):
    for make in (Ref, lambda n: Group(n, 2), lambda n: Label(n, a), lambda n: Family(n, (a,))):
        with pytest.raises(SpecError, match="cannot name"):
            make(name)


def test_nodes_check_themselves():
    for size in (-1, 2.0, True, "3"):
        with pytest.raises(SpecError, match="a size is an integer"):
            Fixed(size)
    with pytest.raises(SpecError, match="no members"):
        Family("s", ())
