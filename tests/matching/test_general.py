"""Matching over general symmetries: each structure's best element, the common gauge, what comes back, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import permgraph as pg
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError, PermgraphError
from permgraph.matching import align
from permgraph.matching.general import ascent, weights
from permgraph.matching.general.acting import Acting, Element, composed
from permgraph.matching.general.ascent import Climb
from permgraph.matching.general.balancing import balance
from permgraph.matching.general.compact import best_element, best_value
from permgraph.matching.general.gauge import Gauge
from permgraph.matching.general.polar import polar
from permgraph.matching.problem.moves import Plan
from permgraph.structures import Structure, random_element
from tests.general import models

State = dict[str, Tensor]


class Decoder(nn.Module):
    """A stream between RMSNorms, with rotary heads that share keys and values, and gated units."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(23, 12), nn.Linear(12, 23, bias=False)
        self.norm1, self.norm2, self.norm3 = (models.Rms(12) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(12, n, bias=False) for n in (24, 12, 12))
        self.o, self.down = nn.Linear(24, 12, bias=False), nn.Linear(9, 12, bias=False)
        self.gate, self.up = (nn.Linear(12, 9, bias=False) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        b, t, _ = x.shape
        angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.3, 0.1]).repeat(2)
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, -1, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (z * angle.cos() + torch.cat([-z[..., 3:], z[..., :3]], -1) * angle.sin() for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm3(x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "relu": (lambda: models.mlp(nn.ReLU()), models.vectors),
    "tanh": (lambda: models.mlp(nn.Tanh()), models.vectors),
    "gated": (lambda: models.Gated(F.silu), models.vectors),
    "adapter": (models.LowRank, lambda: torch.randn(40, 5)),
    "heads": (lambda: models.Attention(3), lambda: models.sequences(11)),
    "before LayerNorm": (lambda: models.Residual(nn.LayerNorm), models.tokens),
    "after LayerNorm": (lambda: models.Residual(nn.LayerNorm, "after"), models.tokens),
    "gains of one more": (lambda: models.Residual(lambda n: models.Rms(n, 1.0)), models.tokens),
    "decoder": (Decoder, lambda: torch.arange(20).reshape(2, 10)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, pg.PermutationSpec, Tensor]:
    build, inputs = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        x = inputs()
    x = x.double() if x.is_floating_point() else x
    return model, pg.auto_spec(model, (x,), symmetry="general"), x


def _noisy(state: State, spec: pg.PermutationSpec, share: float, seed: int) -> State:
    random = torch.Generator().manual_seed(seed)
    return {
        name: w + share * w.std(correction=0) * torch.randn(w.shape, generator=random, dtype=w.dtype)
        if name in spec.axes
        else w
        for name, w in state.items()
    }


def _far(a: State, b: State, spec: pg.PermutationSpec) -> float:
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in spec.axes)) ** 0.5


def _outputs(model: nn.Module, state: State, x: Tensor) -> Tensor:
    found = torch.func.functional_call(model, state, (x,))
    return found.detach()


# --- what comes back --------------------------------------------------------------------------------------------------


def test_a_planted_element_comes_back(network: tuple[nn.Module, pg.PermutationSpec, Tensor]) -> None:
    """The noise itself moves the best element a little towards A, never away: the distance is that of the noise."""
    model, spec, x = network
    a = {name: w.detach() for name, w in model.state_dict().items()}
    for seed in range(2):
        noisy = _noisy(a, spec, 0.02, seed)
        b = spec.random(seed, every_group=True).apply(noisy)
        fit = align(a, b, spec=spec)
        assert _far(a, fit.state_dict, spec) <= 1.05 * _far(a, noisy, spec)
        before, after = _outputs(model, b, x), _outputs(model, fit.state_dict, x)
        assert float((before - after).abs().max() / before.abs().max()) < 1e-9
        assert fit.transformation is not None
        again = fit.transformation.apply(b)
        assert all(torch.equal(again[name], fit.state_dict[name]) for name in a)


def test_any_two_networks_keep_their_functions(network: tuple[nn.Module, pg.PermutationSpec, Tensor]) -> None:
    model, spec, x = network
    a = {name: w.detach() for name, w in model.state_dict().items()}
    b = {
        n: w + 0.5 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5), dtype=w.dtype)
        for n, w in a.items()
    }
    fit = align(a, b, spec=spec)
    before, after = _outputs(model, b, x), _outputs(model, fit.state_dict, x)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-9
    assert fit.objective >= fit.objective_before - 1e-9
    for sweeps in fit.history, fit.history[1:]:
        values = [sweep.objective for sweep in sweeps]
        assert len(values) < 3 or values[1:] == sorted(values[1:])
    for name in spec.general_gains:  # A's own gains
        assert torch.allclose(fit.state_dict[name], a[name], atol=1e-12)


