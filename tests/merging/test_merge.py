"""`merge` and `average` on modules and on state dicts: what they give, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.errors import MismatchError, NonFiniteError
from permgraph.merging import CycleConsistent, MergeMany, ToReference, average, merge
from tests.matching.examples import NORMED, SPECS, renumbered, state


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
        model(torch.randn(50, 4))
        return model.eval()


def test_modules() -> None:
    models = [network(0), *(renumbered(network(0), seed) for seed in (1, 2))]
    models[0].train()
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    random_state = torch.get_rng_state()
    found = merge(models, spec=NORMED)
    assert torch.equal(torch.get_rng_state(), random_state)
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert [model.training for model in models] == [True, False, False]
    merged = found.model()
    assert merged is not models[0] and merged.training
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(merged.eval()(x), models[1](x), atol=1e-5)
    naive = copy.deepcopy(models[0]).eval()
    naive.load_state_dict(average(models))
    assert not torch.allclose(naive(x), models[1](x), atol=1e-2)


class Branches(nn.Module):
    """A concatenation, a shortcut and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 4, 3, padding=1)
        self.right = nn.Conv2d(6, 5, 1)
        self.back = nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(6, 3)
        self.again = self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.back(torch.cat([self.left(x).relu(), self.right(x).relu()], 1))
        return self.again(x.mean((2, 3)))


class Block(nn.Module):
    """A small transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens)))


@pytest.mark.parametrize("make", [Branches, Block])
@pytest.mark.parametrize("method", [MergeMany(), CycleConsistent(), ToReference()])
def test_any_architecture(make: type[nn.Module], method: pg.MergeMethod) -> None:
    """Renumbered copies of a network merge into a network of the same function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = make().eval()
    tokens = torch.arange(14).view(2, 7) % 11
    images = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    x = tokens if make is Block else images
    spec = pg.auto_spec(model, (x,))
    copies = [model]
    for seed in (1, 2):
        copies.append(copy.deepcopy(model))
        copies[-1].load_state_dict(spec.random(seed).apply(model.state_dict()))
    merged = merge(copies, method, spec=spec).model()
    assert torch.allclose(merged(x), model(x), atol=1e-5)
    naive = copy.deepcopy(model)
    naive.load_state_dict(average(copies))
    assert not torch.allclose(naive(x), model(x), atol=1e-3)
    if make is Branches:
        assert merged.again.weight is merged.head.weight


def test_the_spec_is_inferred() -> None:
    found = merge([network(1), network(2).state_dict(), network(3)], seed=1)
    assert len(found.permutations) == 3
    assert found.permutations[0].spec.log_order() == pytest.approx(NORMED.log_order())


def test_weights_count_in_the_mean_only() -> None:
    spec = SPECS["attention"]
    models = [state(spec, seed) for seed in range(3)]
    even, uneven = (merge(models, spec=spec, weights=weights) for weights in (None, (1, 2, 5)))
    assert even.permutations == uneven.permutations
    assert uneven.weights == (0.125, 0.25, 0.625)
    aligned = [p.apply(m) for p, m in zip(uneven.permutations, models, strict=True)]
    for key, tensor in uneven.state_dict.items():
        expected = 0.125 * aligned[0][key] + 0.25 * aligned[1][key] + 0.625 * aligned[2][key]
        assert torch.allclose(tensor, expected, atol=1e-6)


def test_dtypes_and_counters_are_the_first_one_s() -> None:
    models = [network(seed).state_dict() for seed in range(3)]
    models[1] = {k: v.double() if v.is_floating_point() else v + 5 for k, v in models[1].items()}
    models[0] = {k: v.bfloat16() if v.is_floating_point() else v for k, v in models[0].items()}
    found = merge(models, spec=NORMED)
    assert {t.dtype for k, t in found.state_dict.items() if "num" not in k} == {torch.bfloat16}
    assert found.state_dict["1.num_batches_tracked"] == models[0]["1.num_batches_tracked"]


def test_names_that_only_an_alias_knows() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [Branches().eval() for _ in range(3)]
    spec = pg.auto_spec(models[0], (torch.zeros(1, 1, 6, 6),))
    full = merge(models, spec=spec)
    short = merge([{k: v for k, v in m.state_dict().items() if not k.startswith("head")} for m in models], spec=spec)
    assert short.objective == pytest.approx(full.objective)
    assert full.state_dict["head.weight"] is full.state_dict["again.weight"]


