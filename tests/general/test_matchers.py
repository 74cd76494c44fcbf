"""Matchers other than weight matching over general symmetries, and networks of different widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import permgraph as pg
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching.general.acting import Element
from permgraph.matching.general.gauge import Gauge
from permgraph.matching.general.relaxation import GeneralRelaxation
from permgraph.matching.problem.objective import Pair
from tests.general.whole_networks import NETWORKS, State, away, distance, inputs, network, output, spec_of

NAMES = tuple(NETWORKS)


def targets(name: str, state: State) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch whose targets are what a network computes."""
    return [(inputs(name), output(name, state))]


def midpoint_loss(name: str, a: State, b: State) -> float:
    return float(F.mse_loss(output(name, pg.interpolate(a, b, 0.5)), output(name, a)))


# --- Frank-Wolfe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_relaxed_objective_is_the_true_one_at_corners(name: str) -> None:
    """At an element's matrices the polynomial gives the inner product after that element; so rounding gives it back."""
    spec = spec_of(name).over_stacks()
    gauge = Gauge(spec, *(spec_of(name).stacked(network(name, seed).state_dict()) for seed in (1, 2)))
    relaxation = GeneralRelaxation(Pair(gauge.a, gauge.b), gauge.acting)
    for seed in range(3):
        element = gauge.element(spec.random(seed))
        corner = relaxation.corner_at(element)
        there = {n: gauge.acting.act(n, tensor, element) for n, tensor in gauge.b.items()}
        worth = sum(float((gauge.a[n] * tensor).sum()) for n, tensor in there.items())
        assert relaxation.value(corner) == pytest.approx(worth, abs=1e-9)
        rounded = relaxation.round_to_element(corner, "auto")
        again = {n: gauge.acting.act(n, tensor, rounded) for n, tensor in gauge.b.items()}
        assert all(torch.allclose(again[n], there[n], atol=1e-9) for n in there)


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_is_the_derivative(name: str) -> None:
    spec = spec_of(name).over_stacks()
    gauge = Gauge(spec, *(spec_of(name).stacked(network(name, seed).state_dict()) for seed in (1, 2)))
    relaxation = GeneralRelaxation(Pair(gauge.a, gauge.b), gauge.acting)
    here = relaxation.corner_at(gauge.element(spec.random(0)))
    way = {n: torch.randn(m.shape, generator=torch.Generator().manual_seed(3), dtype=m.dtype) for n, m in here.items()}
    _, slope = relaxation.value_and_slope(here)
    step = 1e-6
    ahead, behind = (relaxation.value({n: m + s * way[n] for n, m in here.items()}) for s in (step, -step))
    along = sum(float((slope[n] * way[n]).sum()) for n in here)
    assert along == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_best_corner_is_the_best(name: str) -> None:
    """No element is worth more in the direction of the slope than the corner that is chosen."""
    spec = spec_of(name).over_stacks()
    gauge = Gauge(spec, *(spec_of(name).stacked(network(name, seed).state_dict()) for seed in (1, 2)))
    relaxation = GeneralRelaxation(Pair(gauge.a, gauge.b), gauge.acting)
    _, slope = relaxation.value_and_slope(relaxation.corner_at(Element()))
    best = relaxation.best_corner(slope, "auto", relaxation.identity())
    for seed in range(20):
        other = relaxation.corner_at(gauge.element(spec.random(seed)))
        for group in slope:
            gain = float((slope[group] * (best[group] - other[group])).sum())
            assert gain >= -1e-9 * float(slope[group].abs().sum()), group


