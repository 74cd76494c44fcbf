"""Sinkhorn matching: the balancing and its gradient, what is minimised, what is kept, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import permgraph
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError, PermgraphError
from permgraph.matching import Sinkhorn, WeightMatching, align
from permgraph.matching.balance import balance
from permgraph.matching.problem.objective import pair
from permgraph.matching.relaxation import Relaxation
from tests.matching.examples import SPECS, Tied, planted, state
from tests.matching.test_straight_through import batches, data, midpoint_loss, trained


def scores(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from([0.1, 1.0, 10.0]))
def test_rows_and_columns_sum_to_one(n, seed, scale):
    matrix, columns = balance(scores(seed, 2, n, n, scale=scale), 300, tolerance=1e-3)
    assert matrix.shape == (2, n, n) and columns.shape == (2, 1, n)
    assert bool((matrix >= 0).all())
    assert torch.allclose(matrix.sum(-2), torch.ones(2, n, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(matrix.sum(-1), torch.ones(2, n, dtype=torch.float64), atol=1e-2)


def test_is_what_plain_iterations_in_the_log_domain_give():
    logs = given_scores = scores(1, 6, 6, scale=3.0)
    for _ in range(300):
        logs = logs - logs.logsumexp(-1, keepdim=True)
        logs = logs - logs.logsumexp(-2, keepdim=True)
    matrix, columns = balance(given_scores, 300, tolerance=1e-11)
    assert torch.allclose(matrix, logs.exp(), atol=1e-9)
    again, _ = balance(given_scores, 2, start=columns, tolerance=1e-12)
    assert torch.allclose(again, matrix, atol=1e-9)  # where it begins saves iterations, and changes nothing else


def test_extreme_scores_neither_overflow_nor_vanish():
    large = scores(2, 5, 5, scale=1e4).float()
    matrix, _ = balance(large, 20)
    assert bool(torch.isfinite(matrix).all())
    assert torch.allclose(matrix.sum(-2), torch.ones(5), atol=1e-5)
    far = torch.tensor([[0.0, -1e30], [-1e30, 0.0]])
    assert torch.equal(balance(far)[0], torch.eye(2))


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_gradient_is_that_of_the_exact_solution(scale):
    given_scores = scores(3, 3, 3, scale=scale).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: balance(s, 1000, tolerance=1e-10)[0], (given_scores,), atol=1e-4)


def test_the_gradient_is_that_of_unrolled_iterations():
    given_scores, direction = scores(4, 7, 7), scores(5, 7, 7)
    found = given_scores.clone().requires_grad_()
    (balance(found, 500, tolerance=1e-12)[0] * direction).sum().backward()
    unrolled = given_scores.clone().requires_grad_()
    logs = unrolled
    for _ in range(300):
        logs = logs - logs.logsumexp(-1, keepdim=True)
        logs = logs - logs.logsumexp(-2, keepdim=True)
    (logs.exp() * direction).sum().backward()
    assert torch.allclose(found.grad, unrolled.grad, atol=1e-8)


@pytest.mark.parametrize("spec", SPECS)
def test_matrices_of_a_permutation_permute(spec):
    spec = SPECS[spec]
    relaxation = Relaxation(pair(state(spec, 0), state(spec, 1), spec), spec)
    permutation = spec.random(2)
    for name, tensor in relaxation.permuted(relaxation.corner(permutation.arrays)).items():
        assert torch.equal(tensor, permutation.apply_to(name, relaxation.compared.b[name]))


def test_between_two_permutations_tensors_are_mixed_one_axis_at_a_time():
    spec = SPECS["mlp"]
    relaxation = Relaxation(pair(state(spec, 0), state(spec, 1), spec), spec)
    one, other = (relaxation.corner(spec.random(seed).arrays) for seed in (2, 3))
    mixed = {name: 0.25 * one[name] + 0.75 * other[name] for name in one}
    found = relaxation.permuted(mixed)
    expected = mixed["h2"] @ relaxation.compared.b["l2.weight"] @ mixed["h1"].T
    assert torch.allclose(found["l2.weight"], expected, atol=1e-5)
    assert torch.allclose(found["l1.bias"], mixed["h1"] @ relaxation.compared.b["l1.bias"], atol=1e-5)


def test_every_pair_of_heads_has_a_matrix_of_its_own():
    """Halfway between two pairings of the heads, each head's channels are matched apart for either partner."""
    spec = SPECS["attention"]
    relaxation = Relaxation(pair(state(spec, 0), state(spec, 1), spec), spec)
    one, other = (relaxation.corner(spec.random(seed).arrays) for seed in (2, 3))
    assert one["d1"].shape == (4, 4, 6, 6)
    mixed = {name: (one[name] + other[name]) / 2 for name in one}
    b = relaxation.compared.b["q"].view(4, 6, 10)
    expected = torch.einsum("ij,ijpq,jqc->ipc", mixed["h"], mixed["d1"], b) @ mixed["c"].T
    assert torch.allclose(relaxation.permuted(mixed)["q"], expected.reshape(24, 10), atol=1e-5)


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in ("one index", "nothing")])
def test_recovers_a_planted_permutation_by_itself(spec):
    a, b, secret = planted(SPECS[spec], 0)
    found = Sinkhorn(steps=30, round_every=30, matcher=None).match(a, b, SPECS[spec])
    assert found.permutation == secret
    moved = found.permutation.apply(b)
    assert found.objective == pytest.approx(-sum(float((a[n] - moved[n]).square().sum()) for n in a), rel=1e-4)


