"""Matching where whole modules change places: planted orders of experts, heads and branches come back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import MismatchError
from permgraph.matching import tuned
from permgraph.networks.stacked_module import StackedModule


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class Mixture(nn.Module):
    """Experts weighted by a softmax, between two linear layers."""

    def __init__(self, experts: int = 8, hidden: int = 16, width: int = 12) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(6, width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp(width, hidden) for _ in range(experts))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gates = self.router(x).softmax(-1)
        mixed = x
        for number, expert in enumerate(self.experts):
            mixed = mixed + gates[..., number : number + 1] * expert(x)
        return self.last(mixed)


class Heads(nn.Module):
    """Attention with a module for each head."""

    def __init__(self, heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(5, size) for name in ("q", "k", "v")}) for _ in range(heads)
        )
        self.out = nn.Linear(heads * size, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads = [(h["q"](x) @ h["k"](x).transpose(-1, -2)).softmax(-1) @ h["v"](x) for h in self.heads]
        return self.out(torch.cat(heads, -1))


class Nested(nn.Module):
    """Branches of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList(nn.ModuleList(mlp(5, 3) for _ in range(3)) for _ in range(2))
        self.after = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.tanh(f(sum(e(x) for e in o))) for f, o in zip(self.after, self.outer, strict=True))  # type: ignore[return-value,arg-type,misc]


class Norms(nn.Module):
    """Convolutional branches with BatchNorm, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)
        )
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([branch(x) for branch in self.branches], 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixture": (Mixture, (4, 6)),
    "heads": (Heads, (2, 6, 5)),
    "nested": (Nested, (4, 5)),
    "norms": (Norms, (2, 3, 8, 8)),
}

IMAGES = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))


def planted(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module, dict[str, Tensor], pg.PermutationSpec]:
    """A; A with noise, its modules and units in another order; A with noise; and the spec."""
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    a = build()
    spec = pg.auto_spec(a, (torch.randn(*shape),), modules=True)
    noisy = {
        key: value + 0.02 * value.std() * torch.randn_like(value) if value.numel() > 1 else value
        for key, value in a.state_dict().items()
    }
    b = build()
    b.load_state_dict(spec.random(seed + 1, every_group=True).apply(noisy))
    return a, b, noisy, spec


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "matcher", [pg.WeightMatching(), pg.FrankWolfe(), pg.Sinkhorn()], ids=lambda m: type(m).__name__
)
def test_planted_orders_come_back(name: str, matcher: pg.Matcher) -> None:
    a, b, noisy, spec = planted(name)
    fit = pg.align(a, b, matcher, spec=spec)
    assert same(fit.state_dict, noisy)
    assert fit.permutation.spec == spec
    with torch.no_grad():
        x = torch.randn(*MODELS[name][1])
        torch.testing.assert_close(fit.model().eval()(x), b.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_every_planted_mixture_comes_back(seed: int) -> None:
    a, b, noisy, spec = planted("mixture", seed)
    assert same(pg.align(a, b, spec=spec).state_dict, noisy)


def test_without_modules_experts_stay() -> None:
    """The control: the spec without modules cannot put scrambled experts back."""
    a, b, noisy, spec = planted("mixture")
    plain = pg.auto_spec(a, (IMAGES[:4],))
    assert not same(pg.align(a, b, spec=plain).state_dict, noisy)
    assert spec.log_order() == pytest.approx(plain.log_order() + float(torch.lgamma(torch.tensor(9.0))), rel=1e-5)


def test_activations_bring_experts_back() -> None:
    a, b, noisy, spec = planted("mixture")
    fit = pg.align(a, b, pg.ActivationMatching([IMAGES]), spec=spec)
    assert same(fit.state_dict, noisy)


def test_straight_through_runs_on_modules_in_stacks() -> None:
    a, b, _, spec = planted("mixture")
    before = copy.deepcopy(b.state_dict())
    fit = pg.align(a, b, pg.StraightThrough([(IMAGES, LABELS)], epochs=1), spec=spec)
    assert fit.permutation.spec == spec and fit.objective >= fit.objective_before
    assert same(b.state_dict(), before)


def test_merge_of_copies_is_the_first() -> None:
    a, b, _, spec = planted("mixture")
    copies = [a.state_dict(), *(spec.random(s, every_group=True).apply(a.state_dict()) for s in (3, 4))]
    merged = pg.merge(copies, spec=spec)
    for key, value in a.state_dict().items():
        torch.testing.assert_close(merged.state_dict[key], value)
    assert all(p.spec == spec for p in merged.permutations)
    merged = pg.merge([a, b], spec=spec)
    assert merged.model()(IMAGES).shape == (64, 3)


def test_begins_where_it_is_told() -> None:
    a, b, noisy, spec = planted("mixture")
    found = pg.align(a, b, spec=spec).permutation
    again = pg.align(a, b, pg.WeightMatching(init=found, restarts=1), spec=spec)
    assert same(again.state_dict, noisy)
    with pytest.raises(MismatchError, match="init is a permutation of another spec"):
        pg.align(a, b, pg.WeightMatching(init=found), spec=pg.auto_spec(a, (IMAGES[:4],)))


def test_names_a_member_that_is_missing() -> None:
    a, b, _, spec = planted("mixture")
    state = {key: value for key, value in b.state_dict().items() if key != "experts.3.0.weight"}
    first = {key: value for key, value in a.state_dict().items() if key in state}
    with pytest.raises(MismatchError, match=r"no 'experts.3.0.weight', which changes places with others of 'experts"):
        pg.align(first, state, spec=spec)


def test_module_in_stacks_computes_the_same() -> None:
    model = Norms()
    spec = pg.auto_spec(model, (torch.randn(2, 3, 8, 8),), modules=True)
    inside = StackedModule(model, spec)
    assert {*inside.state_dict()} == {*spec.stacked(model.state_dict())}
    images = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(model).train()
    torch.testing.assert_close(inside.train()(images), expected(images))
    statistics = spec.unstacked(inside.state_dict())
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(statistics[key], value)
    inside(images).sum().backward()
    assert inside.get_parameter("branches.*.0.weight").grad is not None


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_likely_pairs_of_experts_are_as_good_as_all(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 72 experts, looking at the likely pairs alone ends where looking at all does."""
    spec = pg.PermutationSpec.parse(
        "up 72x16x24 e h d\ngate 72x16x24 e h d\ndown 72x24x16 e d h\nrouter 72x24 e d\nfirst 24x8 d .\n"
        "groups: e 72 · d 24 · h 16 per e"
    )
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}
    moved = spec.random(1, every_group=True)
    b = moved.apply({n: t + noise * torch.randn(t.shape, generator=generator) for n, t in a.items()})
    monkeypatch.setattr(tuned, "ALL_PRODUCTS", 0)
    few = pg.WeightMatching(restarts=1).match(a, b, spec)
    monkeypatch.setattr(tuned, "ALL_PAIRS", 72)
    every = pg.WeightMatching(restarts=1).match(a, b, spec)
    assert few.objective == pytest.approx(every.objective, rel=1e-6)
    np.testing.assert_array_equal(few.permutation.arrays["e"], moved.inverse().arrays["e"])
