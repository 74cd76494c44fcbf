"""Layerwise linear feature connectivity: the definition, on networks where both sides are known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from permgraph.connectivity import feature_connectivity
from permgraph.errors import EvaluationError, MismatchError


def network(seed: int, *, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias)).eval()


def data(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(9))


def test_the_definition() -> None:
    a, b, x, t = network(0), network(1), data(), 0.3
    between = copy.deepcopy(a)
    for p, q in zip(between.parameters(), b.parameters(), strict=True):
        p.data = (1 - t) * p.data + t * q.data
    found = feature_connectivity(a, b, [x[:7], x[7:]], t)
    assert list(found.layers) == ["0", "1", "2"] and found.t == t
    with torch.no_grad():
        for depth, name in enumerate(found.layers, start=1):
            one, other, middle = (net[:depth](x) for net in (a, b, between))
            mean = (1 - t) * one + t * other
            layer = found.layers[name]
            assert layer.samples == len(x) and layer.skipped == 0
            assert layer.cosine == pytest.approx(nn.functional.cosine_similarity(middle, mean).mean().item(), abs=1e-5)
            scale = (middle * mean).sum(1) / (mean * mean).sum(1)
            assert layer.scale == pytest.approx(scale.mean().item(), rel=1e-4)
            assert layer.cosine_ends == pytest.approx(
                nn.functional.cosine_similarity(one, other).mean().item(), abs=1e-5
            )
    assert found.worst[0] == min(found.layers, key=lambda n: found.layers[n].cosine)
    assert str(found).count("\n") == 3


def test_a_network_with_itself_is_connected_and_the_first_layer_always_is() -> None:
    a, b = network(0), network(1)
    for layer in feature_connectivity(a, a, [data()]).layers.values():
        assert (layer.cosine, layer.scale, layer.cosine_ends) == pytest.approx((1, 1, 1), abs=1e-6)
    found = feature_connectivity(a, b, [data()]).layers
    assert (found["0"].cosine, found["0"].scale) == pytest.approx((1, 1), abs=1e-6)
    assert found["2"].cosine < 0.99 and found["0"].cosine_ends < 0.9


def test_the_scale_of_a_network_between_two_multiples_of_it() -> None:
    # Without biases every layer is homogeneous: with b = 3a the output between is (1 + 2t)² of a's, and their mean
    # 1 + 8t of it.
    a = network(0, bias=False)
    b = {name: 3 * tensor for name, tensor in a.state_dict().items()}
    found = feature_connectivity(a, b, [data()], t=0.5)
    assert found.layers["2"].cosine == pytest.approx(1, abs=1e-6)
    assert found.layers["2"].scale == pytest.approx(4 / 5, rel=1e-5)
    assert found.layers["1"].scale == pytest.approx(1, rel=1e-5)


def test_samples_without_direction_are_counted_and_left_out() -> None:
    a, b = network(0, bias=False), network(1, bias=False)
    x = data(10)
    x[:4] = 0
    found = feature_connectivity(a, b, [x])
    assert {layer.skipped for layer in found.layers.values()} == {4}
    assert found.layers["2"].cosine == pytest.approx(feature_connectivity(a, b, [x[4:]]).layers["2"].cosine)
    nothing = feature_connectivity(a, b, [torch.zeros(3, 4)])
    assert nothing.layers["0"].samples == 0 and nothing.layers["0"].cosine != nothing.layers["0"].cosine
    assert nothing.worst[1] != nothing.worst[1]


class Twice(nn.Module):
    """A module that runs twice, one that gives a tuple, one in place, and one that never runs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shared = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.rnn = nn.GRU(4, 5, batch_first=True)
        self.never = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.shared(self.act(self.shared(x))))
        return self.rnn(x[:, None])[0]


def test_modules_that_run_twice_give_tuples_or_work_in_place() -> None:
    with torch.random.fork_rng(devices=[]):
        a, b = Twice(0).eval(), Twice(1).eval()
    found = feature_connectivity(a, b, [data()])
    assert list(found.layers) == ["shared", "act", "shared#2", "act#2", "rnn"]
    # The activation in place must not reach what was seen of the layer before it, which is linear.
    assert found.layers["shared"].cosine == pytest.approx(1, abs=1e-6)
    with pytest.raises(EvaluationError, match="'never' was not called"):
        feature_connectivity(a, b, [data()], modules=["rnn", "never"])


def test_nothing_is_changed_and_names_choose() -> None:
    a, b = network(0), network(1)
    before = copy.deepcopy(a.state_dict())
    random_state = torch.get_rng_state()
    found = feature_connectivity(a, b.state_dict(), [data()], modules=["2"])
    assert list(found.layers) == ["2"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not a[2]._forward_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in a.state_dict().items())


def test_prepare_is_for_the_network_between() -> None:
    a, b = network(0), network(1)

    def put_a(net: nn.Module, t: float) -> nn.Module:
        assert t == 0.5
        return a

    with_a = feature_connectivity(a, a, [data()], prepare=put_a).layers["2"]
    assert with_a.cosine == pytest.approx(1, abs=1e-6)
    other = feature_connectivity(a, b, [data()], prepare=put_a).layers["0"]
    assert other.cosine < 0.99


def test_refusals() -> None:
    a, b = network(0), network(1)
    with pytest.raises(EvaluationError, match="no module '7'"):
        feature_connectivity(a, b, [data()], modules=["7"])
    with pytest.raises(EvaluationError, match="the loader gave no batch"):
        feature_connectivity(a, b, [])
    with pytest.raises(EvaluationError, match="b must be in evaluation mode"):
        feature_connectivity(a, copy.deepcopy(b).train(), [data()])
    with pytest.raises(EvaluationError, match="both state dicts"):
        feature_connectivity(a.state_dict(), b.state_dict(), [data()])
    with pytest.raises(MismatchError, match="'0.weight' has shape"):
        feature_connectivity(a, {**b.state_dict(), "0.weight": torch.zeros(1, 1)}, [data()])
