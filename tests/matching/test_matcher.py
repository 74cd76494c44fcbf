"""The base class of matchers, matchers without it, and settings by their former names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.cli.options import MatcherName
from permgraph.errors import MismatchError, SpecError
from permgraph.matching import MATCHERS
from permgraph.matching.matcher import runs_networks
from tests.matching.examples import SPECS, planted

DATA = [(torch.randn(8, 4), torch.randint(2, (8,)))]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


class Plain:
    """A matcher of one's own, without the base."""

    def match(self, a: Any, b: Any, spec: pg.PermutationSpec, seed: int = 0, progress: Any = None) -> pg.MatchResult:
        return pg.WeightMatching().match(a, b, spec, seed, progress)


class Running(Plain):
    """One that runs the networks, and does not say so by `needs_models`."""

    models: tuple[nn.Module, nn.Module] | None = None

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> Running:
        new = Running()
        new.models = model_a, model_b
        return new

    def match(self, a: Any, b: Any, spec: pg.PermutationSpec, seed: int = 0, progress: Any = None) -> pg.MatchResult:
        assert self.models is not None
        return super().match(a, b, spec, seed, progress)


class Derived(pg.Matcher):
    """One with the base, and nothing more than it asks for."""

    def match(
        self,
        a: Mapping[str, torch.Tensor],
        b: Mapping[str, torch.Tensor],
        spec: pg.PermutationSpec,
        seed: int = 0,
        progress: Any = None,
    ) -> pg.MatchResult:
        self.require_fit(spec, a, b)
        return pg.WeightMatching().match(a, b, spec, seed, progress)


@pytest.mark.parametrize("matcher", [Plain(), Running(), Derived()])
def test_matchers_of_ones_own(matcher: Any) -> None:
    a, b = network(0), network(1)
    assert isinstance(matcher, pg.Matcher) and not isinstance(object(), pg.Matcher)
    expected = pg.align(a, b).permutation
    assert pg.align(a, b, matcher).permutation == expected
    assert len(pg.merge([a, b], pg.ToReference(matcher=matcher)).permutations) == 2
    assert runs_networks(matcher) is isinstance(matcher, Running)
    spec = pg.auto_spec(a)
    if isinstance(matcher, Running):
        with pytest.raises(MismatchError, match="Running runs the networks: give align"):
            pg.align(a.state_dict(), b.state_dict(), matcher, spec=spec)
        with pytest.raises(MismatchError, match="Running runs the networks: give merge"):
            pg.merge([a.state_dict(), b.state_dict()], pg.ToReference(matcher=matcher), spec=spec)
    else:
        pg.align(a.state_dict(), b.state_dict(), matcher, spec=spec)


def test_every_matcher_is_registered_with_its_base() -> None:
    for kind in MATCHERS.values():
        assert issubclass(kind, pg.Matcher) and dataclasses.is_dataclass(kind)
    assert {name.value for name in MatcherName} == set(MATCHERS) - {"streamed"}  # which --stream asks for


@pytest.mark.parametrize("method", [pg.ToReference, pg.MergeMany])
def test_a_matcher_is_given_models_only_where_it_runs_them(method: Any) -> None:
    a, b = network(0), network(1)
    states, spec = [a.state_dict(), b.state_dict()], pg.auto_spec(a)
    pg.merge(states, method(matcher=pg.Sinkhorn(steps=2)), spec=spec)
    with pytest.raises(MismatchError, match="Sinkhorn runs the networks"):
        pg.merge(states, method(matcher=pg.Sinkhorn("midpoint", DATA, steps=2)), spec=spec)
    pg.merge([a, b], method(matcher=pg.Sinkhorn("midpoint", DATA, steps=2)))


def test_the_alignment_has_what_the_matcher_reported() -> None:
    fit = pg.align(network(0), network(1))
    assert isinstance(fit, pg.MatchResult)
    for field in dataclasses.fields(fit.result):
        assert getattr(fit.result, field.name) is getattr(fit, field.name)


