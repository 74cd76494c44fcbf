"""State dicts that load each tensor when it is asked for it: one that is gone leaves its address to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.weights.identity import SameTensor, are_same


class LoadsOnAccess(Mapping[str, Any]):
    """As a checkpoint is: a new tensor each time."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(12))).eval()


def loss(model: nn.Module) -> float:
    return float(sum(parameter.square().sum() for parameter in model.parameters()))


def test_no_layer_is_taken_for_another() -> None:
    a, b, c = (network(seed).state_dict() for seed in range(3))
    lazy = [LoadsOnAccess(state) for state in (a, b, c)]
    expected, found = pg.compare_spectra(a, b), pg.compare_spectra(*lazy[:2])
    assert list(found.layers) == list(expected.layers) and len(found.layers) == 12
    assert found.distance == pytest.approx(expected.distance)
    for mixed, whole in (
        (pg.interpolate(*lazy[:2], 0.25), pg.interpolate(a, b, 0.25)),
        (pg.average(lazy), pg.average([a, b, c])),
        (network(0).state_dict(), pg.auto_spec(network(0)).identity().apply(lazy[0])),
    ):
        assert all(torch.equal(mixed[name], whole[name]) for name in a)
    surfaces = [pg.loss_surface(*states, loss, points=2, model=network(0)) for states in ((a, b, c), lazy)]
    assert [*surfaces[1].corners[1], *surfaces[1].corners[2]] == pytest.approx(
        [*surfaces[0].corners[1], *surfaces[0].corners[2]]
    )
    by_layer = [pg.layerwise_barriers(*states[:2], loss, 3, model=network(0)) for states in ((a, b), lazy)]
    assert by_layer[1].barriers == by_layer[0].barriers


def test_identity_holds_what_it_compares() -> None:
    same = SameTensor()
    names = [same.first_name(f"w{n}", torch.zeros(1000)) for n in range(50)]
    assert names == [f"w{n}" for n in range(50)]
    weight, empty = torch.zeros(4, 4), torch.zeros(0, 4)
    assert same.first_name("tied", weight) == "tied" and same.first_name("view", weight.view(4, 4)) == "tied"
    assert same.first_name("transposed", weight.T) == "transposed"
    assert same.first_name("none", empty) == "none" and same.first_name("nor this", empty.clone()) == "nor this"
    assert are_same(weight, weight.detach()) and not are_same(weight, weight.clone())
