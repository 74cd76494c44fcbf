"""Merging over general symmetries: every method, on networks of real structure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError, PermgraphError
from permgraph.merging.general import GeneralAscent
from permgraph.merging.result import Models
from permgraph.merging.streamed import StreamedRounds
from tests.general.whole_networks import NETWORKS, State, at, away, distance, inputs, network, output, planted, spec_of

METHODS = {
    "cycle-consistent": pg.CycleConsistent(),
    "merge many": pg.MergeMany(),
    "reference": pg.ToReference(),
    "frank-wolfe": pg.FrankWolfeMany(max_steps=4),
    "joining": pg.Joining(),
}


def strangers(name: str, count: int, seed: int = 0) -> list[State]:
    return [network(name, seed + number).state_dict() for number in range(count)]


def assert_is_identity(element: pg.Transformation) -> None:
    """Exactly in its permutations, and to 1e-10 in the rest."""
    assert element.permutation.is_identity
    for matrix in element.matrices.values():
        assert np.abs(matrix - np.eye(matrix.shape[-1])).max() < 1e-10
    for factors in (*element.scales.values(), *element.signs.values(), *element.gains.values()):
        assert np.abs(factors - 1).max() < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_model_computes_what_it_did_and_cycles_close(name: str, method: str) -> None:
    spec, states = spec_of(name), strangers(name, 3)
    merged = pg.merge(states, METHODS[method], spec=spec)
    assert merged.transformations is not None
    assert merged.transformations[0].is_identity
    for element, state, permutation in zip(merged.transformations, states, merged.permutations, strict=True):
        assert away(name, state, element.apply(state)) < 1e-9
        assert element.permutation == permutation
    for i, j, k in itertools.permutations(range(3)):
        assert_is_identity(merged.pairwise(i, j) @ merged.pairwise(j, k) @ merged.pairwise(k, i))
    assert merged.objective >= merged.objective_before
    moved = [element.apply(state) for element, state in zip(merged.transformations, states, strict=True)]
    mean = pg.average(moved)
    assert all(torch.allclose(mean[key], merged.state_dict[key], atol=1e-12) for key in mean)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("method", "count"), [("cycle-consistent", 3), ("cycle-consistent", 5), ("merge many", 3)])
def test_copies_under_the_whole_group_come_back(name: str, method: str, count: int) -> None:
    spec = spec_of(name)
    copies, states = planted(name, count, seed=3)
    merged = pg.merge(states, METHODS[method], spec=spec)
    assert merged.transformations is not None
    home = spec.random(350).inverse()  # of the first
    for number in range(1, count):
        back = home.apply(merged.transformations[number].apply(states[number]))
        assert distance(back, copies[0]) <= 1.05 * distance(copies[number], copies[0])
    for i, j in itertools.combinations(range(count), 2):
        for k in range(count):
            assert_is_identity(merged.pairwise(i, j) @ merged.pairwise(j, k) @ merged.pairwise(k, i))


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_mean_computes_the_same_whichever_model_is_first(name: str) -> None:
    _, states = planted(name, 3, seed=5)
    means = [pg.merge([*states[n:], *states[:n]], spec=spec_of(name)).state_dict for n in range(3)]
    assert max(away(name, means[0], other) for other in means[1:]) < 1e-4  # what an ascent's tolerance leaves


def test_the_objective_is_that_of_balanced_weights() -> None:
    """Of hidden ReLU units, whose incoming and outgoing norms are made equal by hand."""
    spec = pg.auto_spec(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), symmetry="general")
    generator = torch.Generator().manual_seed(0)
    drawn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    states = [
        {"0.weight": drawn(3, 4), "0.bias": drawn(3), "2.weight": drawn(2, 3), "2.bias": drawn(2)} for _ in range(3)
    ]
    balanced = []
    for state in states:
        first = torch.cat([state["0.weight"], state["0.bias"][:, None]], 1)
        factor = (state["2.weight"].norm(dim=0) / first.norm(dim=1)).sqrt()
        balanced.append((first * factor[:, None], state["2.weight"] / factor))

    def worth(orders: list[tuple[int, ...]]) -> float:
        total = 0.0
        for i, j in itertools.combinations(range(3), 2):
            (w, v), (x, y), p, q = balanced[i], balanced[j], list(orders[i]), list(orders[j])
            total += float((w[p] * x[q]).sum() + (v[:, p] * y[:, q]).sum())
        return total

    merged = pg.merge(states, pg.CycleConsistent(restarts=4), spec=spec)
    orders = list(itertools.permutations(range(3)))
    best = max(worth([orders[0], p, q]) for p in orders for q in orders)
    assert merged.objective_before == pytest.approx(worth([orders[0]] * 3), rel=1e-5)
    assert merged.objective == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("method", ["cycle-consistent", "merge many"])
@pytest.mark.parametrize("name", ["vit", "llama", "bert"])
def test_no_round_lowers_the_objective(name: str, method: str) -> None:
    merged = pg.merge(strangers(name, 4), METHODS[method], spec=spec_of(name))
    reached = [merged.objective_before if method == "merge many" else -np.inf, *(r.objective for r in merged.history)]
    assert all(after >= before - 1e-9 * abs(after) for before, after in itertools.pairwise(reached))
    assert merged.objective == pytest.approx(reached[-1], rel=1e-9)
    assert merged.outcome == "converged"


def test_two_models_are_matched_as_align_does() -> None:
    a, b = strangers("llama", 2)
    spec = spec_of("llama")
    fit = pg.align(a, b, spec=spec)
    merged = pg.merge([a, b], pg.ToReference(), spec=spec)
    assert merged.objective == pytest.approx(fit.objective, rel=1e-9)
    joint = pg.merge([a, b], pg.CycleConsistent(restarts=2), spec=spec)
    assert joint.objective >= fit.objective * 0.98  # another first model, so another climb


def test_the_reference_keeps_its_gauge() -> None:
    spec, states = spec_of("vit"), strangers("vit", 3)
    merged = pg.merge(states, pg.ToReference(index=2), spec=spec)
    assert merged.transformations is not None and merged.transformations[2].is_identity
    gain = "norm.weight"
    assert torch.equal(merged.transformations[2].apply(states[2])[gain], states[2][gain])
    for element, state in zip(merged.transformations, states, strict=True):
        assert torch.allclose(element.apply(state)[gain], states[2][gain], rtol=1e-12)


@pytest.mark.parametrize("name", ["normed mlp", "vit"])
@pytest.mark.parametrize("kind", [pg.ToReference, pg.MergeMany])
def test_activation_matching_merges_too(name: str, kind: type) -> None:
    copies, states = planted(name, 3, seed=4)
    matcher = pg.ActivationMatching([(inputs(name),)])
    merged = pg.merge([at(name, state) for state in states], kind(matcher=matcher), spec=spec_of(name))
    assert merged.transformations is not None
    for element, state in zip(merged.transformations, states, strict=True):
        assert away(name, state, element.apply(state)) < 1e-9
    truth = torch.stack([output(name, copy) for copy in copies])
    spread = float((truth - truth.mean(0)).abs().max())
    assert float((output(name, merged.state_dict) - truth.mean(0)).abs().max()) < 3 * spread


def test_shares_and_types_and_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(9, 6), nn.RMSNorm(6, eps=1e-5), nn.Linear(6, 9, bias=False)
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))

    torch.manual_seed(0)
    models = [Tied().bfloat16().eval() for _ in range(3)]
    spec = pg.auto_spec(Tied().eval(), (torch.zeros(2, 3, dtype=torch.long),), symmetry="general")
    merged = pg.merge(models, spec=spec, weights=[2, 1, 1])
    assert merged.weights == (0.5, 0.25, 0.25)
    assert {tensor.dtype for tensor in merged.state_dict.values()} == {torch.bfloat16}
    assert merged.state_dict["head.weight"] is merged.state_dict["table.weight"]
    assert merged.transformations is not None
    fine = [{k: v.float() for k, v in model.state_dict().items()} for model in models]
    moved = [element.apply(state) for element, state in zip(merged.transformations, fine, strict=True)]
    for key, tensor in merged.state_dict.items():
        expected = 0.5 * moved[0][key] + 0.25 * moved[1][key] + 0.25 * moved[2][key]
        assert torch.allclose(tensor.float(), expected, rtol=2**-7, atol=1e-6)
    assert torch.equal(models[0].table.weight, models[0].head.weight)  # and the models are as they were
    tied = merged.model()
    assert tied.head.weight is tied.table.weight


def test_all_the_weight_on_one_model_gives_that_model() -> None:
    states = strangers("llama", 3)
    merged = pg.merge(states, spec=spec_of("llama"), weights=[0, 1, 0])
    assert away("llama", states[1], merged.state_dict) < 1e-9


@pytest.mark.parametrize(
    "method", [pg.ToReference(matcher=pg.WeightMatching()), pg.CycleConsistent(), pg.FrankWolfeMany()]
)
def test_a_gain_of_zero_is_named_with_its_model(method: pg.MergeMethod) -> None:
    states = strangers("vit", 3)
    states[2] = {**states[2], "blocks.0.norm1.weight": states[2]["blocks.0.norm1.weight"].clone()}
    states[2]["blocks.0.norm1.weight"][3] = 0
    with pytest.raises(MismatchError, match=r"gain blocks\.0\.norm1\.weight of model 2 has a zero.*permutations\(\)"):
        pg.merge(states, method, spec=spec_of("vit"))


class PermutationsAlone(pg.Matcher):
    """A matcher of one's own that says nothing of general symmetries."""

    def match(self, a, b, spec, seed=0, progress=None):  # type: ignore[no-untyped-def]
        return pg.WeightMatching().match(a, b, spec, seed, progress)