def test_more_structures_are_worth_more() -> None:
    """What permutations alone leave, in the same gauge, is never better than what the whole group does."""
    torch.manual_seed(1)
    a, b = (models.Residual(nn.LayerNorm).double().eval() for _ in range(2))
    spec = pg.auto_spec(a, (models.tokens(),), symmetry="general")
    only = align(a, b, spec=spec.permutations())
    whole = align(a, b, spec=spec)
    gauge = Gauge(spec, a.state_dict(), only.state_dict)
    plain = sum(float((gauge.a[n] * gauge.b[n]).sum()) for n in gauge.a)
    assert whole.objective > plain


# --- the best element of each structure -------------------------------------------------------------------------------


def _elements(structure: Structure, n: int) -> list[np.ndarray]:
    found = []
    for order in itertools.permutations(range(n)):
        matrix = np.eye(n)[list(order)]
        signs = itertools.product((1, -1), repeat=n) if structure.signs else ((1,) * n,)
        for chosen in signs:
            for flip in (1, -1) if structure.flips else (1,):
                found.append(flip * np.array(chosen)[:, None] * matrix)
    return found


@pytest.mark.parametrize("text", ["S", "B", "S±", "M", "P"])
def test_the_best_of_all_permutations_with_signs(text: str) -> None:
    structure = Structure.parse(text)
    grams = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key = (1,) * (structure.signs + structure.flips)
    found = best_element(structure, {key: grams})
    for at, gram in enumerate(grams.numpy()):
        best = max(float((element * gram).sum()) for element in _elements(structure, 4))
        assert float(found.value[at]) == pytest.approx(best)
        assert found.array is not None
        element = np.eye(4)[found.array[at].numpy()]
        if found.signs is not None:
            element = found.signs[at].prod(-1).numpy()[:, None] * element
        assert float((element * gram).sum()) == pytest.approx(best)


def test_signs_count_where_they_act() -> None:
    """A gate has none of the signs of its units' values: the permutation must serve both."""
    random = torch.Generator().manual_seed(3)
    gate, values = (torch.randn(4, 4, generator=random, dtype=torch.float64) for _ in range(2))
    found = best_element(Structure.parse("M"), {(): gate, (1,): values})
    best = max(
        float((np.eye(4)[list(order)] * (gate + values.abs()).numpy()).sum())
        for order in itertools.permutations(range(4))
    )
    assert float(found.value) == pytest.approx(best)


@pytest.mark.parametrize("name", ["O", "O1", "T", "T2"])
def test_no_element_of_a_matrix_group_is_worth_more(name: str) -> None:
    gram = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    structure = Structure(name)
    found = best_element(structure, {(): gram})
    assert found.matrix is not None
    assert float((found.matrix * gram).sum()) == pytest.approx(float(found.value))
    assert float(best_value(structure, {(): gram})) == pytest.approx(float(found.value))
    generator = np.random.default_rng(0)
    for _ in range(200):
        other = random_element(name, 6, generator)
        if name in ("T", "T2"):  # the compact part: of size one
            other = other / np.linalg.norm(other, axis=-1, keepdims=True)
        assert float((other * gram.numpy()).sum()) <= float(found.value) + 1e-9
    assert np.allclose(found.matrix.numpy() @ found.matrix.numpy().T, np.eye(6))
    if name == "O1":
        assert np.allclose(np.abs(found.matrix.numpy().sum(-1)), 1)


def test_without_evidence_everything_stays() -> None:
    for text in ("S", "B", "O", "O1", "T"):
        found = best_element(Structure.parse(text), {(): torch.zeros(4, 4, dtype=torch.float64)})
        again = best_element(Structure.parse(text), {(): torch.zeros(4, 4, dtype=torch.float64)})
        for one, other in zip(found, again, strict=True):
            assert one is other is None or torch.equal(one, other)


# --- the common gauge -------------------------------------------------------------------------------------------------


