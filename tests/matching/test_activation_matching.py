"""Activation matching: recovered permutations, streamed moments, and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import permgraph
from permgraph.errors import EvaluationError, MismatchError, NonFiniteError, PermgraphError
from permgraph.matching import ActivationMatching, WeightMatching, align
from permgraph.matching.moments import Moments
from permgraph.matching.replay import Replay


def convolutional(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 4 * 4, 12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip
    model(torch.randn(40, 2, 8, 8))
    return model.eval()


IMAGES = [torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(4)]


def renumbered(model, spec, seed, noise=0.0):
    secret = spec.random(seed)
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    moved = secret.inverse().apply(model.state_dict())
    for tensor in moved.values():
        if tensor.is_floating_point():
            tensor += noise * tensor.std(unbiased=False) * torch.randn(tensor.shape, generator=generator)
    other.load_state_dict(moved)
    return other, secret


@pytest.mark.parametrize("measure", ["correlation", "inner"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_recovers_a_planted_permutation(measure, weight):
    a = convolutional(0)
    spec = permgraph.auto_spec(a)
    b, secret = renumbered(a, spec, 1, noise=0.02)
    fit = align(a, b, ActivationMatching(IMAGES, measure, weight), spec=spec)
    assert fit.permutation == secret
    assert fit.notes == ()


def test_heads_and_the_channels_inside():
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(5, 24), nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)).eval()
    spec = permgraph.auto_spec(a)
    b, secret = renumbered(a, spec, 1)
    fit = align(a, b, ActivationMatching([torch.randn(8, 6, 5)], weight=1.0), spec=spec)
    assert fit.permutation == secret


def test_pearson_and_products_over_any_batches():
    x, y = torch.randn(5, 60, dtype=torch.float64) * 3 + 50, torch.randn(5, 60, dtype=torch.float64)
    y = y + x[[1, 0, 2, 4, 3]] * 0.1
    moments = Moments()
    for part in (slice(0, 1), slice(1, 20), slice(20, 60)):
        moments.add(x[:, part], y[:, part])
    expected = np.corrcoef(x.numpy(), y.numpy())[:5, 5:]
    assert np.allclose(moments.correlation("layer").numpy(), expected, atol=1e-5)
    assert np.allclose(moments.product().numpy(), (x @ y.T / 60).numpy(), rtol=1e-5)


def test_a_unit_that_never_varies_correlates_with_none():
    x = torch.randn(3, 50)
    x[1] = 7.25
    moments = Moments()
    moments.add(x, x)
    correlation = moments.correlation("layer")
    assert torch.equal(correlation[1], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(correlation.diagonal()[[0, 2]], torch.ones(2, dtype=torch.float64), atol=1e-6)


def test_a_fitted_model_responds_as_the_other():
    """What the objective says: the sum of the correlations of matched units, over every output that moves."""
    a, b = convolutional(0), convolutional(1)
    fit = align(a, b, ActivationMatching(IMAGES))
    outputs = []
    for model in (a, fit.model()):
        kept: list[torch.Tensor] = []
        for number in (0, 1, 3, 6):
            model[number].register_forward_hook(
                lambda _, __, out, kept=kept: kept.append(out.transpose(0, 1).flatten(1))
            )
        with torch.no_grad():
            model(torch.cat(IMAGES))
        outputs.append(kept)
    total = sum(
        np.corrcoef(x[i].numpy(), y[i].numpy())[0, 1] for x, y in zip(*outputs, strict=True) for i in range(len(x))
    )
    assert fit.objective == pytest.approx(total, rel=1e-4)
    assert fit.objective > fit.objective_before


def test_networks_and_random_state_are_left_alone():
    a = convolutional(0).train()
    b, _ = renumbered(a, permgraph.auto_spec(a), 1)
    b.train()
    before = copy.deepcopy(a.state_dict())
    random_state = torch.get_rng_state()
    align(a, b, ActivationMatching(IMAGES))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a.state_dict()[name], tensor) for name, tensor in before.items())
    assert a.training
    assert all(not module._forward_hooks for model in (a, b) for module in model.modules())


def test_kinds_of_batches():
    a = convolutional(0)
    spec = permgraph.auto_spec(a)
    b, secret = renumbered(a, spec, 1)
    for loader in (
        IMAGES,
        [(x, torch.zeros(16)) for x in IMAGES],
        [[x] for x in IMAGES],
        [{"input": x} for x in IMAGES],
    ):
        assert align(a, b, ActivationMatching(loader), spec=spec).permutation == secret
    batches = iter(IMAGES)
    align(a, b, ActivationMatching(batches, max_batches=2), spec=spec)
    assert next(batches, None) is not None


def test_one_sample_at_a_time_is_enough():
    a = convolutional(0)
    spec = permgraph.auto_spec(a)
    b, secret = renumbered(a, spec, 1)
    singles = torch.cat(IMAGES).split(1)
    assert align(a, b, ActivationMatching(singles), spec=spec).permutation == secret


def test_what_it_refuses():
    a, b = convolutional(0), convolutional(1)
    spec = permgraph.auto_spec(a)
    with pytest.raises(PermgraphError, match="gave no batch"):
        align(a, b, ActivationMatching([]), spec=spec)
    with pytest.raises(EvaluationError, match=r"cannot run on batch 2 of the loader, of shape \(4, 3, 8, 8\)"):
        align(a, b, ActivationMatching([IMAGES[0], torch.zeros(4, 3, 8, 8)]), spec=spec)
    with pytest.raises(MismatchError, match="give align\\(\\) modules"):
        align(a.state_dict(), b.state_dict(), ActivationMatching(IMAGES), spec=spec)
    with pytest.raises(MismatchError, match="with_models"):
        ActivationMatching(IMAGES).match(a.state_dict(), b.state_dict(), spec)
    with pytest.raises(NonFiniteError, match="an output of '0' is NaN or infinite"):
        align(a, b, ActivationMatching([torch.full((2, 2, 8, 8), float("inf"))]), spec=spec)
    with pytest.raises(PermgraphError, match="unknown measure 'cosine'"):
        ActivationMatching(IMAGES, "cosine")
    with pytest.raises(PermgraphError, match="weight=-1"):
        ActivationMatching(IMAGES, weight=-1)
    linear = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    with pytest.raises(PermgraphError, match="single sample for '0'"):
        align(*linear, ActivationMatching([torch.randn(1, 3)]))
    align(*linear, ActivationMatching([torch.randn(1, 3)], "inner"))


def test_begins_where_it_is_told_and_says_what_it_saw():
    a = convolutional(0)
    spec = permgraph.auto_spec(a)
    b, secret = renumbered(a, spec, 1)
    fit = align(a, b, ActivationMatching(IMAGES, matcher=WeightMatching(init=secret)), spec=spec)
    assert fit.permutation == secret
    assert fit.sweeps == 1

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(2, 6))

        def forward(self, x):
            return torch.relu(x @ self.up.T) @ self.down.T

    spec = permgraph.PermutationSpec.parse("up  6x3  h .\ndown  2x6  . h\ngroups: h 6")
    a, x = Bare(), [torch.randn(9, 3)]
    b, secret = renumbered(a, spec, 1)
    modules = align(a, b, ActivationMatching(x, tensors="modules"), spec=spec)
    assert modules.permutation.is_identity
    assert modules.notes[-1] == "no module output carries h, so they stay as they are"
    # The tensors inside carry it, whatever the spec calls it.
    assert align(a, b, ActivationMatching(x), spec=spec).permutation == secret


class Attention(nn.Module):
    """Heads without a module of their own, and a gate that no module makes."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(5, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.randn(7, width))
        self.back = nn.Parameter(torch.randn(width, 7))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        batch, tokens, _ = x.shape
        x = self.embed(x)
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.mT, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        x = x + torch.relu_(x @ self.gate.T) @ self.back.T
        return self.head(x).mean(1)


