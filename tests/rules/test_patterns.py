"""The label language: what it reads, and a sentence for each mistake, with the pattern and the shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import permgraph as pg
from permgraph.rules import registry, rule
from permgraph.rules.pattern import fit, last_labels, parse_pattern

library = torch.library.Library("permgraph_patterns", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")


@pytest.fixture(autouse=True)
def _restored():  # type: ignore[no-untyped-def]
    """The table of rules as it was."""
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


def _check(pattern: str, shape: tuple[int, ...] = (6, 10), **how: Any) -> pg.RuleReport:
    """A rule that says this of its argument and of its result."""

    @rule("permgraph_patterns.twice")
    def _(call: Any) -> None:
        call.link((call["x"], pattern), (call.out, pattern), **how)

    return pg.check_rule(torch.ops.permgraph_patterns.twice.default, torch.randn(shape, dtype=torch.float64))


def test_what_it_reads() -> None:
    assert parse_pattern("b (g i!) _ ... ; e") == ((("b",), ("g", "i!"), ("_",), ("...",)), "e")
    (fitted,) = fit((("... (g i) c!", (2, 3, 10, 7)),), (), (("g", 5),), True)
    assert [[(f.label, f.size) for f in dim] for dim in fitted.dims] == [
        [("*1", 2)], [("*0", 3)], [("g", 5), ("i", 2)], [("c", 7)],
    ]  # fmt: skip
    assert [f.stays for dim in fitted.dims for f in dim] == [False, False, False, False, True]


@pytest.mark.parametrize("pattern", ["a ...", "... a", "a b ...", "... a b", "a ... b"])
def test_an_ellipsis_may_stand_anywhere(pattern: str) -> None:
    assert _check(pattern).passed


MISTAKES = [
    ("b (g i", {"g": 2}, r"'b \(g i' opens a bracket that it does not close"),
    ("b g)", {}, r"'b g\)' closes a bracket that it has not opened"),
    ("b (g (i j))", {"g": 2}, r"'b \(g \(i j\)\)' has a bracket inside a bracket"),
    ("b ()", {}, r"'b \(\)' has a bracket with nothing in it"),
    ("b (... g)", {}, r"'b \(\.\.\. g\)' has '\.\.\.' inside a bracket"),
    ("b b", {}, "'b b' has the label 'b' twice"),
    ("b (g b)", {"g": 2}, r"'b \(g b\)' has the label 'b' twice"),
    ("b c! ; c", {"why": "so"}, "'b c! ; c' has the label 'c' twice"),
    ("... ...", {}, r"'\.\.\. \.\.\.' has the label '\.\.\.' twice"),
    ("b c ;", {}, "'b c ;' needs one label after the semicolon"),
    ("b c ; d e", {}, "'b c ; d e' needs one label after the semicolon"),
    ("b c", {"q": 17}, r"a size is given for 'q', which is no label of 'b c' for shape \(6, 10\)"),
    ("b (g i)", {"groups": 2}, r"'b \(g i\)' for shape \(6, 10\) needs the sizes g= and i= but for one of them"),
    ("b (g i)", {"g": 4}, r"pattern 'b \(g i\)' for shape \(6, 10\) makes a dimension of 10 a product with g=4"),
    ("b (g i)", {"g": 2, "i": 3}, r"'b \(g i\)' for shape \(6, 10\) makes a dimension of 10 a product with g=2, i=3"),
    ("b c!", {}, r"why= is missing beside 'b c!' for shape \(6, 10\)"),
    ("b", {}, r"pattern 'b' does not fit shape \(6, 10\): it has labels for 1 dimensions"),
    ("a b c ...", {}, r"pattern 'a b c \.\.\.' does not fit shape \(6, 10\)"),
    ("b c", {"via": ["d"]}, r"via='d' has the label 'd', which is none of 'b c' for shape \(6, 10\)"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "how", "message"), MISTAKES, ids=[f"{p} {h}" for p, h, _ in MISTAKES])
def test_a_sentence_for_each_mistake(pattern: str, how: dict[str, Any], message: str) -> None:
    with pytest.raises(pg.errors.PermgraphError, match=message) as caught:
        _check(pattern, **how)
    assert "permgraph_patterns.twice" in str(caught.value)
    assert "(6, 10)" in str(caught.value)


def test_results_and_numbers_that_are_not_there() -> None:
    library.define("nothing(Tensor x, str name) -> ()")
    library.impl("nothing", lambda x, name: None, "CompositeExplicitAutograd")
    operator = torch.ops.permgraph_patterns.nothing.default
    rule("permgraph_patterns.nothing")(lambda call: call.out)
    with pytest.raises(pg.errors.ConflictError, match=r"permgraph_patterns\.nothing.*gives no tensor"):
        pg.check_rule(operator, torch.randn(2), "x")
    rule("permgraph_patterns.nothing")(lambda call: call.dim(call["x"], "name"))
    with pytest.raises(pg.errors.ConflictError, match="no number as its argument 'name', but 'x'"):
        pg.check_rule(operator, torch.randn(2), "x")


def test_the_last_labels() -> None:
    class Flat:
        ndim = 2

    assert last_labels("a (b r) c", Flat()) == "(b r) c"  # type: ignore[arg-type]
