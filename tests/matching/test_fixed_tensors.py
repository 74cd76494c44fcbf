"""Fixed tensors that are the same in all networks: what they tell apart stays put, and nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg


class Masked(nn.Module):
    """After asymmetric networks: weights that a saved mask chooses, and fixed numbers elsewhere."""

    def __init__(self, seed: int, masked: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.mask: Tensor
        self.fixed: Tensor
        self.register_buffer("mask", torch.rand(5, 6, generator=generator).gt(0.4).float())
        self.register_buffer("fixed", torch.randn(5, 6, generator=generator))
        if not masked:
            self.mask.fill_(1)
            self.fixed.fill_(0)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        h = torch.relu(F.linear(h, self.mask * self.b.weight + (1 - self.mask) * self.fixed, self.b.bias))
        return self.c(h)  # type: ignore[no-any-return]


X = (torch.randn(3, 4),)


def pair(seed_of_b: int, masked: bool = True) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Masked(0, masked).eval(), Masked(seed_of_b, masked).eval()


def moved(fit: pg.Alignment) -> set[str]:
    return set(fit.permutation.spec.moving)


def test_masks_that_both_share_hold_their_units() -> None:
    a, b = pair(seed_of_b=0)
    assert {group.size for group in pg.auto_spec(a, X).groups.values()} == {6, 5}, "the mask moves with the weights"
    fit = pg.align(a, b, example_inputs=X)
    assert not moved(fit) and torch.equal(fit.state_dict["mask"], b.mask)  # type: ignore[arg-type]
    assert any("mask" in note and "2 groups stay put" in note for note in fit.notes)
    merged = pg.merge([a, b], example_inputs=X)
    assert torch.equal(merged.state_dict["mask"], a.mask)  # type: ignore[arg-type]
    assert any("2 groups stay put" in note for note in merged.notes)


@pytest.mark.parametrize("case", ["other masks", "masks of ones", "state dicts", "a parameter that is trained"])
def test_what_tells_no_units_apart_holds_none(case: str) -> None:
    a, b = pair(seed_of_b=1 if case == "other masks" else 0, masked=case != "masks of ones")
    spec = pg.auto_spec(a, X)
    if case == "state dicts":
        fit = pg.align(a.state_dict(), b.state_dict(), spec=spec)
    elif case == "a parameter that is trained":
        a, b = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval() for _ in "ab")
        with torch.no_grad():
            b[0].weight.copy_(a[0].weight)
        fit = pg.align(a, b)
        assert len(moved(fit)) == 1
        return
    else:
        fit = pg.align(a, b, example_inputs=X)
    assert moved(fit) == set(spec.moving)


def test_a_frozen_parameter_holds_its_units_and_no_others() -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in "ab")
    with torch.no_grad():
        for model in (a, b):
            model[4].weight.copy_(torch.arange(10.0).view(2, 5))
            model[4].weight.requires_grad_(False)
    planted = pg.auto_spec(a, X).random(seed=3)
    same = copy.deepcopy(a)
    same.load_state_dict(planted.apply(a.state_dict()))
    fit = pg.align(a, b, example_inputs=X)
    assert [fit.permutation.spec.groups[name].size for name in moved(fit)] == [6]
    assert len(moved(pg.align(a, same, example_inputs=X))) == 2, "renumbered, it is not the same"


def test_heads_of_which_the_channels_alone_are_told_apart() -> None:
    """A group over which others are fibred still names its axis."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1)
            self.scale: Tensor
            self.register_buffer("scale", torch.arange(3.0).repeat_interleave(2).view(6, 1, 1) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x) * self.scale))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = (torch.randn(2, 3, 4, 4),)
    a, b = Grouped().eval(), Grouped().eval()
    fit = pg.align(a, b, example_inputs=x)
    spec = fit.permutation.spec
    assert sorted(spec.groups[name].size for name in spec.moving) == [2, 2]
    assert torch.equal(fit.state_dict["scale"], a.scale)  # type: ignore[arg-type]
    assert pg.verify(b, permutation=fit.permutation, example_inputs=x).passed
