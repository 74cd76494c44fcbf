"""`align` on modules and on state dicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from permgraph.errors import MismatchError
from permgraph.matching import Matcher, WeightMatching, align
from permgraph.spec import PermutationSpec
from tests.matching.examples import NORMED, SPECS, planted, renumbered, state


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    model(torch.randn(50, 4))
    return model.eval()


def test_modules():
    a = network(0)
    b = renumbered(a, 1)
    before = {name: t.clone() for name, t in b.state_dict().items()}
    b.train()
    fit = align(a, b, spec=NORMED)
    for name, tensor in a.state_dict().items():
        assert torch.equal(fit.state_dict[name], tensor)
        assert torch.equal(b.state_dict()[name], before[name])
    model = fit.model()
    assert model is not b
    assert model.training
    x = torch.randn(9, 4)
    assert torch.allclose(model.eval()(x), b.eval()(x), atol=1e-6)
    assert all(torch.equal(b.state_dict()[name], before[name]) for name in before)
    assert fit.outcome == "converged"
    assert fit.objective > fit.objective_before
    assert fit.sweeps == len(fit.history)
    assert "converged after" in str(fit)


def test_a_spec_is_inferred_from_a_module():
    a = network(0)
    fit = align(a, renumbered(a, 1))
    assert fit.permutation.spec.log_order() == pytest.approx(NORMED.log_order())
    assert all(torch.equal(fit.state_dict[name], tensor) for name, tensor in a.state_dict().items())


def test_state_dicts():
    a, b, secret = planted(SPECS["attention"], 1)
    fit = align(a, b, WeightMatching(restarts=2), spec=SPECS["attention"], seed=4)
    assert fit.permutation == secret
    assert fit.seed == 4
    assert list(fit.state_dict) == list(b)
    with pytest.raises(MismatchError, match="no module to return"):
        fit.model()
    with pytest.raises(MismatchError, match="give align\\(\\) a spec="):
        align(a, b)


def test_the_first_difference_is_named():
    spec = SPECS["mlp"]
    a, b = state(spec, 1), state(spec, 2)
    with pytest.raises(MismatchError, match=r"'l2.weight' has shape \(12, 16\) in A but \(12, 15\) in B"):
        align(a, {**b, "l2.weight": b["l2.weight"][:, :15]}, spec=spec)
    with pytest.raises(MismatchError, match=r"B has no 'l1.bias', which A has with shape \(16,\)"):
        align(a, {n: t for n, t in b.items() if n != "l1.bias"}, spec=spec)
    with pytest.raises(MismatchError, match=r"A has no 'extra', which B has with shape \(2,\)"):
        align(a, {**b, "extra": torch.zeros(2)}, spec=spec)
    with pytest.raises(MismatchError, match="modules or state dicts, not a str"):
        align(a, "b.pt", spec=spec)
    with pytest.raises(MismatchError, match="the state dict has no .q."):
        align(a, b, spec=SPECS["attention"])


def test_dtypes_and_ties_are_kept():
    spec = PermutationSpec.parse("""
        embed.weight  11x6  . c
        lift.weight   6x3   c .
        head.weight = embed.weight
        groups: c 6
    """)
    a, b, _ = planted(spec, 1)
    b = {name: tensor.bfloat16() for name, tensor in b.items()}
    a["head.weight"], b["head.weight"] = a["embed.weight"], b["embed.weight"]
    fit = align(a, b, spec=spec)
    assert fit.state_dict["head.weight"] is fit.state_dict["embed.weight"]
    assert {tensor.dtype for tensor in fit.state_dict.values()} == {torch.bfloat16}


def test_a_model_with_nothing_to_permute():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    fit = align(a, b, spec=PermutationSpec.parse("weight  2x3  . .\nbias  2  ."))
    assert fit.permutation.is_identity
    assert fit.notes


def test_a_matcher_is_anything_that_matches():
    class Reverse:
        def match(self, a, b, spec, seed=0, progress=None):
            return WeightMatching(max_sweeps=0).match(a, b, spec, seed, progress)

    assert isinstance(Reverse(), Matcher)
    assert isinstance(WeightMatching(), Matcher)
    a = network(0)
    assert align(a, network(1), Reverse(), spec=NORMED).permutation.is_identity