def test_refusals() -> None:
    spec = SPECS["mlp"]
    models = [state(spec, seed) for seed in range(3)]
    for given in ([], models[:1]):
        with pytest.raises(MismatchError, match=rf"merge\(\) was given {len(given)} models: it needs at least two"):
            merge(given, spec=spec)
    with pytest.raises(MismatchError, match="give merge.. a spec= with them"):
        merge(models)
    with pytest.raises(MismatchError, match="but model 1 is a int"):
        merge([models[0], 3], spec=spec)  # type: ignore[list-item]
    other = {**models[2], "l2.weight": torch.zeros(12, 15)}
    with pytest.raises(MismatchError, match=r"'l2.weight' has shape \(12, 16\) in model 0 but \(12, 15\) in model 2"):
        merge([*models[:2], other], spec=spec)
    with pytest.raises(MismatchError, match="'extra' is in model 1 but not in model 0"):
        merge([models[0], {**models[1], "extra": torch.zeros(1)}], spec=spec)
    with pytest.raises(MismatchError, match="model 0 does not fit the spec: .*'q'"):
        merge(models, spec=SPECS["attention"])
    for bad in (float("nan"), float("inf")):
        broken = copy.deepcopy(models[1])
        broken["l2.weight"][3, 4] = bad
        with pytest.raises(NonFiniteError, match="'l2.weight' of model 1 holds NaN or infinity in 1 of its 192"):
            merge([models[0], broken, models[2]], spec=spec)
    found = merge(models, spec=spec)
    with pytest.raises(MismatchError, match="load .state_dict into one of your own"):
        found.model()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 2), "weights has 2 numbers for 3 networks"),
        ((1, -1, 2), r"weights\[1\] is -1.0"),
        ((1, 1, float("nan")), r"weights\[2\] is nan"),
        ((0, 0, 0), "weights are all 0"),
    ],
)
def test_weights_that_do_not_fit(weights: tuple[float, ...], message: str) -> None:
    models = [state(SPECS["mlp"], seed) for seed in range(3)]
    for refused in (lambda: merge(models, spec=SPECS["mlp"], weights=weights), lambda: average(models, weights)):
        with pytest.raises(MismatchError, match=message):
            refused()


def test_average() -> None:
    a = {"w": torch.tensor([1.0, 2.0], dtype=torch.float16), "steps": torch.tensor(3), "extra": "kept"}
    b = {"w": torch.tensor([4.0, 6.0]), "steps": torch.tensor(9), "extra": "lost"}
    found = average([a, b], [2, 1])
    assert found["w"].tolist() == pytest.approx([2.0, 10 / 3], rel=1e-3) and found["w"].dtype == torch.float16
    assert found["steps"] == 3 and found["extra"] == "kept"
    assert found["steps"] is not a["steps"]
    # A network that does not count may hold anything.
    c = {**b, "w": torch.tensor([float("nan"), 1.0])}
    assert average([a, c], [1, 0])["w"].tolist() == [1.0, 2.0]
    with pytest.raises(MismatchError, match="there is no network to average"):
        average([])


def test_average_keeps_ties_and_refuses_half_of_one() -> None:
    shared = torch.ones(2)
    tied = {"one": shared, "other": shared}
    found = average([tied, {"one": torch.zeros(2), "other": torch.zeros(2)}])
    assert found["one"] is found["other"] and found["one"].tolist() == [0.5, 0.5]
    with pytest.raises(MismatchError, match="'one' and 'other' are one tied tensor in network 0"):
        average([tied, {"one": torch.zeros(2), "other": torch.ones(2)}])


def test_results_show_themselves_in_a_line_or_two() -> None:
    """At a prompt nobody wants to see every weight, or every index."""
    networks = [nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20)).eval() for _ in range(3)]
    spec = pg.auto_spec(networks[0])
    assert repr(spec) == "<PermutationSpec of Sequential: 1 groups on 4 parameters and buffers>"
    turn = spec.random(0, every_group=True)
    assert repr(turn) == f"<Permutation of 1 groups: {turn.moved()['0.weight']} of 40 indices move>"
    batches = [(torch.randn(8, 30), torch.arange(8))]
    a, b, _ = networks
    results = [
        pg.align(a, b),
        pg.merge(networks),
        pg.fit_curve(a, b, batches, epochs=0),
        pg.fit_star(networks, batches),
    ]
    for result in (*results, pg.fit_aligned_curve(a, b, batches, spec, rounds=1, epochs=0)):
        assert "tensor(" not in repr(result) and len(repr(result)) < 2000
        assert len(str(result)) < 300


def test_what_is_mistaken_for_something_else_is_named() -> None:
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval() for _ in "ab")
    with pytest.raises(MismatchError, match=r"in a list, as in merge\(\[a, b, c\]\)"):
        merge(a, b)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="not the class MergeMany"):
        merge([a, b], MergeMany)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"not a WeightMatching: say ToReference\(matcher=WeightMatching\(\)\)"):
        merge([a, b], pg.WeightMatching())  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="takes a matcher, such as .*, not a str"):
        pg.align(a, b, "weights")  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="not the class WeightMatching"):
        pg.align(a, b, pg.WeightMatching)  # type: ignore[arg-type]
    for made in (pg.report, pg.estimate):
        with pytest.raises(MismatchError, match="takes a spec, such as .*, not a Sequential"):
            made(a)  # type: ignore[operator]
    with pytest.raises(pg.errors.EvaluationError, match="evaluate returned .*not a number"):
        pg.barrier(a, b, lambda network: "low", points=2)  # type: ignore[arg-type, return-value]
    assert merge(nn.ModuleList([a, b])).outcome == "converged"  # type: ignore[arg-type]