TOKENS = [torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(k)) for k in range(3)]


@pytest.mark.parametrize("tensors", ["auto", "graph"])
@pytest.mark.parametrize("measure", ["correlation", "covariance", "inner"])
def test_any_tensor_of_the_forward_pass_can_carry_a_group(tensors, measure):
    torch.manual_seed(0)
    a = Attention().eval()
    spec = permgraph.auto_spec(a, (TOKENS[0],))
    b, secret = renumbered(a, spec, 1)
    loader = [*TOKENS, TOKENS[0][:2]]  # the last batch of a loader is often smaller
    fit = align(a, b, ActivationMatching(loader, measure, tensors=tensors), spec=spec)
    assert fit.permutation == secret
    assert fit.notes == ()
    assert align(a, b, ActivationMatching(loader, measure, tensors="modules"), spec=spec).permutation != secret


def test_replayed_tensors_are_those_of_the_modules():
    """The same network both times: what the replay shows must be what the modules' hooks see."""
    a = convolutional(0)
    spec = permgraph.auto_spec(a)
    hooked: dict[str, torch.Tensor] = {}
    copied = copy.deepcopy(a)
    for name in ("0", "1", "3", "6"):
        copied.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: hooked.update({name: out.clone()})
        )
    with torch.no_grad():
        copied(IMAGES[1])
        replay = Replay((a, a), (a.state_dict(), a.state_dict()), spec, ((IMAGES[0],), {}))
        seen = []
        replay.run(((IMAGES[1],), {}), 1, replay.sites, lambda site, x, y: seen.append((site, x, y)))
    assert all(torch.equal(x, y) for _, x, y in seen)
    for name, output in hooked.items():
        units = output.transpose(0, 1).flatten(1)
        assert any(x.shape == units.shape and torch.allclose(x, units, atol=1e-5) for _, x, _ in seen), name