@pytest.mark.parametrize("polish", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_frank_wolfe_climbs_and_keeps_the_function(name: str, polish: bool) -> None:
    a, b = network(name, 1).state_dict(), network(name, 2).state_dict()
    fit = pg.align(a, b, pg.FrankWolfe(polish=polish), spec=spec_of(name))
    assert fit.transformation is not None and fit.permutation == fit.transformation.permutation
    assert away(name, b, fit.state_dict) < 1e-9
    assert fit.objective >= fit.objective_before
    relaxed = [sweep.objective for sweep in fit.history[: int(fit.details["steps"])]]
    assert relaxed == sorted(relaxed)
    if polish:
        weights = pg.align(a, b, spec=spec_of(name))
        assert fit.objective >= weights.objective - 1e-9 * abs(weights.objective)


@pytest.mark.parametrize("init", ["identity", "transformation", "permutation"])
def test_frank_wolfe_begins_where_it_is_told(init: str) -> None:
    a, b = network("llama", 1).state_dict(), network("llama", 2).state_dict()
    spec = spec_of("llama")
    start = {"identity": "identity", "transformation": spec.random(1), "permutation": spec.permutations().random(1)}
    given = start[init]
    fit = pg.align(a, b, pg.FrankWolfe(init=given, max_steps=0, polish=False), spec=spec)
    gauge = Gauge(spec, a, b)
    element = gauge.element(given) if isinstance(given, pg.Transformation) else Element()
    there = {n: gauge.acting.act(n, tensor, element) for n, tensor in gauge.b.items()}
    worth = sum(float((gauge.a[n] * tensor).sum()) for n, tensor in there.items())
    if init != "permutation":
        assert fit.details["relaxed" if init == "identity" else "rounded"] == pytest.approx(
            worth, rel=1e-9
        ) or fit.details["rounded"] == pytest.approx(worth, rel=1e-9)
    assert fit.objective >= fit.objective_before
    assert away("llama", b, fit.state_dict) < 1e-9


def test_too_many_signs_for_frank_wolfe_are_refused() -> None:
    class Deep(nn.Module):
        """Norms on the branches, each of which gives the stream a sign more."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
            self.before, self.norms = (nn.ModuleList(nn.LayerNorm(4) for _ in range(6)) for _ in range(2))
            self.last = nn.LayerNorm(4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            for layer, before, norm in zip(self.layers, self.before, self.norms, strict=True):
                x = x + norm(layer(before(x)))
            return self.head(self.last(x))

    a, b = Deep(), Deep()
    spec = pg.auto_spec(a, (torch.zeros(2, 3, dtype=torch.long),), symmetry="general")
    assert max(g.structure.signs + g.structure.flips for g in spec.groups.values()) > 10
    with pytest.raises(PermgraphError, match=r"has \d+ signs for each index.*take WeightMatching"):
        pg.align(a.state_dict(), b.state_dict(), pg.FrankWolfe(), spec=spec)


# --- permutations on top of what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["straight through", "midpoint", "l2"])
def test_permutations_on_top_keep_the_function_and_are_measured_there(name: str, kind: str) -> None:
    """The loss at the midpoint that is reported is that between A as it is and the result."""
    a, b = network(name, 1), network(name, 2)
    data = targets(name, a.state_dict())
    matcher = {
        "straight through": pg.StraightThrough(data, F.mse_loss, epochs=2),
        "midpoint": pg.Sinkhorn("midpoint", data, F.mse_loss, steps=20),
        "l2": pg.Sinkhorn(steps=20),
    }[kind]
    fit = pg.align(a, b, matcher, spec=spec_of(name))
    assert fit.transformation is not None
    assert away(name, b.state_dict(), fit.state_dict) < 1e-9
    assert fit.objective >= fit.objective_before
    plain = pg.align(a, b, spec=spec_of(name))
    if kind != "l2" and name != "normed mlp":  # which is run by the statistics of the batch in between
        assert -fit.objective == pytest.approx(midpoint_loss(name, a.state_dict(), fit.state_dict), rel=1e-6)
        kept = midpoint_loss(name, a.state_dict(), plain.state_dict)
        assert -fit.objective_before == pytest.approx(kept, rel=1e-6)
    assert any("permutations" in note for note in fit.notes)


def test_an_element_that_is_given_is_kept() -> None:
    a, b = network("vit", 1).state_dict(), network("vit", 2).state_dict()
    spec = spec_of("vit")
    start = pg.align(a, b, spec=spec).transformation
    fit = pg.align(a, b, pg.Sinkhorn(init=start, steps=0, matcher=None), spec=spec)
    assert fit.transformation is not None and start is not None
    for group, matrices in fit.transformation.matrices.items():
        if group == "patch":  # of the stream, above which no permutation is
            assert np.allclose(matrices, start.matrices[group])
    assert all(torch.allclose(fit.state_dict[k], start.apply(b)[k], atol=1e-9) for k in b)


def test_an_element_of_another_spec_is_refused() -> None:
    a, b = network("vit", 1).state_dict(), network("vit", 2).state_dict()
    other = spec_of("bert").identity()
    for matcher in (pg.Sinkhorn(init=other), pg.FrankWolfe(init=other), pg.WeightMatching(init=other)):
        with pytest.raises(MismatchError, match="init is a transformation of another spec"):
            pg.align(a, b, matcher, spec=spec_of("vit"))
    with pytest.raises(MismatchError, match="init is a transformation of another spec"):
        pg.align(a, b, pg.Sinkhorn(init=other), spec=spec_of("vit").permutations())


# --- widths -----------------------------------------------------------------------------------------------------------


class Stream(nn.Module):
    """Attention and units on a stream between norms, all of whose widths can be chosen."""

    def __init__(self, width: int, heads: int, inner: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.enter, self.head, self.last = nn.Linear(5, width), nn.Linear(width, 3), norm(width, eps=1e-2)
        self.norm1, self.norm2 = norm(width, eps=1e-2), norm(width, eps=1e-2)
        self.q, self.k, self.v = (nn.Linear(width, heads * 4) for _ in range(3))
        self.o, self.up, self.down = nn.Linear(heads * 4, width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        y = self.norm1(x)
        q, k, v = (f(y).view(*y.shape[:2], self.heads, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.last(x + self.down(torch.relu(self.up(self.norm2(x))))))


def of_widths(seed: int, *widths: int, norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(seed)
    model = Stream(*widths, norm).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [((12, 3, 9), (8, 2, 7)), ((8, 2, 7), (12, 3, 9)), ((12, 2, 7), (8, 3, 9)), ((8, 2, 9), (8, 3, 9))],
)
def test_what_is_embedded_in_wider_groups_computes_the_same(
    of_a: tuple[int, ...], of_b: tuple[int, ...], norm: type[nn.Module]
) -> None:
    """To rounding, with a large eps in the norms: a stream that grows with the root of its width keeps its mean."""
    a, b = of_widths(1, *of_a, norm=norm), of_widths(2, *of_b, norm=norm)
    x = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    specs = [pg.auto_spec(model, (x,), symmetry="general") for model in (a, b)]
    found = pg.match_widths(a.state_dict(), b.state_dict(), *specs)
    wide = of_widths(0, *map(max, of_a, of_b), norm=norm)
    wide.load_state_dict(found.state_dict)
    assert torch.allclose(wide(x), b(x), atol=1e-9)
    assert found.result.objective > found.result.objective_before
    grown = (of_a[0] / of_b[0]) ** 0.5
    assert found.factors == ({"enter": pytest.approx(grown)} if of_a[0] > of_b[0] else {})
    if of_a[0] >= of_b[0]:
        assert torch.allclose(found.state_dict["norm1.weight"], a.state_dict()["norm1.weight"])


def test_a_network_is_found_within_a_wider_one() -> None:
    """A narrow network, embedded by a random isometry beside new units, is matched to itself."""
    narrow = of_widths(1, 8, 2, 7, norm=nn.RMSNorm)
    wide = of_widths(2, 12, 3, 9, norm=nn.RMSNorm)
    x = torch.zeros(2, 5, 5, dtype=torch.float64)
    specs = [pg.auto_spec(model, (x,), symmetry="general") for model in (wide, narrow)]
    embedded = pg.match_widths(wide.state_dict(), narrow.state_dict(), *specs)
    turned = specs[0].random(5).apply(embedded.state_dict)  # the narrow one, in the wide one's shapes, anywhere
    again = pg.match_widths(turned, narrow.state_dict(), *specs)
    wide.load_state_dict(turned)
    aligned = of_widths(0, 12, 3, 9, norm=nn.RMSNorm)
    aligned.load_state_dict(again.state_dict)
    size = distance(turned, {name: torch.zeros_like(tensor) for name, tensor in turned.items()})
    assert distance(turned, again.state_dict) < 1e-4 * size


def test_squares_that_are_summed_keep_their_size() -> None:
    class Cosine(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(5, width), nn.Linear(width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.normalize(self.enter(x), dim=-1))

    torch.manual_seed(0)
    a, b = Cosine(9).double(), Cosine(6).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    specs = [pg.auto_spec(model, (x,), symmetry="general") for model in (a, b)]
    assert specs[0].groups["enter"].structure.linear == "O"
    found = pg.match_widths(a.state_dict(), b.state_dict(), *specs)
    wide = Cosine(9).double()
    wide.load_state_dict(found.state_dict)
    assert found.factors == {"enter": 1.0} and torch.allclose(wide(x), b(x), atol=1e-9)
    with pytest.raises(PermgraphError, match="unknown norms"):
        pg.match_widths(a.state_dict(), b.state_dict(), *specs, norms="median")  # type: ignore[arg-type]


def test_general_symmetries_and_permutations_do_not_meet() -> None:
    a, b = of_widths(1, 8, 2, 7, norm=nn.RMSNorm), of_widths(2, 12, 3, 9, norm=nn.RMSNorm)
    x = torch.zeros(2, 5, 5, dtype=torch.float64)
    first, second = (pg.auto_spec(model, (x,), symmetry="general") for model in (a, b))
    with pytest.raises(MismatchError, match="permutations alone"):
        pg.match_widths(a.state_dict(), b.state_dict(), first, second.permutations())
