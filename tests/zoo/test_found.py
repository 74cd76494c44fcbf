"""What the zoos brought to light, each as the smallest module that shows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import permgraph as pg


class KeepsWhatItComputed(nn.Module):
    """In evaluation mode a table that is computed from the weights is kept for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 7), nn.Linear(7, 2)
        self.scales = nn.Parameter(torch.ones(7))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "scales" not in self.kept:
            self.kept["scales"] = self.scales.exp()
        return self.second(self.first(x).relu() * self.kept["scales"])


def test_a_module_that_keeps_what_it_computed_is_verified_afresh() -> None:
    model = KeepsWhatItComputed()
    spec = pg.auto_spec(model)
    assert [group.size for group in spec.moving.values()] == [7]
    found = pg.verify(model, spec, controls="all")
    assert found.passed
    assert {(control.parameter, control.passed) for control in found.controls} >= {("scales", True)}
    assert model.kept == {}


class Skewed(nn.Module):
    """A matrix is padded by a row and viewed with longer rows, so that each is shifted against the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.keys(x)
        scores = keys @ keys.transpose(-1, -2)
        n = scores.shape[-1]
        padded = nn.functional.pad(scores, (0, 0, 0, 1))
        return padded.view(-1, n, n + 1)[..., :-1].relu()


def test_a_skewed_matrix_keeps_its_rows_and_lets_the_rest_move() -> None:
    model, x = Skewed(), torch.randn(2, 600, 5)
    spec = pg.auto_spec(model, (x,))
    assert [group.size for group in spec.moving.values()] == [6]
    assert pg.verify(model, spec, (x,))


class Halo(nn.Module):
    """Scores against relative positions, padded, viewed with longer rows and tiled, as in halo attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.positions = nn.Linear(5, 6), nn.Parameter(torch.randn(27, 6))

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.query(x) @ self.positions.t()).reshape(-1, 8, 27)
        padded = nn.functional.pad(nn.functional.pad(scores, [0, 1]).flatten(1), [0, 19])
        shifted = padded.reshape(-1, 9, 27)[:, :8, 13:]
        return shifted.reshape(2, 8, 1, 8, 14).expand(-1, -1, 14, -1, -1).permute(0, 1, 3, 2, 4)


def test_halo_attention_s_positions_stay_and_its_channels_move() -> None:
    model, x = Halo(), torch.randn(2, 8, 8, 5)
    spec = pg.auto_spec(model, (x,))
    assert [group.size for group in spec.moving.values()] == [6]
    assert pg.verify(model, spec, (x,))