FORMER = [
    (pg.FrankWolfe, "ascent", "matcher", pg.WeightMatching(max_sweeps=3)),
    (pg.Sinkhorn, "ascent", "matcher", None),
    (pg.Sinkhorn, "measured_batches", "max_batches", 3),
    (lambda **settings: pg.ActivationMatching(DATA, **settings), "ascent", "matcher", pg.WeightMatching(max_sweeps=3)),
    (lambda **settings: pg.StraightThrough(DATA, **settings), "projection", "matcher", pg.WeightMatching(max_sweeps=3)),
    (lambda **settings: pg.StraightThrough(DATA, **settings), "start", "free_weights", "b"),
    (lambda **settings: pg.StraightThrough(DATA, **settings), "measured_batches", "max_batches", 3),
    (pg.CycleConsistent, "start", "init", "identity"),
    (pg.CycleConsistent, "ascent", "matcher", pg.WeightMatching(max_sweeps=3)),
    (pg.FrankWolfeMany, "ascent", "matcher", pg.WeightMatching(max_sweeps=3)),
]


@pytest.mark.parametrize(
    ("make", "old", "new", "value"), FORMER, ids=[f"{at}-{row[1]}" for at, row in enumerate(FORMER)]
)
def test_former_names_are_taken_with_a_warning(make: Any, old: str, new: str, value: Any) -> None:
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'"):
        made = make(**{old: value})
    assert made == make(**{new: value})
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'"):
        assert getattr(made, old) == value
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert dataclasses.replace(make(), **{old: value}) == made


def test_functions_take_former_names_too() -> None:
    a, b = network(0), network(1)
    curve = pg.fit_curve(a, b, DATA, epochs=0)
    with pytest.warns(DeprecationWarning, match="fit_curve: 'start' is now called 'init'"):
        assert len(pg.fit_curve(a, b, DATA, start=curve, epochs=0).points) == 3
    with pytest.warns(DeprecationWarning, match="fit_star: 'start' is now called 'init'"):
        centre = pg.fit_star([a, b], DATA, start=a, epochs=0)
    assert all(torch.equal(centre.state_dict[name], tensor) for name, tensor in a.state_dict().items())


def test_complex_networks_are_merged() -> None:
    spec = SPECS["mlp"]
    real, imaginary = planted(spec, 0), planted(spec, 5)
    a = {name: torch.complex(real[0][name], imaginary[0][name]) for name in real[0]}
    copies = [a, *(spec.random(seed).apply(a) for seed in (1, 2))]
    for method in (pg.CycleConsistent(), pg.MergeMany(), pg.ToReference(), pg.FrankWolfeMany(), pg.Joining()):
        merged = pg.merge(copies, method, spec=spec)
        back = merged.permutations[0].inverse().apply(merged.state_dict)
        assert all(torch.allclose(back[name], tensor, atol=1e-5) for name, tensor in a.items())
        square = sum(float(tensor.abs().square().sum()) for tensor in a.values())
        assert merged.objective == pytest.approx(3 * square, rel=1e-5)


@pytest.mark.parametrize("given", [dict(groups=[1], axes={}), dict(groups={}, axes=["w"])])
def test_a_spec_wants_mappings(given: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="must be a mapping from names, not a list"):
        pg.PermutationSpec(**given)


def test_specs_of_the_same_permutations_have_one_fingerprint() -> None:
    first, second = (
        pg.PermutationSpec.parse(f"w 12x3 {axis} .\nv 7 {part}\ngroups: h 2")
        for axis, part in (("(2 3 h)", "[h + 2 + 3]"), ("(6 h)", "[h + 5]"))
    )
    assert first.fingerprint == second.fingerprint and str(first) == str(second)
    turned = pg.PermutationSpec.parse("w 12x3 (6 g) .\nv 7 [g + 5]\ngroups: g 2")
    assert turned.fingerprint != second.fingerprint  # a name is part of it
