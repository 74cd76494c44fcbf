"""Channels that are shuffled again and again, as in ShuffleNet V2: families over sums that later shuffles make one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture import capture
from permgraph.capture.joined import joined
from permgraph.inference.auto_spec import spec_of

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _shuffled(x: Tensor) -> Tensor:
    batch, channels, *space = x.shape
    return x.view(batch, 2, channels // 2, *space).transpose(1, 2).reshape(x.shape)


class First(nn.Module):
    """Both branches see everything."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.left = nn.Sequential(nn.Conv2d(channels, half, 1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(channels, half, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return _shuffled(torch.cat((self.left(x), self.right(x)), 1))


class Further(nn.Module):
    """One half goes through, the other through two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.right = nn.Sequential(nn.Conv2d(half, half, 1), nn.ReLU(), nn.Conv2d(half, half, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return _shuffled(torch.cat((kept, self.right(changed)), 1))


def _network(channels: int, further: int) -> nn.Module:
    body = [First(channels), *(Further(channels) for _ in range(further))]
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2)
    return nn.Sequential(nn.Conv2d(3, channels, 3), *body, *ends)


@pytest.mark.parametrize("channels", [8, 16])
def test_one_shuffle_costs_nothing(channels: int) -> None:
    spec = pg.auto_spec(_network(channels, 0), (X,))
    assert spec.log_order() == pytest.approx(math.lgamma(channels + 1) + 2 * math.lgamma(channels // 2 + 1))


@pytest.mark.parametrize(("channels", "further"), [(8, 1), (8, 3), (8, 5), (16, 6)])
def test_many_shuffles_have_a_spec_that_holds(channels: int, further: int) -> None:
    """Each further block has at least the units between its two layers to itself."""
    model = _network(channels, further)
    spec = pg.auto_spec(model, (X,))
    assert pg.verify(model, spec, (X,), controls="none").passed
    assert spec.log_order() >= math.lgamma(channels + 1) + further * math.lgamma(channels // 2 + 1)


@pytest.mark.parametrize("further", [0, 1, 2])
def test_two_passes_of_shuffles_lose_nothing(further: int) -> None:
    """The sums in two passes are one before the families over them are compared."""
    model = _network(16, further)
    one, other = capture(model, (X,)), capture(model, (X.repeat(2, 1, 2, 2),))
    assert spec_of(joined((one, other))).log_order() == pytest.approx(spec_of(one).log_order())