def test_elements_as_tensors_act_as_transformations_do(network: tuple[nn.Module, pg.PermutationSpec, Tensor]) -> None:
    model, spec, _ = network
    state = {name: w.detach() for name, w in model.state_dict().items()}
    names = [name for name in spec.axes if name not in spec.general_gains]
    acting = Acting(spec, {name: state[name] for name in names})
    g, h = (spec.random(seed, every_group=True) for seed in range(2))
    g, h = (pg.Transformation(spec, t.permutation, t.matrices, t.scales, t.signs) for t in (g, h))  # gains at rest
    elements = [Element.of(t, "cpu", torch.float64) for t in (g, h)]
    both = composed(acting, elements[0], elements[1])
    moved, twice = g.apply(state), (g @ h).apply(state)
    for name in names:
        folded = acting.folded(name, state[name], state)
        assert torch.allclose(acting.unfolded(name, acting.act(name, folded, elements[0]), state), moved[name])
        assert torch.allclose(acting.unfolded(name, acting.act(name, folded, both), state), twice[name])
    back = elements[0].transformation(spec)
    assert all(torch.allclose(back.apply(state)[name], moved[name]) for name in state)


def test_balance_is_least_and_undone(network: tuple[nn.Module, pg.PermutationSpec, Tensor]) -> None:
    """No scale or invertible map makes balanced weights smaller, and where one begins does not matter."""
    model, spec, x = network
    sizes = []
    for start in (spec.identity(), spec.random(7, every_group=True)):
        state = start.apply({name: w.detach() for name, w in model.state_dict().items()})
        gauge = Gauge(spec, state, state)
        sizes.append(sum(float(w.square().sum()) for w in gauge.a.values()))
        generator = np.random.default_rng(0)
        for _ in range(5):
            near = spec.random(generator)
            logs = {n: np.exp(0.1 * np.log(scale)) for n, scale in near.scales.items()}
            nudge = Element.of(pg.Transformation(spec, spec.identity().permutation, {}, logs, {}), "cpu", torch.float64)
            for group, linear in ((g, spec.groups[g].structure.linear) for g in spec.acting):
                if linear == "GL":
                    n = spec.groups[group].size
                    step = np.eye(n) + 0.05 * generator.standard_normal((*gauge.acting.parents(group), n, n))
                    nudge.matrices[group] = torch.from_numpy(step)
            other = sum(float(gauge.acting.act(n, w, nudge).square().sum()) for n, w in gauge.a.items())
            assert other >= sizes[-1] * (1 - 1e-9)
        balanced = gauge.of_a.transformation(spec).apply(state)
        assert torch.allclose(_outputs(model, balanced, x), _outputs(model, state, x))
        again, _ = balance(gauge.acting, gauge.a)
        assert all(float((t - torch.eye(t.shape[-1])).abs().max()) < 1e-5 for t in again.matrices.values())
        assert all(float((t - 1).abs().max()) < 1e-5 for t in again.scales.values())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


# --- settings ---------------------------------------------------------------------------------------------------------


def _pair() -> tuple[State, State, pg.PermutationSpec]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = (models.Residual(nn.LayerNorm).double().eval() for _ in range(2))
    return a.state_dict(), b.state_dict(), pg.auto_spec(a, (models.tokens(),), symmetry="general")


def test_frozen_groups_stay() -> None:
    a, b, spec = _pair()
    stream = next(name for name, group in spec.groups.items() if group.structure.linear == "O1")
    fit = align(a, b, pg.WeightMatching(frozen=[stream]), spec=spec)
    assert fit.transformation is not None
    assert np.allclose(fit.transformation.matrices[stream], np.eye(7), atol=1e-9)
    assert not all(np.array_equal(p, np.arange(p.shape[-1])) for p in fit.permutation.arrays.values())


def test_begins_where_it_is_told_to() -> None:
    a, b, spec = _pair()
    first = align(a, b, spec=spec)
    again = align(a, b, pg.WeightMatching(init=first.transformation, max_sweeps=1), spec=spec)
    assert again.objective >= first.objective * (1 - 1e-6)
    permuted = align(a, b, spec=spec.permutations())
    assert align(a, b, pg.WeightMatching(init=permuted.permutation), spec=spec).objective >= first.objective_before
    assert set(first.details) == {"from nothing known", "from the identity", "from permutations"}
    assert first.objective == max(first.details.values())


