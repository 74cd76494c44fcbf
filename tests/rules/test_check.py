"""The checker itself: it must tell a wrong rule from a right one, and leave the caller's things alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import permgraph as pg
from permgraph.rules import Call, registry, rule
from permgraph.verification.trial_of_rule import canonical

aten = torch.ops.aten


@pytest.fixture
def restored() -> Iterator[None]:
    """The table of rules as it was."""
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_right_rule() -> None:
    report = pg.check_rule(aten.addmm.default, _normal(5), _normal(2, 3), _normal(3, 5))
    assert report.passed
    assert report.matches("(o), (m k), (k o) -> (m o)")
    assert not report.matches("(o), (m k), (k o) -> (o m)")
    assert str(report) == "aten.addmm.default: (a), (b c), (c a) -> (b a): ok\n  acts: a GL · c GL"


@pytest.mark.usefixtures("restored")
def test_a_tie_that_is_missing() -> None:
    @rule("aten.addmm")
    def _(call: Call) -> None:
        call.link((call["mat1"], "m k"), (call["mat2"], "k o"), (call.out, "m o"))

    report = pg.check_rule(aten.addmm.default, _normal(5), _normal(2, 3), _normal(3, 5))
    assert report.verdict == "incorrect"
    assert report.max_error > 0.1
    assert any("dimension 0 of input0" in problem for problem in report.problems)


@pytest.mark.usefixtures("restored")
def test_a_fibre_that_should_not_be() -> None:
    @rule("aten._softmax")
    def _(call: Call) -> None:
        call.pointwise(call["self"], call.out)

    report = pg.check_rule(aten._softmax.default, _normal(5, 2), 1, False)
    assert report.verdict == "incorrect"
    assert "moving dimension" in report.problems[0]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("pattern", ["m! k", "m k!"])
def test_a_pin_too_many(pattern: str) -> None:
    @rule("aten.mm")
    def _(call: Call) -> None:
        call.link((call["self"], pattern), (call["mat2"], "k o"), (call.out, "m o"), why="for no reason")

    report = pg.check_rule(aten.mm.default, _normal(2, 3), _normal(3, 5))
    assert report.verdict == "too strict"
    assert "may be exchanged" in report.problems[0]


@pytest.mark.usefixtures("restored")
def test_a_tie_too_many() -> None:
    @rule("aten.bmm")
    def _(call: Call) -> None:
        call.link((call["self"], "b m k"), (call["mat2"], "b k o"), (call.out, "b m o"))
        call.link((call["self"], "_ s _"), (call["mat2"], "_ _ s"), (call.out, "_ s s2"))

    report = pg.check_rule(aten.bmm.default, _normal(2, 3, 5), _normal(2, 5, 3))
    assert report.verdict == "too strict"


@pytest.mark.usefixtures("restored")
def test_a_fibre_too_many() -> None:
    """What is said where a tensor inside the operator was forgotten, and only there."""

    @rule("aten.cummax")
    def _(call: Call) -> None:
        call.link((call["self"], "n l!"), *((out, "n l!") for out in call.results), why="its order matters")

    report = pg.check_rule(lambda x: x.cummax(1).values, _normal(3, 5))
    assert report.verdict == "incorrect"
    assert "otherwise at each index of dimension 1 of input0, but not if it is done alike" in report.problems[0]

    @rule("aten.cummax")
    def _(call: Call) -> None:
        call.link((call["self"], "n l"), *((out, "n l") for out in call.results))

    report = pg.check_rule(lambda x: x.cummax(1).values, _normal(3, 5))
    assert report.verdict == "incorrect"
    assert "via=" not in str(report)


@pytest.mark.usefixtures("restored")
def test_an_argument_that_is_not_in_the_schema() -> None:
    @rule("aten.relu")
    def _(call: Call) -> None:
        call.pointwise(call["x"], call.out)

    with pytest.raises(pg.errors.ConflictError, match="there is no argument 'x'; the schema has self"):
        pg.check_rule(aten.relu.default, _normal(3))


@pytest.mark.usefixtures("restored")
def test_a_fibre_that_is_missing() -> None:
    @rule("aten.bmm")
    def _(call: Call) -> None:
        call.link((call["self"], "b m k"), (call["mat2"], "b k o"), (call.out, "b m o"), via=["m", "k", "o"])

    report = pg.check_rule(aten.bmm.default, _normal(2, 3, 5), _normal(2, 5, 7))
    assert report.verdict == "too strict"
    assert "at one index" in report.problems[0]


@pytest.mark.usefixtures("restored")
def test_values_of_an_index_are_acted_upon() -> None:
    @rule("aten.argmax")
    def _(call: Call) -> None:
        call.link((call["self"], "a b"), (call.out, "a"))

    report = pg.check_rule(aten.argmax.default, _normal(3, 7), 1)
    assert report.verdict == "incorrect"


def test_an_operator_without_a_rule() -> None:
    report = pg.check_rule(aten.linalg_ldl_factor_ex.default, torch.eye(3).double())
    assert report.verdict == "no rule"
    assert report.problems[0] == "there is no rule for aten.linalg_ldl_factor_ex.default"


def test_a_function_of_operators() -> None:
    report = pg.check_rule(lambda x, s: x.gather(1, s.topk(3, 1).indices), _normal(2, 5), _normal(2, 5) ** 3)
    assert report.passed, str(report)
    assert report.operators == ("aten.topk.default", "aten.gather.default")


def test_sizes_that_do_not_fit_are_refused() -> None:
    @rule("permgraph_check.first_two")
    def _(call: Call) -> None:
        call.link((call.tensors[0], "a a2"), (call.out, "a2"))

    library = torch.library.Library("permgraph_check", "DEF")
    library.define("first_two(Tensor x) -> Tensor")
    library.impl("first_two", lambda x: x.sum(1), "CompositeExplicitAutograd")
    with pytest.raises(pg.errors.ConflictError, match=r"permgraph_check\.first_two.*\(2, 3\).*cannot tie"):
        pg.check_rule(torch.ops.permgraph_check.first_two.default, _normal(2, 3))


def test_nothing_of_the_callers_changes() -> None:
    x, y = _normal(2, 3), _normal(2, 3)
    kept, state = x.clone(), torch.get_rng_state()
    report = pg.check_rule(aten.add_.Tensor, x, y)
    pg.check_rule(aten.randn_like.default, x)
    assert report.passed
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_are_compared_up_to_names() -> None:
    assert canonical("(n c), (c) -> (n c) where n per c") == canonical("(x k), (k) -> (x k) where x per k")
    assert canonical("(a b) -> (b)") != canonical("(a b) -> (a)")
    assert canonical("(a b c) where c per a b, b per a") == canonical("(a b c) where b per a, c per b a")
    assert canonical("(a! b) where b per a!") == canonical("(h! d) where d per h!")
    assert canonical("(s:[a + b] {c | d}@s)") == canonical("(t:[w + x] {y | z}@t)")
    assert canonical("(s:[a + b] {c | d}@s)") != canonical("(t:[w + x] {y | y}@t)")