def test_replay_leaves_buffers_inputs_and_random_state_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(2, 6))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            x.mul_(2)
            return torch.relu(x @ self.up.T + 0 * torch.rand(())) @ self.down.T

    a, b, x = Counting(), Counting(), torch.randn(9, 3)
    spec = permgraph.auto_spec(a, (torch.randn(9, 3),))
    kept, random_state = x.clone(), torch.get_rng_state()
    align(a, b, ActivationMatching([x], tensors="graph"), spec=spec)
    assert torch.equal(x, kept)
    assert float(a.calls) == float(b.calls) == 0
    assert torch.equal(torch.get_rng_state(), random_state)


def test_says_why_tensors_inside_could_not_be_compared():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(2, 6))

        def forward(self, x):
            hidden = torch.relu(x @ self.up.T)
            return hidden @ self.down.T if hidden.sum() > 0 else hidden @ self.down.T * 2

    a, b, x = Branching(), Branching(), [torch.randn(9, 3)]
    spec = permgraph.auto_spec(a, (x[0],))
    fit = align(a, b, ActivationMatching(x), spec=spec)
    reason = "only the outputs of modules were compared: the path through Branching depends on values"
    assert any(note.startswith(reason) for note in fit.notes)
    with pytest.raises(MismatchError, match="depends on values"):
        align(a, b, ActivationMatching(x, tensors="graph"), spec=spec)
    other = permgraph.PermutationSpec.parse("up  6x3  [h + 3] .\ndown  2x6  . [h + 3]\ngroups: h 3")
    plain = nn.Module.__new__(type("Plain", (Branching,), {"forward": lambda self, x: x @ self.up.T @ self.down.T}))
    Branching.__init__(plain)
    with pytest.raises(MismatchError, match="the spec is not the one that inference gives for Plain"):
        align(plain, plain, ActivationMatching(x, tensors="graph"), spec=other)


def test_networks_of_other_precision_and_wide_tensors():
    a = convolutional(0)
    spec = permgraph.auto_spec(a)
    b, secret = renumbered(a, spec, 1)
    for tensors in ("modules", "graph"):
        fit = align(a, copy.deepcopy(b).double(), ActivationMatching(IMAGES, tensors=tensors), spec=spec)
        assert fit.permutation == secret
        assert fit.state_dict["0.weight"].dtype == torch.float64
        assert fit.state_dict["0.weight"].device == a[0].weight.device
    narrow = align(a, b, ActivationMatching(IMAGES, max_units=8), spec=spec)
    assert "'6' has 12 units, more than max_units=8, and is left out" in narrow.notes
    assert "no tensor that was compared carries 6.weight, so they stay as they are" in narrow.notes


@pytest.mark.parametrize("tensors", ["modules", "graph"])
def test_refuses_bad_batches_however_it_looks(tensors):
    a, b = convolutional(0), convolutional(1)
    spec = permgraph.auto_spec(a)
    with pytest.raises(PermgraphError, match="gave no batch"):
        align(a, b, ActivationMatching([], tensors=tensors), spec=spec)
    with pytest.raises(PermgraphError, match="max_units=0"):
        ActivationMatching(IMAGES, max_units=0, tensors=tensors)
    with pytest.raises(NonFiniteError, match="is NaN or infinite"):
        align(a, b, ActivationMatching([torch.full((2, 2, 8, 8), float("inf"))], tensors=tensors), spec=spec)
    with pytest.raises(PermgraphError, match="batch 2 of the loader|does not run"):
        align(a, b, ActivationMatching([IMAGES[0], torch.zeros(4, 3, 8, 8)], tensors=tensors), spec=spec)
    linear = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    for measure in ("correlation", "covariance"):
        with pytest.raises(PermgraphError, match=r"a single sample for .* needs two or more"):
            align(*linear, ActivationMatching([torch.randn(1, 3)], measure, tensors=tensors))
    with pytest.raises(PermgraphError, match="unknown tensors 'all'"):
        ActivationMatching(IMAGES, tensors="all")


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_scores_that_a_mask_has_set_to_the_least_number_are_no_samples(least: float) -> None:
    x, y = torch.randn(3, 40), torch.randn(3, 40)
    masked = torch.arange(40) % 4 == 0
    without, with_mask = Moments(), Moments()
    without.add(x[:, ~masked], y[:, ~masked])
    with_mask.add(*(z.masked_fill(masked, least) for z in (x, y)))
    assert torch.equal(with_mask.correlation(""), without.correlation(""))
