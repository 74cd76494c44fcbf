"""Ratios by layer that are learned, against those that are best by construction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import permgraph as pg


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).eval()


def _between(a: nn.Module, b: nn.Module, t: object) -> nn.Module:
    model = copy.deepcopy(a)
    model.load_state_dict(pg.interpolate(a, b, t))
    return model


def test_planted_ratios_come_back() -> None:
    a, b = _net(0), _net(1)
    planted = {"0.*": 0.3, "2.*": 0.8}
    x = torch.randn(300, 3)
    data = [(x, _between(a, b, planted)(x).detach())]
    found = pg.learn_ratios(a, b, data, nn.functional.mse_loss, epochs=150)
    assert found.ratios["0.weight"] == found.ratios["0.bias"] == pytest.approx(0.3, abs=0.01)
    assert found.ratios["2.weight"] == found.ratios["2.bias"] == pytest.approx(0.8, abs=0.01)
    assert found.losses[1] < 1e-4 < found.losses[0] and len(found.history) == 150
    with torch.no_grad():
        own = float(nn.functional.mse_loss(_between(a, b, found.ratios)(x), data[0][1]))
    assert own == pytest.approx(found.losses[1], abs=1e-6)


def test_by_parameter() -> None:
    a, b = _net(0), _net(1)
    planted = {"0.weight": 0.1, "0.bias": 0.9, "*": 0.5}
    x = torch.randn(300, 3)
    data = [(x, _between(a, b, planted)(x).detach())]
    found = pg.learn_ratios(a, b, data, nn.functional.mse_loss, by="parameter", epochs=200).ratios
    assert found["0.weight"] == pytest.approx(0.1, abs=0.03) and found["0.bias"] == pytest.approx(0.9, abs=0.03)


def test_where_it_does_not_fall_the_start_is_kept() -> None:
    a, b = _net(0), _net(1)
    x = torch.randn(50, 3)
    data = [(x, _between(a, b, 0.25)(x).detach())]
    found = pg.learn_ratios(a, b, data, nn.functional.mse_loss, start=0.25, epochs=3)
    assert set(found.ratios.values()) == {0.25} and found.losses[0] == found.losses[1]
    assert pg.learn_ratios(a, b, data, nn.functional.mse_loss, start=0.5, epochs=0).ratios["0.bias"] == 0.5


def test_buffers_go_with_their_layer_and_models_stay() -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval() for _ in "ab")
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    data = [(torch.randn(40, 3), torch.randint(2, (40,)))]
    found = pg.learn_ratios(a, b, data, epochs=5)
    assert found.ratios.keys() == before.keys()
    assert found.ratios["1.running_mean"] == found.ratios["1.weight"]
    assert all(torch.equal(a.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"loader": []}, "gave no batch"),
        ({"loader": iter([1])}, "only once"),
        ({"epochs": -1}, "cannot be negative"),
        ({"by": "group"}, "by"),
        ({"b": {"0.weight": torch.zeros(8, 3)}}, "is in A but not in B"),
    ],
)
def test_bad_input(how: dict, said: str) -> None:
    given = {"b": _net(1), "loader": [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], **how}
    with pytest.raises((pg.errors.PermgraphError, ValueError), match=said):
        pg.learn_ratios(_net(0), **given)
