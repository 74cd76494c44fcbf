"""Pooling, resampling and borders over dimensions that hold units: they pass where each window has its own indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import permgraph as pg
from tests.groups.test_layouts import Net, lin, par
from tests.groups.test_table import check, s

X = torch.randn(2, 5, 8, 4, generator=torch.Generator().manual_seed(0))  # batch, time, frequency, feature
Forward = Callable[[Tensor], Tensor]

# Of (batch, time, unit, frequency): along the units nothing happens.
BESIDE: dict[str, Forward] = {
    "largest of pairs": lambda y: F.max_pool2d(y, (1, 2)),
    "largest of three neighbours": lambda y: F.max_pool2d(y, (1, 3), (1, 1), (0, 1)),
    "with holes": lambda y: F.max_pool2d(y, (1, 3), (1, 2), 0, 2),
    "an incomplete window": lambda y: F.max_pool2d(y, (1, 3), (1, 3), 0, 1, ceil_mode=True),
    "mean of pairs": lambda y: F.avg_pool2d(y, (1, 2)),
    "mean with a border": lambda y: F.avg_pool2d(y, (1, 3), (1, 1), (0, 1)),
    "mean without the border": lambda y: F.avg_pool2d(y, (1, 3), (1, 1), (0, 1), count_include_pad=False),
    "mean in three dimensions": lambda y: F.avg_pool3d(y, (1, 1, 2)),
    "adaptive mean": lambda y: F.adaptive_avg_pool2d(y, (None, 3)),
    "adaptive maximum": lambda y: F.adaptive_max_pool2d(y, (6, 3)),
    "power mean": lambda y: F.lp_pool2d(y, 3, (1, 2)),
    "nearest": lambda y: F.interpolate(y, scale_factor=(1.0, 2.0)),
    "bilinear": lambda y: F.interpolate(y, size=(6, 11), mode="bilinear"),
    "bicubic": lambda y: F.interpolate(y, size=(6, 11), mode="bicubic", align_corners=True),
    "smoothed": lambda y: F.interpolate(y, size=(6, 3), mode="bilinear", antialias=True),
    "reflected border": lambda y: F.pad(y, (2, 1, 0, 0), mode="reflect"),
    "circular border": lambda y: F.pad(y, (2, 1, 0, 0), mode="circular"),
    "strips": lambda y: F.unfold(y, (1, 3)).unflatten(-1, (6, -1)).unflatten(1, (5, 3)).mean(2),
}  # fmt: skip

# The same, where the units have neighbours, or their places are read.
ACROSS: dict[str, Forward] = {
    "a stride": lambda y: F.max_pool2d(y, (1, 2), (2, 2)),
    "neighbours": lambda y: F.max_pool2d(y, (3, 1), 1, (1, 0)),
    "neighbours with holes": lambda y: F.max_pool2d(y, (2, 1), (2, 1), 0, (3, 1)),
    "a border": lambda y: F.max_pool2d(y, (2, 1), (2, 1), (1, 0)),
    "a border that counts": lambda y: F.avg_pool2d(y, (2, 1), (2, 1), (1, 0)),
    "an incomplete window": lambda y: F.avg_pool2d(y, (4, 1), (4, 1), ceil_mode=True),
    "two windows that cover all": lambda y: F.avg_pool2d(y, (6, 1), (1, 1), (1, 0)),
    "adaptive, with common indices": lambda y: F.adaptive_avg_pool2d(y, (4, None)),
    "the same size at another scale": lambda y: F.interpolate(y, scale_factor=(1.1, 1.0), mode="bicubic"),
    "a reflected border": lambda y: F.pad(y, (0, 0, 1, 1), mode="reflect"),
    "places that are read": lambda y: sum(F.max_pool2d(y, (1, 2), return_indices=True)),
    "places to go back to": lambda y: F.max_unpool2d(*F.max_pool2d(y, (1, 2), return_indices=True), (1, 2)),
    "strips": lambda y: F.unfold(y, (1, 3), padding=(1, 0)).unflatten(1, (5, 3)).mean(2).unflatten(-1, (8, -1)),
}  # fmt: skip


def _beside(function: Forward) -> Net:
    """Units between two linear maps, as a dimension of space."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = function(torch.relu(m.a(x)).transpose(-1, -2))
        return m.o(y.mean(-1))

    return Net(forward, a=lin(4, 6), o=lin(function(torch.randn(2, 5, 6, 8)).shape[2], 3))