class Linears(nn.Module):
    """Linear layers of which some are wider than what comes in or goes out: their maps have dead directions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 9), nn.Linear(9, 4)
        self.e, self.f, self.g = nn.Linear(4, 9, bias=False), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(torch.tanh(self.f(self.e(torch.tanh(self.d(self.c(self.b(self.a(x)))))))))


def test_as_many_starts_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three for small networks, one for large ones; the best goes on to its end, and the others only so far."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = Decoder().eval(), Decoder().eval()
    spec = pg.auto_spec(a, (models.tokens(),), symmetry="general")
    three = align(a, b, spec=spec)
    assert list(three.details) == ["from nothing known", "from the identity", "from permutations"]
    assert three.objective == pytest.approx(max(three.details.values()))
    longer = align(a, b, pg.WeightMatching(init="identity"), spec=spec).objective
    assert 0.99 * longer < three.details["from the identity"] <= longer * (1 + 1e-9)
    assert list(align(a, b, pg.WeightMatching(restarts=2), spec=spec).details) == list(three.details)[:2]
    monkeypatch.setattr(weights, "ONE_START_ABOVE", 100)
    assert list(align(a, b, spec=spec).details) == ["from nothing known"]
    assert list(align(a, b, pg.WeightMatching(restarts=3), spec=spec).details) == list(three.details)


@pytest.mark.parametrize("kind", ["linear layers", "dead in A", "dead in B", "dead in both"])
def test_what_is_dead_stays_of_its_size(kind: str) -> None:
    """Neither a unit that nobody reads nor a direction that is never taken has a balance of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "linear layers":
            a, b = (Linears().double() for _ in range(2))
            x = torch.randn(5, 6, dtype=torch.float64)
        else:
            a, b = (
                nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).double()
                for _ in range(2)
            )
            x = torch.randn(5, 5, dtype=torch.float64)
            with torch.no_grad():
                for name, model in (("A", a), ("B", b)):
                    if kind[5:] in (f"in {name}", "in both"):
                        model[2].weight[:, 3] = 0
    spec = pg.auto_spec(a, (x,), symmetry="general")
    for matcher in (pg.WeightMatching(), pg.StreamedWeightMatching()):
        fit = align(a, b, matcher, spec=spec)
        assert max(float(weight.abs().max()) for weight in fit.state_dict.values()) < 1e5
        assert torch.allclose(_outputs(b, fit.state_dict, x), _outputs(b, b.state_dict(), x), atol=1e-10)
        assert fit.objective > fit.objective_before