@pytest.mark.parametrize("spec", ["mlp", "attention", "recurrent", "family"])
def test_is_never_worse_than_weight_matching(spec):
    a, b = state(SPECS[spec], 1), state(SPECS[spec], 2)
    found = Sinkhorn(steps=20).match(a, b, SPECS[spec], 3)
    plain = WeightMatching(objective="l2").match(a, b, SPECS[spec], 3)
    assert found.objective >= plain.objective - 1e-3
    assert found.details["matched"] == pytest.approx(plain.objective, rel=1e-6)
    assert found.objective == max(found.details[k] for k in ("matched", "rounded", "polished"))
    assert any("no rounded matrix is the best" in note for note in found.notes) == (
        found.objective > found.details["rounded"]
    )


def test_keeps_the_best_that_it_rounded():
    spec = SPECS["residual"]
    a, b = state(spec, 1), state(spec, 2)
    found = Sinkhorn(steps=30, round_every=10, matcher=None).match(a, b, spec)
    assert found.objective == max(sweep.objective for sweep in found.history) > found.objective_before
    assert found.outcome == "sweep limit"
    assert found.notes == ()


@pytest.mark.parametrize("init", ["identity", "matched", "permutation"])
def test_begins_where_it_is_told(init):
    spec = SPECS["mlp"]
    a, b, secret = planted(spec, 6)
    start = secret if init == "permutation" else init
    found = Sinkhorn(steps=2, round_every=1, init=start).match(a, b, spec)
    assert found.permutation == secret
    first = Sinkhorn(steps=1, init=start, matcher=None if init != "matched" else WeightMatching()).match(a, b, spec)
    assert first.history[0].moved == {} or init == "identity"


@pytest.fixture(scope="module")
def networks():
    return trained(0), trained(1)


@pytest.mark.parametrize("objective", ["midpoint", "random"])
def test_losses(networks, objective):
    a, b = networks
    x, y = data()
    how = Sinkhorn(objective, batches(), steps=40, init="matched", temperature=(0.5, 0.1))
    fit = align(a, b, how)
    plain = align(a, b)
    assert fit.objective > fit.objective_before
    if objective == "midpoint":
        assert fit.objective == pytest.approx(-midpoint_loss(a, fit.model(), x, y), rel=1e-5)
        assert midpoint_loss(a, fit.model(), x, y) < midpoint_loss(a, plain.model(), x, y)
    else:
        losses = []
        for point in (0.1, 0.3, 0.5, 0.7, 0.9):
            middle = copy.deepcopy(a)
            middle.load_state_dict({n: torch.lerp(t, fit.state_dict[n], point) for n, t in a.state_dict().items()})
            losses.append(nn.functional.cross_entropy(middle(x), y).item())
        assert fit.objective == pytest.approx(-sum(losses) / 5, rel=1e-5)


