"""What every matcher must do on networks, those that run them too: one table of matchers, one of networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import permgraph
from permgraph.errors import MismatchError, NonFiniteError
from permgraph.matching import ActivationMatching, FrankWolfe, Sinkhorn, StraightThrough, WeightMatching, align
from permgraph.matching.matcher import MatchResult


class Heads(nn.Module):
    """Attention whose heads and channels are views, on a residual stream."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.mT, -1) @ v
        return self.head(x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))).mean(1)


NETWORKS = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)),
        (6,),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(6 * 2 * 2, 4),
        ),
        (2, 6, 6),
    ),
    "heads": (Heads, (3, 5)),
    "one unit": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 4)), (6,)),
}  # fmt: skip


def batches(name, dtype=torch.float32):
    """Two batches of inputs, and what the network of seed 0 answers: the least loss is at that network."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, *NETWORKS[name][1], generator=generator)
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # between networks, they take the statistics of the batch
            module.train()
    with torch.no_grad():
        return [(x.to(dtype), model(x).to(dtype)) for x in inputs.split(12)]


squares = nn.functional.mse_loss

MATCHERS = {
    "weight matching": lambda loader: WeightMatching(),
    "Frank-Wolfe": lambda loader: FrankWolfe(),
    "Sinkhorn": lambda loader: Sinkhorn(steps=4, round_every=2),
    "Sinkhorn, midpoint": lambda loader: Sinkhorn("midpoint", loader, squares, steps=4, round_every=2),
    "Sinkhorn, random": lambda loader: Sinkhorn("random", loader, squares, steps=4, round_every=2),
    "straight through": lambda loader: StraightThrough(loader, squares, epochs=2, project_every=1),
    "activations": lambda loader: ActivationMatching(loader),
    "activations, graph, covariance": lambda loader: ActivationMatching(loader, "covariance", tensors="graph"),
    "activations and weights": lambda loader: ActivationMatching(loader, "inner", 0.5),
}


@pytest.fixture(params=MATCHERS)
def kind(request):
    return request.param


@pytest.fixture(params=NETWORKS)
def network(request):
    return request.param


def build(name, seed=0):
    torch.manual_seed(seed)
    model = NETWORKS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def planted(name, seed, noise=0.02):
    """A network, another that is nearly the same renumbered, the spec, and the permutation that brings it back."""
    a = build(name)
    spec = permgraph.auto_spec(a, (batches(name)[0][0],))
    secret = spec.random(seed)
    generator = torch.Generator().manual_seed(seed)
    state = {
        n: t + noise * t.std(unbiased=False) * torch.randn(t.shape, generator=generator) if t.ndim > 1 else t.clone()
        for n, t in a.state_dict().items()
    }
    b = build(name)
    b.load_state_dict(secret.inverse().apply(state))
    return a, b, spec, secret


def test_recovers_a_planted_permutation(kind, network):
    a, b, spec, secret = planted(network, 3)
    fit = align(a, b, MATCHERS[kind](batches(network)), spec=spec)
    assert fit.permutation == secret
    assert isinstance(fit.result, MatchResult)
    assert fit.objective >= fit.objective_before
    assert fit.sweeps == len(fit.history)
    x = batches(network)[0][0]
    with torch.no_grad():
        assert torch.allclose(fit.model()(x), b(x), atol=1e-5)  # the function is B's still


def test_same_seed_same_answer(kind):
    a, b = build("heads", 0), build("heads", 1)
    spec = permgraph.auto_spec(a, (batches("heads")[0][0],))
    fits = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        fits.append(align(a, b, MATCHERS[kind](batches("heads")), spec=spec, seed=7))
    assert fits[0].permutation == fits[1].permutation
    assert [s.objective for s in fits[0].history] == [s.objective for s in fits[1].history]
    assert fits[0].seed == 7


def test_leaves_models_and_random_state_alone(kind):
    a, b = build("convolutions", 0).train(), build("convolutions", 1)
    copies = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    loader = batches("convolutions")
    inputs = [x.clone() for x, _ in loader]
    random_state = torch.get_rng_state()
    align(a, b, MATCHERS[kind](loader), spec=permgraph.auto_spec(a, (loader[0][0],)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert a.training and not b.training
    assert all(torch.equal(x, kept) for (x, _), kept in zip(loader, inputs, strict=True))
    for model, kept in zip((a, b), copies, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_numbering_of_either_network_does_not_matter(kind, network):
    a, b, spec, _ = planted(network, 5)
    how = MATCHERS[kind](batches(network))
    reference = align(a, b, how, spec=spec).state_dict
    turn = spec.random(6)
    other_b = build(network)
    other_b.load_state_dict(turn.apply(b.state_dict()))
    for name, tensor in align(a, other_b, how, spec=spec).state_dict.items():
        assert torch.equal(tensor, reference[name]), name
    other_a = build(network)
    other_a.load_state_dict(turn.apply(a.state_dict()))
    expected = turn.apply(reference)
    for name, tensor in align(other_a, b, how, spec=spec).state_dict.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.bfloat16)],
)
def test_dtypes(kind, dtype, other):
    a, b, spec, secret = planted("heads", 8)
    fit = align(a.to(dtype), b.to(other), MATCHERS[kind](batches("heads", dtype)), spec=spec)
    assert fit.permutation == secret
    assert all(tensor.dtype == other for tensor in fit.state_dict.values())


def test_dead_units_stay_where_they_are(kind):
    a = build("perceptron")
    with torch.no_grad():
        a[0].weight[[1, 4, 6]] = 0
        a[0].bias[[1, 4, 6]] = 0
        a[2].weight[:, [1, 4, 6]] = 0
    spec = permgraph.auto_spec(a)
    fit = align(a, copy.deepcopy(a), MATCHERS[kind](batches("perceptron")), spec=spec)
    assert fit.permutation.is_identity


def test_all_weights_zero(kind):
    a, b = build("perceptron"), build("perceptron", 1)
    for parameter in a.parameters():
        nn.init.zeros_(parameter)
    for x, y in ((a, b), (b, a), (a, copy.deepcopy(a))):
        fits = [align(x, y, MATCHERS[kind](batches("perceptron")), seed=1) for _ in range(2)]
        assert fits[0].permutation == fits[1].permutation
        assert fits[0].objective >= fits[0].objective_before - 1e-6


@pytest.mark.parametrize("side", ["A", "B"])
def test_refuses_what_is_not_finite(kind, side):
    a, b = build("perceptron"), build("perceptron", 1)
    with torch.no_grad():
        (a if side == "A" else b)[2].weight[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="(?i)nan"):
        align(a, b, MATCHERS[kind](batches("perceptron")), spec=permgraph.auto_spec(build("perceptron")))


def test_refuses_what_does_not_fit(kind):
    a, b = build("perceptron"), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4))
    with pytest.raises(MismatchError, match=r"'0\.weight'"):
        align(a, b, MATCHERS[kind](batches("perceptron")))


def test_ctrl_c_gives_the_best_so_far(kind):
    def stop(sweep):
        raise KeyboardInterrupt

    a, b = build("heads"), build("heads", 1)
    spec = permgraph.auto_spec(a, (batches("heads")[0][0],))
    fit = align(a, b, MATCHERS[kind](batches("heads")), spec=spec, progress=stop)
    assert fit.outcome == "interrupted"
    assert fit.objective >= fit.objective_before
    assert fit.permutation.spec == spec


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree(kind, network):
    a, b, spec, secret = planted(network, 9)
    here = align(a, b, MATCHERS[kind](batches(network)), spec=spec)
    there = align(copy.deepcopy(a).cuda(), b, MATCHERS[kind](batches(network)), spec=spec)
    assert here.permutation == there.permutation == secret
    assert there.objective == pytest.approx(here.objective, rel=1e-3, abs=1e-4)
    assert all(tensor.is_cuda for tensor in there.state_dict.values())
