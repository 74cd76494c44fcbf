"""Estimates against what is counted or measured."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.matching.cost import Rates, calibrate, estimate

RATES = Rates(flops=1e9, assignment=(1e-9, 3.0), read=1e6, network=1e6)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.head(x + self.attention(y, y, y)[0])


def test_a_flat_network_by_hand() -> None:
    cost = estimate(pg.auto_spec(mlp(8, 16, 12, 4)))
    # Two Gram matrices for each weight, one on either side, and one for each bias that moves.
    assert cost.flops == 2 * 16 * (8 * 16 + 16 + 12 * 16) + 2 * 12 * (12 * 16 + 12 + 4 * 12)
    assert cost.problems == {16: 1, 12: 1}
    assert cost.gram == 4 * 16 * 16
    assert cost.elements == sum(p.numel() for p in mlp(8, 16, 12, 4).parameters())
    assert [len(together) for together in cost.rounds] == [1, 1]
    # Three models, both Gram matrices, which are kept, the one at work with one beside it, the solver's costs in
    # float64, and the largest parameter in both models.
    kept = 4 * (16 * 16 + 12 * 12)
    assert cost.memory() == 3 * 4 * cost.elements + kept + 2 * 4 * 16 * 16 + 8 * 16 * 16 + 2 * 4 * 16 * 12


def test_nested_groups_solve_a_problem_for_every_pair_of_parents() -> None:
    cost = estimate(pg.auto_spec(Attention(24, 4), torch.randn(2, 5, 24)))
    # Two groups of 6 channels: in each pair of 4 heads, then in each head as chosen, and once more on their own.
    assert cost.problems == {6: 2 * (4 * 4 + 4 + 4), 4: 1}
    assert [move.kept for move in cost.moves if move.size == 4] == [0]
    # In each pair the channels' values are sums of few products as long as the axes around are not in order.
    assert [dict(move.nested) for move in cost.moves if move.size == 4] == [{6: 4 * 4}]
    hard = Rates(flops=math.inf, assignment=(1e-9, 3.0), network=math.inf, blunt=((4, 1.0), (8, 8.0)))
    nested = sum(count for move in cost.moves for _, count in move.nested)
    assert cost.seconds(hard) == pytest.approx(nested * 6.0**3 / 4**3, rel=1e-6)
    assert cost.seconds(hard, passes=9) == pytest.approx(cost.seconds(hard), rel=1e-6)  # the first pass alone


def test_groups_of_one_round_share_no_parameter() -> None:
    spec = pg.auto_spec(mlp(8, 16, 12, 10, 6, 4))
    cost = estimate(spec)
    coupling = spec.coupling()
    assert sorted(group for together in cost.rounds for group in together) == sorted(spec.moving)
    for together in cost.rounds:
        assert not [(a, b) for a in together for b in together if a != b and coupling.has_edge(a, b)]


def test_memory_of_a_streamed_run_is_that_of_its_largest_parameter() -> None:
    narrow, deep = estimate(pg.auto_spec(mlp(64, 64, 64, 4))), estimate(pg.auto_spec(mlp(64, *[64] * 12, 4)))
    assert narrow.memory(2, streamed=True) == deep.memory(2, streamed=True)
    assert deep.memory() > 3 * narrow.memory()
    assert deep.memory(2, streamed=True, cache=1 << 20) - deep.memory(2, streamed=True) == 1 << 20


def test_more_workers_take_less_time_but_for_what_they_send() -> None:
    cost = estimate(pg.auto_spec(mlp(64, 128, 128, 4)))
    fast = Rates(flops=1e6, assignment=(0.0, 3.0), network=math.inf)
    assert cost.seconds(fast, workers=4) == pytest.approx(cost.seconds(fast) / 4)
    assert cost.seconds(RATES, workers=4) > cost.seconds(RATES) / 4
    assert cost.seconds(RATES, passes=3) == pytest.approx(3 * cost.seconds(RATES))
    assert cost.seconds(RATES, streamed=True) > cost.seconds(RATES)
    with pytest.raises(pg.errors.PermgraphError, match="workers=0"):
        cost.seconds(RATES, workers=0)


def test_a_model_without_weights_is_planned() -> None:
    with torch.device("meta"):
        model = mlp(1 << 15, 1 << 15, 1 << 15, 10)
    cost = estimate(pg.auto_spec(model))
    assert cost.gram == 4 << 30
    # Within one model and the largest Gram matrix beyond the two models, with what a step needs.
    assert 3 * 4 * cost.elements <= cost.memory() <= 3 * 4 * cost.elements + 1.1 * cost.gram


def test_nothing_to_permute_costs_nothing() -> None:
    cost = estimate(pg.auto_spec(nn.Linear(3, 2)))
    assert (cost.moves, cost.flops, cost.gram, cost.seconds(RATES)) == ((), 0, 0, 0.0)


def test_calibration_finds_a_machine() -> None:
    rates = calibrate(0.2)
    assert 1e7 < rates.flops < 1e15
    assert 0 < rates.assigning(512) < rates.assigning(1024) < 60
    for size in (16, 128, 300, 512, 1024, 2048, 4096):
        assert rates.assigning(size, blunt=True) >= rates.assigning(size)
    assert rates.assigning(512, blunt=True) > 2 * rates.assigning(512)
