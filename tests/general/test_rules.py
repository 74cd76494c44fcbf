"""What rules declare with `acts=`: no more passes than is declared; that it passes is part of every rule's test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._ops import OpOverload

import permgraph as pg
from permgraph.rules.properties import Properties
from permgraph.rules.registry import _rules, list_rules, properties_of, rule, rule_name
from permgraph.verification.example import Example
from permgraph.verification.examples import EXAMPLES

#: Of these more passes than is declared.
LESS = {
    "aten.copy": "what was there before no longer matters",
    "aten.native_dropout": "its mask is constant in evaluation mode",
    "aten.constant_pad_nd": "the number around it is not zero in the example, but scales of the rest pass",
    "aten.index_copy": "what is overwritten no longer matters",
    "aten.slice_scatter": "what is overwritten no longer matters",
    "aten.select_scatter": "what is overwritten no longer matters",
    "aten.masked_fill": "an index at which nothing is filled in",
}


def _examples() -> list[Example]:
    """For each rule that declares how it acts, the first example that calls its operator alone and not in place."""
    found: dict[str, Example] = {}
    for case in EXAMPLES:
        if isinstance(case.op, OpOverload) and not str(case.op).split(".")[1].endswith("_"):
            key = rule_name(str(case.op))
            if key is not None and properties_of(str(case.op)).acts != "unknown":
                found.setdefault(key, case)
    return [case for key, case in found.items() if key not in LESS]


@pytest.mark.parametrize("case", _examples(), ids=lambda case: case.name.replace(" ", "-"))
def test_no_more_passes_than_is_declared(case: Example) -> None:
    report = case.check()
    assert report.beyond == (), str(report)


def test_most_rules_have_an_example_of_their_own() -> None:
    declaring = {entry.name for entry in list_rules("aten.*") if entry.properties.acts != "unknown"}
    tried = {rule_name(str(case.op)) for case in _examples()}
    assert len(declaring & tried) > 90


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "arguments", "wrong"),
    [
        ("gelu", (_random(11, 5),), "homogeneous"),
        ("tanh", (_random(11, 5),), "product"),
        ("relu", (_random(11, 5),), "odd"),
        ("cos", (_random(11, 5),), "odd"),
        ("abs", (_random(11, 5),), "product"),
        ("mul.Tensor", (_random(11, 5), _random(11, 5)), "sum"),
        ("add.Tensor", (_random(11, 5), _random(11, 5)), "product"),
        ("div.Tensor", (_random(11, 5), _random(11, 5)), "product"),
        ("_softmax", (_random(11, 5), -1, False), "product"),
        ("var.correction", (_random(11, 5), [1]), "norm"),
    ],
)
def test_a_declaration_that_is_wrong_is_found(
    name: str, arguments: tuple[object, ...], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = torch.ops.aten
    for part in name.split("."):
        operator = getattr(operator, part)
    assert pg.check_rule(operator, *arguments).passed
    key = rule_name(f"aten.{name}" if "." in name else f"aten.{name}.default")
    assert key is not None
    entry = _rules[key]
    monkeypatch.setitem(_rules, key, type(entry)(entry.name, entry.function, Properties(acts=wrong)))  # type: ignore[arg-type]
    report = pg.check_rule(operator, *arguments)
    assert report.verdict == "incorrect", str(report)


#: For each way to act what lets more pass, or something else: a rule that said so would be wrong.
LARGER: dict[str, tuple[str, ...]] = {
    "homogeneous": ("product", "odd"),
    "odd": ("product",),
    "even": ("odd", "product"),
    "sign": ("product", "absolute"),
    "absolute": ("product",),
    "square": ("product", "odd", "absolute"),
    "root": ("product", "odd"),
    "inverse root": ("product", "odd"),
    "reciprocal": ("product",),
    "power": ("product", "odd"),
    "slope": ("homogeneous", "product"),
    "clip": ("homogeneous", "odd", "product"),
    "norm": ("product",),
    "spread": ("norm", "product"),
    "rms norm": ("product",),
    "layer norm": ("rms norm", "product"),
    "group norm": ("product",),
    "batch norm": ("product",),
    "attention": ("product",),
    "gate": ("moved",),
    "quotient": ("product", "sum"),
    "choice": ("product",),
    "constant": ("zeros",),
    "sum": ("product",),
}
#: Rules of which no tensor of numbers is an argument, or no axis is there, on which it could show.
NO_AXIS = {"aten.scalar_tensor", "aten.where.Scalar"}


def _mutants() -> list[tuple[str, str, list[Example]]]:
    """A rule, what it says instead, and the examples of its operator."""
    cases: dict[str, list[Example]] = {}
    for case in EXAMPLES:
        key = rule_name(str(case.op)) if isinstance(case.op, OpOverload) else None
        if key is not None and key not in NO_AXIS:
            cases.setdefault(key, []).append(case)
    return [
        (key, wrong, found)
        for key, found in sorted(cases.items())
        for wrong in LARGER.get(_rules[key].properties.acts, ())
    ]


@pytest.mark.parametrize(
    ("key", "wrong", "cases"), _mutants(), ids=[f"{key} {wrong}".replace(" ", "-") for key, wrong, _ in _mutants()]
)
def test_each_rule_that_said_more_would_be_refused(
    key: str, wrong: str, cases: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = _rules[key]
    mutated = type(entry)(entry.name, entry.function, replace(entry.properties, acts=wrong))  # type: ignore[arg-type]
    monkeypatch.setitem(_rules, key, mutated)
    assert any(case.check().verdict == "incorrect" for case in cases)


def test_a_declaration_that_is_missing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _rules["aten.relu"]
    monkeypatch.setitem(_rules, "aten.relu", type(entry)(entry.name, entry.function, Properties()))
    report = pg.check_rule(torch.ops.aten.relu.default, _random(11, 5))
    assert report.passed and report.structures == ""
    assert [text.replace(" b,", " a,") for text in report.beyond] == [
        "1 independent scales pass on the axis a, of which 0 are declared"
    ]


def test_words_are_checked() -> None:
    with pytest.raises(ValueError, match="acts='linear' is none of"):
        rule("mylib.op", acts="linear")  # type: ignore[arg-type]