def test_a_matcher_that_knows_permutations_alone_is_given_these() -> None:
    spec, states = spec_of("vit"), strangers("vit", 3)
    plain = pg.merge(states, pg.ToReference(), spec=spec.permutations())
    merged = pg.merge(states, pg.ToReference(matcher=PermutationsAlone()), spec=spec)
    assert merged.transformations is None and merged.permutations == plain.permutations
    assert any("ToReference with PermutationsAlone knows permutations alone" in note for note in merged.notes)


def test_streamed_rounds_take_the_permutations_and_say_so() -> None:
    spec, states = spec_of("mlp"), strangers("mlp", 3)
    found = StreamedRounds().find(Models(tuple(states), spec))
    assert found.transformations is None and found.permutations[0].spec == spec.permutations()
    assert any("merged over permutations" in note for note in found.notes)


def test_one_element_cannot_be_the_start_of_all_models() -> None:
    states, spec = strangers("mlp", 2), spec_of("mlp")
    with pytest.raises(PermgraphError, match=r"matcher\.init cannot be one element for all models"):
        pg.merge(states, pg.MergeMany(matcher=pg.WeightMatching(init=spec.identity())), spec=spec)


def test_interrupted_rounds_keep_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, states = spec_of("llama"), strangers("llama", 4)
    step = GeneralAscent.step
    calls = []

    def stopped(self: GeneralAscent, number: int) -> bool:
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(GeneralAscent, "step", stopped)
    merged = pg.merge(states, pg.MergeMany(), spec=spec)
    assert merged.outcome == "interrupted" and merged.transformations is not None
    assert merged.objective > merged.objective_before
    for element, state in zip(merged.transformations, states, strict=True):
        assert away("llama", state, element.apply(state)) < 1e-9