@pytest.mark.parametrize("name", BESIDE)
def test_units_that_no_window_joins_pass(name: str) -> None:
    check(_beside(BESIDE[name]), (X,), s(6))


@pytest.mark.parametrize("name", ACROSS)
def test_units_that_windows_tell_apart_stay_put(name: str) -> None:
    net = _beside(ACROSS[name])
    spec = pg.auto_spec(net, (X,))
    assert spec.log_order() == 0
    assert not spec.unknown_ops


# Of (batch, 18 units), in windows of three or of all.
MAXOUT: dict[str, tuple[Forward, int, float]] = {
    "largest of three": (lambda y: F.max_pool1d(y[:, None], 3)[:, 0], 6, s(6) + 6 * s(3)),
    "mean of three": (lambda y: F.avg_pool1d(y[:, None], 3)[:, 0], 6, s(6) + 6 * s(3)),
    "six adaptive": (lambda y: F.adaptive_max_pool1d(y[:, None], 6)[:, 0], 6, s(6) + 6 * s(3)),
    "largest of all": (lambda y: F.max_pool1d(y[:, None], 18, 1)[:, 0], 1, s(18)),
    "in a plane": (lambda y: F.max_pool2d(y.view(-1, 1, 6, 3), (2, 3))[:, 0, :, 0], 3, s(3) + 3 * s(6)),
    "columns": (lambda y: F.unfold(y.view(-1, 1, 1, 18), (1, 3), stride=3).amax(1), 6, s(6) + 6 * s(3)),
    "windows": (lambda y: y.unfold(1, 3, 3).amax(-1), 6, s(6) + 6 * s(3)),
    "one window": (lambda y: y.unfold(1, 18, 1).amax(-1), 1, s(18)),
    "one left over": (lambda y: F.max_pool1d(y[:, None], 5)[:, 0], 3, 0.0),
    "overlapping": (lambda y: F.max_pool1d(y[:, None], 4, 2)[:, 0], 8, 0.0),
    "with a border": (lambda y: F.max_pool1d(y[:, None], 2, 2, 1)[:, 0], 10, 0.0),
    "overlapping windows": (lambda y: y.unfold(1, 4, 2).amax(-1), 8, 0.0),
}


@pytest.mark.parametrize("name", MAXOUT)
def test_windows_and_their_units(name: str) -> None:
    function, left, order = MAXOUT[name]
    net = Net(lambda m, x: m.o(function(m.a(x))), a=lin(4, 18), o=lin(left, 2))
    check(net, (X[0, :, 0],), order)


def test_a_table_that_is_resized_passes_only_while_its_size_is_asked_for() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        table = F.interpolate(m.table[None], size=x.shape[1], mode="linear")[0]
        return m.o(x.mean(1) + table.square().mean(1))

    net = Net(forward, table=par(4, 5), o=lin(4, 2))
    spec = pg.auto_spec(net, (X[:, :, 0],))
    assert spec.log_order() == 0


CHOSEN: dict[str, tuple[Forward, float]] = {
    "among units": (lambda y: F.max_pool2d(y, (1, 2)).mean((0, 1, 3)).argmax(), s(6)),
    "among units that may be zero": (lambda y: F.max_pool2d(y.relu(), (1, 2)).amax((0, 1, 3)).argmax(), 0.0),
    "among units and neighbours": (lambda y: F.max_pool2d(y, (1, 3), 1, (0, 1))[0, 0, :, 0].argmax(), s(6)),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_unit_with_the_largest_window(name: str) -> None:
    function, order = CHOSEN[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.table.index_select(0, function(m.a(x).transpose(-1, -2)).view(1)))

    check(Net(forward, a=lin(4, 6), table=par(6, 3), o=lin(3, 2)), (X,), order + s(3))