def test_tied_and_half_precision_weights():
    torch.manual_seed(0)
    a, b = Tied().bfloat16(), Tied().bfloat16()
    tokens = torch.arange(11)
    fit = align(a, b, Sinkhorn("midpoint", [{"x": tokens, "labels": tokens.flip(0)}], steps=3, round_every=1))
    assert fit.sweeps == 3
    assert fit.objective >= fit.objective_before


def test_batch_normalisation_and_random_state():
    a, b = trained(0, norm=True), trained(1, norm=True)
    a.train()
    copies = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        align(a, b, Sinkhorn("random", batches(), steps=3, round_every=2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert a.training and not b.training
    assert all(p.requires_grad and p.grad is None for model in (a, b) for p in model.parameters())
    for model, kept in zip((a, b), copies, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_the_seed_decides(networks):
    how = Sinkhorn("random", batches(), steps=6, round_every=2, matcher=None)
    fits = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        fits.append(align(*networks, how, seed=4))
    assert fits[0].permutation == fits[1].permutation
    assert [s.objective for s in fits[0].history] == [s.objective for s in fits[1].history]


def test_an_interrupted_run_gives_the_best_so_far():
    def stop(sweep):
        raise KeyboardInterrupt

    a, b, secret = planted(SPECS["mlp"], 1)
    found = Sinkhorn(steps=60, round_every=30, matcher=None).match(a, b, SPECS["mlp"], 0, stop)
    assert found.outcome == "interrupted"
    assert found.sweeps == 1
    assert found.details["steps"] == 30
    assert found.permutation == secret


def test_any_optimizer_and_what_it_may_break():
    spec = SPECS["mlp"]
    a, b, secret = planted(spec, 1)
    sgd = Sinkhorn(steps=60, matcher=None, optimizer=lambda scores: torch.optim.SGD(scores, lr=100.0, momentum=0.9))
    assert sgd.match(a, b, spec).permutation == secret
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        Sinkhorn(optimizer=lambda scores: torch.optim.SGD(scores, lr=float("inf"))).match(a, b, spec)


def test_state_dicts_do_for_weights_and_modules_are_asked_for_where_they_run(networks):
    a, b = networks
    spec = permgraph.auto_spec(a)
    align(a.state_dict(), b.state_dict(), Sinkhorn(steps=1), spec=spec)
    how = Sinkhorn("midpoint", batches(), steps=1)
    with pytest.raises(MismatchError, match="give align\\(\\) modules"):
        align(a.state_dict(), b.state_dict(), how, spec=spec)
    with pytest.raises(MismatchError, match="with_models"):
        how.match(a.state_dict(), b.state_dict(), spec)
    other = permgraph.auto_spec(trained(0, width=5)).identity()
    with pytest.raises(MismatchError, match="another spec"):
        align(a, b, Sinkhorn(init=other), spec=spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(objective="cosine"), "unknown objective 'cosine'"),
        (dict(objective="midpoint"), "give loader="),
        (dict(steps=-1), "steps=-1"),
        (dict(round_every=0), "round_every=0"),
        (dict(iterations=0), "iterations=0"),
        (dict(temperature=(1.0, 0.0)), "two positive numbers"),
        (dict(max_batches=0), "max_batches=0"),
        (dict(init="middle"), "unknown init 'middle'"),
        (dict(init="matched", matcher=None), "matcher= cannot be None"),
        (dict(objective="random", loader=iter([])), "generator"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(PermgraphError, match=message):
        Sinkhorn(**settings)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], EvaluationError, "gave no batch"),
        ([torch.zeros(4, 8)], EvaluationError, "holds no targets"),
        ([(torch.zeros(4, 7), torch.zeros(4).long())], EvaluationError, r"batch 1 of the loader, of shape \(4, 7\)"),
        (
            [(torch.full((4, 8), float("nan")), torch.zeros(4).long())],
            NonFiniteError,
            "the loss at the midpoint is nan",
        ),
    ],
)
def test_refuses_bad_data(networks, loader, error, message):
    with pytest.raises(error, match=message):
        align(*networks, Sinkhorn("midpoint", loader))
