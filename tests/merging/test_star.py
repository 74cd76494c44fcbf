"""The centre of a star, trained to be connected to all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from permgraph.connectivity import evaluate_on, star_connectivity
from permgraph.errors import EvaluationError, MismatchError
from permgraph.merging import average, fit_star

X = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
LOADER = [(X, (X[:, 0] * X[:, 1] > 0).long())]


def fast(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def trained(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 2))
        descent = fast(list(net.parameters()))
        for _ in range(60):
            descent.zero_grad()
            nn.functional.cross_entropy(net(X), LOADER[0][1]).backward()
            descent.step()
    return net.eval()


NETWORKS = [trained(seed) for seed in range(3)]


def test_the_centre_is_nearer_to_all_than_the_mean() -> None:
    evaluate = evaluate_on(LOADER)
    before = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in NETWORKS]
    random = torch.random.get_rng_state()
    star = fit_star(NETWORKS, LOADER, epochs=150, optimizer=fast, seed=1)
    assert torch.equal(random, torch.random.get_rng_state())
    found = star_connectivity(star.state_dict, NETWORKS, None, evaluate, 0.1, model=NETWORKS[0])
    mean = star_connectivity(average(NETWORKS), NETWORKS, None, evaluate, 0.1, model=NETWORKS[0])
    assert found.highest < 0.6 * mean.highest
    assert sum(star.history[-10:]) < sum(star.history[:10])
    for net, state in zip(NETWORKS, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    again = fit_star(NETWORKS, LOADER, epochs=150, optimizer=fast, seed=1)
    assert again.history == star.history


def test_it_begins_where_it_is_told() -> None:
    started = fit_star(NETWORKS, LOADER, init=NETWORKS[2], epochs=0)
    assert all(torch.equal(tensor, started.state_dict[name]) for name, tensor in NETWORKS[2].state_dict().items())
    mean = fit_star([net.state_dict() for net in NETWORKS], LOADER, epochs=0, model=NETWORKS[0]).state_dict
    assert all(torch.allclose(tensor, mean[name]) for name, tensor in average(NETWORKS).items())


def test_refusals() -> None:
    with pytest.raises(MismatchError, match="it needs at least two"):
        fit_star(NETWORKS[:1], LOADER)
    with pytest.raises(MismatchError, match="network 1"):
        fit_star([NETWORKS[0], nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()], LOADER)
    with pytest.raises(EvaluationError, match=r"networks\[1\] must be in evaluation mode"):
        fit_star([NETWORKS[0], nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 2))], LOADER)
    with pytest.raises(EvaluationError, match="the loader gave no batch"):
        fit_star(NETWORKS, [])