@pytest.mark.parametrize("width", [7, 700])
def test_single_precision_gives_exact_rotations(width: int) -> None:
    """Models of many weights are compared in float32, whose rotations are off by more than the width's rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = (models.LowRank() for _ in range(2))
        one, other = (nn.Sequential(nn.Embedding(40, width), nn.RMSNorm(width), nn.Linear(width, 5)) for _ in range(2))
    tokens = torch.arange(12).reshape(2, 6)
    for first, second, x in ((a, b, models.sequences(5)), (one, other, tokens)):
        spec = pg.auto_spec(first, (x,), symmetry="general")
        exact = align(first, second, spec=spec)
        fit = align(first, second, pg.WeightMatching(dtype=torch.float32), spec=spec)
        assert fit.transformation is not None
        assert fit.objective == pytest.approx(exact.objective, rel=1e-5)
        for name, matrices in fit.transformation.matrices.items():
            if spec.groups[name].structure.linear == "O":
                assert np.abs(matrices @ matrices.swapaxes(-1, -2) - np.eye(width)).max() < 1e-12
        state = {n: t.double() for n, t in second.state_dict().items()}
        copy = second.double()
        x = x.double() if x.is_floating_point() else x
        assert torch.allclose(_outputs(copy, fit.transformation.apply(state), x), _outputs(copy, state, x), atol=1e-9)


def test_other_objectives() -> None:
    a, b, spec = _pair()
    inner = align(a, b, spec=spec)
    squared = align(a, b, pg.WeightMatching(objective="l2"), spec=spec)
    assert squared.objective < 0
    assert squared.objective - squared.objective_before == pytest.approx(
        2 * (inner.objective - inner.objective_before), rel=1e-6
    )
    names = [name for name in spec.axes if name not in spec.general_gains]
    cosine = align(a, b, pg.WeightMatching(objective="cosine"), spec=spec)
    assert 0 < cosine.objective <= len(names)
    only = align(a, b, pg.WeightMatching(weights=lambda name, _: float(name == "table.weight")), spec=spec)
    assert (
        only.objective
        <= float((a["table.weight"] * a["table.weight"]).sum()) ** 0.5
        * float((b["table.weight"] * b["table.weight"]).sum()) ** 0.5
    )


@pytest.mark.parametrize(
    "kind", ["zero in A", "zero in B", "nan", "nan gain", "infinite gain", "moves", "indices", "pattern", "spec"]
)
def test_what_cannot_be_matched_is_said(kind: str) -> None:
    a, b, spec = _pair()
    settings: dict[str, Any] = {}
    error, message = MismatchError, "gain"
    if kind.startswith("zero"):
        (a if kind.endswith("A") else b)["norm.weight"][3] = 0
        message = rf"gain norm.weight of {kind[-1]} has a zero"
    elif kind.endswith(" gain"):
        b["norm.weight"][3] = torch.nan if kind.startswith("nan") else torch.inf
        message = r"gain norm.weight of B has a value that is not finite"
    elif kind == "nan":
        b["table.weight"][2, 2] = torch.nan
        error, message = NonFiniteError, "table.weight"
    elif kind == "moves":
        settings, error, message = {"max_moves": 3}, PermgraphError, "max_moves"
    elif kind == "indices":
        settings, error, message = {"frozen": {"*": [0]}}, PermgraphError, "single indices"
    elif kind == "pattern":
        settings, error, message = {"frozen": ["nothing like it"]}, PermgraphError, "no group"
    else:
        other = pg.auto_spec(models.mlp(nn.ReLU()), (models.vectors(),), symmetry="general")
        settings, message = {"init": other.identity()}, "another spec"
    kept = {name: w.clone() for name, w in b.items()}
    with pytest.raises(error, match=message):
        align(a, b, pg.WeightMatching(**settings), spec=spec)
    assert all(torch.equal(b[name].nan_to_num(), w.nan_to_num()) for name, w in kept.items())


def test_no_batches_are_refused() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = (models.Residual(nn.LayerNorm).eval() for _ in range(2))
    spec = pg.auto_spec(a, (models.tokens(),), symmetry="general")
    with pytest.raises(EvaluationError, match="no batch"):
        align(a, b, pg.WeightMatching(loader=[]), spec=spec)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_what_the_weights_leave_open_is_chosen_alike(rank: int) -> None:
    """Of a Gram matrix without full rank more than one polar factor is best: the choice is the same each time."""
    random = torch.Generator().manual_seed(0)
    gram = torch.randn(6, rank, generator=random, dtype=torch.float64)
    gram = gram @ torch.randn(rank, 6, generator=random, dtype=torch.float64)
    factor = polar(gram)
    assert torch.equal(factor, polar(gram.clone()))
    assert torch.allclose(factor @ factor.mT, torch.eye(6, dtype=torch.float64))
    assert float((factor * gram).sum()) == pytest.approx(float(torch.linalg.svdvals(gram).sum()), abs=1e-12)


@pytest.mark.parametrize("where", ["A", "B", "both"])
def test_dead_heads_do_no_harm(where: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = (Decoder().double().eval() for _ in range(2))
    for name, model in (("A", a), ("B", b)):
        if where in (name, "both"):
            for layer in (model.q, model.k, model.v):
                layer.weight.data[:6] = 0
    x = torch.arange(20).reshape(2, 10)
    spec = pg.auto_spec(a, (x,), symmetry="general")
    first, second = (align(a, b, spec=spec) for _ in range(2))
    assert all(torch.equal(first.state_dict[name], second.state_dict[name]) for name in first.state_dict)
    assert first.objective >= first.objective_before
    before, after = _outputs(b, b.state_dict(), x), _outputs(b, first.state_dict, x)
    assert torch.allclose(before, after, atol=1e-9 * float(before.abs().max()))


def test_a_matcher_of_permutations_says_so() -> None:
    class Reversing(pg.Matcher):
        def match(self, a: Any, b: Any, spec: Any, seed: int = 0, progress: Any = None) -> Any:
            return pg.WeightMatching().match(a, b, spec, seed, progress)

    a, b, spec = _pair()
    fit = align(a, b, Reversing(), spec=spec)
    assert fit.transformation is None and any("permutations alone" in note for note in fit.notes)


def test_networks_of_other_structures_are_refused() -> None:
    a, b = models.Elementwise(torch.relu), models.Elementwise(torch.tanh)
    spec = pg.auto_spec(a, (models.vectors(),), symmetry="general")
    with pytest.raises(MismatchError, match=r"structure P in A but B in B"):
        align(a, b, spec=spec)


# --- the ascent -------------------------------------------------------------------------------------------------------


def test_what_is_counted_is_what_the_weights_say(network: tuple[nn.Module, pg.PermutationSpec, Tensor]) -> None:
    """The objective is carried on from Gram matrices: after each sweep it is that of the weights, and it only grows."""
    model, spec, _ = network
    a = {name: w.detach() for name, w in model.state_dict().items()}
    gauge = Gauge(spec, a, spec.random(3, every_group=True).apply(_noisy(a, spec, 0.8, 1)))
    climb = Climb(gauge.acting, gauge.a, gauge.b, Plan(gauge.acting.plain, gauge.a), Element(), unknown=spec.acting)
    for sweeps in range(1, 5):
        climb.climb(sweeps)
        moved = {n: gauge.acting.act(n, w, climb.element, climb.element.matrices) for n, w in gauge.b.items()}
        found = sum(float((gauge.a[n] * moved[n]).sum()) for n in moved)
        assert climb.objective == pytest.approx(found)
        assert all(torch.allclose(climb.b[n], moved[n]) for n in moved)
    values = [sweep.objective for sweep in climb.history]
    assert values == sorted(values)


def test_rounds_over_rotations_end_higher_or_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where a run without them has converged, they lose nothing; and a run with them takes fewer sweeps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = (Decoder().double().eval() for _ in range(2))
    spec = pg.auto_spec(a, (torch.arange(20).reshape(2, 10),), symmetry="general")
    with_rounds = align(a, b, pg.WeightMatching(init="identity"), spec=spec)
    monkeypatch.setattr(ascent, "ROUNDS", 0)
    without = align(a, b, pg.WeightMatching(init="identity"), spec=spec)
    assert len(with_rounds.history) < len(without.history)
    monkeypatch.undo()
    on = align(a, b, pg.WeightMatching(init=without.transformation), spec=spec)
    assert on.objective >= without.objective * (1 - 1e-9)


def test_types_and_ties_stay() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = (models.Residual(models.Rms, tied=True).bfloat16().eval() for _ in range(2))
    spec = pg.auto_spec(a, (models.tokens(),), symmetry="general")
    fit = align(a, b, spec=spec)
    assert {w.dtype for w in fit.state_dict.values()} == {torch.bfloat16}
    model = fit.model()
    assert model.head.weight is model.table.weight
    proof = pg.verify(b, permutation=fit.transformation, example_inputs=(models.tokens(),), controls="none")
    assert proof.passed and proof.own_precision is not None and proof.own_precision.dtype == "bfloat16"
    assert proof.own_precision.moved < 10 * proof.own_precision.rounding


# --- activations ------------------------------------------------------------------------------------------------------


def test_activations_find_a_planted_element(network: tuple[nn.Module, pg.PermutationSpec, Tensor]) -> None:
    """From the activations, weight matching comes back to where the element was planted."""
    model, spec, x = network
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batches = [
            torch.randint(0, 17, (8, 10)) if not x.is_floating_point() else torch.randn(64, *x.shape[1:]).double()
            for _ in range(4)
        ]
    other = pg.align(model, model, spec=spec).model()
    planted = spec.random(3, every_group=True)
    other.load_state_dict(planted.apply(model.state_dict()))
    fit = align(model, other, pg.ActivationMatching(batches), spec=spec)
    before, after = _outputs(model, other.state_dict(), x), _outputs(model, fit.state_dict, x)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-9
    weights = align(model, other, pg.WeightMatching(init=fit.transformation), spec=spec)
    assert _far(model.state_dict(), weights.state_dict, spec) < 1e-4 * _far(
        model.state_dict(), {n: 0 * w for n, w in model.state_dict().items()}, spec
    )
    started = align(model, other, pg.WeightMatching(loader=batches), spec=spec)
    assert "from activations" in started.details


def test_masked_scores_are_no_errors() -> None:
    class Causal(models.Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, -1, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = (q @ k.mT).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        a = Causal(3).eval()
        batches = [torch.randn(6, 7, 11) for _ in range(3)]
    spec = pg.auto_spec(a, (batches[0],))
    b = Causal(3).eval()
    b.load_state_dict(spec.random(1, every_group=True).apply(a.state_dict()))
    fit = align(a, b, pg.ActivationMatching(batches), spec=spec)
    assert all(torch.allclose(fit.state_dict[name], w) for name, w in a.state_dict().items())
