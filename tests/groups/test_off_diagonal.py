"""Losses over all pairs of different units, in whichever way the diagonal is left out; and what is not all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg

X = (torch.randn(6, 3),)
EIGHT = math.lgamma(8 + 1)


def viewed(c: Tensor) -> Tensor:
    """As in Barlow Twins and VICReg."""
    n = len(c)
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def reshaped(c: Tensor) -> Tensor:
    n = len(c)
    return c.reshape(-1)[1:].view(n - 1, n + 1)[:, :-1].reshape(-1)


def masked(c: Tensor) -> Tensor:
    return c[~torch.eye(len(c), dtype=torch.bool)]


def selected(c: Tensor) -> Tensor:
    return c.masked_select(torch.eye(len(c)) == 0)


def chosen(c: Tensor) -> Tensor:
    return c[(1 - torch.eye(len(c))).bool()]


class Loss(nn.Module):
    """A number made of the products of all pairs of units."""

    def __init__(self, forward: Callable[[Loss, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(3, 8)
        self.take = forward
        self.weights: Tensor
        self.register_buffer("weights", torch.rand(56), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self, x)


def products(m: Loss, x: Tensor) -> Tensor:
    h = m.a(x)
    return h.T @ h / len(x)  # type: ignore[no-any-return]


def barlow_twins(m: Loss, x: Tensor) -> Tensor:
    one, two = m.a(x), m.a(x + 0.1)
    c = (one - one.mean(0)).T @ (two - two.mean(0)) / len(x)
    on = torch.diagonal(c).add_(-1).pow_(2).sum()
    return on + 0.005 * viewed(c).pow_(2).sum()


def vicreg(m: Loss, x: Tensor) -> Tensor:
    h = m.a(x)
    h = h - h.mean(0)
    std = torch.sqrt(h.var(0) + 1e-4)
    cov = h.T @ h / (len(x) - 1)
    return F.relu(1 - std).mean() + viewed(cov).pow(2).sum().div(8)


FREE: dict[str, tuple[Callable[[Loss, Tensor], Tensor], float]] = {
    **{
        take.__name__: (lambda m, x, take=take: take(products(m, x)).pow(2).sum(), EIGHT)
        for take in (viewed, reshaped, masked, selected, chosen)
    },
    "barlow twins": (barlow_twins, EIGHT),
    "vicreg": (vicreg, EIGHT),
    "mean of absolute values": (lambda m, x: viewed(products(m, x)).abs().mean(0), EIGHT),
    "the largest": (lambda m, x: viewed(products(m, x)).max(), EIGHT),
    "two numbers": (lambda m, x: (y := viewed(products(m, x))).sum() + y.exp().mean(), EIGHT),
    "of two layers, whose units become one axis": (lambda m, x: viewed(m.a(x).T @ m.b(x)).pow(2).sum(), EIGHT),
    "as rows": (lambda m, x: products(m, x).flatten()[:-1].view(7, 9)[:, 1:].pow(3).sum(), EIGHT),
}

PINNED: dict[str, Callable[[Loss, Tensor], Tensor]] = {
    "each pair has a weight": lambda m, x: (viewed(products(m, x)) * m.weights).sum(),
    "their order": lambda m, x: viewed(products(m, x)).cumsum(0).max(),
    "some of them": lambda m, x: viewed(products(m, x))[:20].sum(),
    "all of them are returned": lambda m, x: viewed(products(m, x)),
    "the other corner is left out": lambda m, x: products(m, x).flatten()[:-1].view(7, 9)[:, :-1].pow(2).sum(),
    "another one is left out": lambda m, x: products(m, x)[
        ~torch.eye(8, dtype=torch.bool).roll(1, 0)
    ].pow(2).sum(),
    "a row is left out": lambda m, x: products(m, x)[1:].pow(2).sum(),
    "two orders": lambda m, x: (viewed(products(m, x)) * reshaped(products(m, x).T)).sum(),
}  # fmt: skip


def error(model: nn.Module, spec: pg.PermutationSpec) -> float:
    model, x = model.double(), X[0].double()
    with torch.no_grad():
        before = model(x)
        model.load_state_dict(spec.random(seed=1, every_group=True).apply(model.state_dict()))
        return float((model(x) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", FREE)
@pytest.mark.filterwarnings("ignore:.*cannot be seen.*")
def test_the_order_of_units_does_not_matter(name: str) -> None:
    forward, expected = FREE[name]
    torch.manual_seed(0)
    model = Loss(forward).eval()
    spec = pg.auto_spec(model, X)
    assert spec.log_order() == pytest.approx(expected), str(spec)
    assert error(model, spec) < 1e-9


@pytest.mark.parametrize("name", PINNED)
def test_it_does_where_pairs_are_told_apart(name: str) -> None:
    torch.manual_seed(0)
    model = Loss(PINNED[name]).eval()
    spec = pg.auto_spec(model, X)
    assert spec.log_order() <= (math.lgamma(7 + 1) if name == "a row is left out" else 0.0) + 1e-9, str(spec)
    assert not spec.moving or error(model, spec) < 1e-9


def test_of_all_pairs_no_other_permutation_passes() -> None:
    """Verification has controls, which must fail."""
    model = Loss(lambda m, x: viewed(m.a(x).T @ m.b(x)).pow(2).sum()).eval()
    spec = pg.auto_spec(model, X)
    proof = pg.verify(model, spec, X)
    assert proof.passed and all(control.change > 1e-6 for control in proof.controls)
