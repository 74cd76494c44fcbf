"""Hidden units of experts that tokens choose: each expert has an order of its own where no two experts' units meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg
from tests.groups.test_table import check, s

EXPERTS, UNITS, FEATURES, TOKENS = 3, 4, 5, 6
X = torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(0))

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Mixture(nn.Module):
    """Experts of one hidden layer each; `run` is given the tokens, and the weights and numbers of their experts."""

    def __init__(self, run: Forward, top: int) -> None:
        super().__init__()
        self.gate, self.gate2 = nn.Linear(FEATURES, EXPERTS), nn.Linear(FEATURES, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, FEATURES, UNITS))
        self.down = nn.Parameter(torch.randn(EXPERTS, UNITS, FEATURES))
        self.run, self.top = run, top

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x, *self.gate(x).softmax(-1).topk(self.top))


def hidden(m: Any, x: Tensor, j: Tensor) -> Tensor:
    return torch.bmm(x[:, None], m.up[j]).relu()[:, 0]


def result(m: Any, h: Tensor, j: Tensor) -> Tensor:
    return torch.bmm(h[:, None], m.down[j])[:, 0]


def slot_by_slot(m: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for k in range(m.top):
        j = chosen[:, k]
        y = y + weights[:, k, None] * result(m, hidden(m, x, j), j)
    return y


def unbound(m: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    slots = zip(weights.unbind(1), chosen.unbind(1), strict=True)
    return torch.stack([w[:, None] * result(m, hidden(m, x, j), j) for w, j in slots]).sum(0)


def all_at_once(m: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    h = torch.einsum("bd,btdi->bti", x, m.up[chosen]).relu()
    return torch.einsum("bti,btid,bt->bd", h, m.down[chosen], weights)


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("run", [slot_by_slot, unbound, all_at_once])
def test_each_expert_has_an_order_of_its_own(run: Forward, top: int) -> None:
    model = Mixture(run, top)
    del model.gate2
    check(model, (X,), s(EXPERTS) + EXPERTS * s(UNITS))


class GroupedRouter(nn.Module):
    """Experts in groups: the best groups of each token are chosen first, then the best experts of those groups."""

    GROUPS, EACH, top = 2, 3, 2

    def __init__(self) -> None:
        super().__init__()
        experts = self.GROUPS * self.EACH
        self.gate = nn.Linear(FEATURES, experts)
        self.up = nn.Parameter(torch.randn(experts, FEATURES, UNITS))
        self.down = nn.Parameter(torch.randn(experts, UNITS, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        grouped = scores.view(-1, self.GROUPS, self.EACH)
        of_group = grouped.topk(2)[0].sum(-1)
        mask = torch.zeros_like(of_group).scatter_(1, of_group.topk(1)[1], 1.0)
        allowed = mask[..., None].expand(grouped.shape).reshape(scores.shape)
        chosen = scores.masked_fill(allowed == 0, -torch.inf).topk(self.top)[1]
        return slot_by_slot(self, x, scores.gather(1, chosen), chosen)


def test_each_group_of_experts_has_an_order_of_its_own() -> None:
    # The groups may be renumbered, the experts within each, and the units of each expert: 2! (3!)^2 (4!)^6. The chosen
    # experts are numbers of (group expert), which tell the group, whatever other index there is of groups alone.
    groups, each = GroupedRouter.GROUPS, GroupedRouter.EACH
    check(GroupedRouter(), (X,), s(groups) + groups * s(each) + groups * each * s(UNITS))


def two_routers(m: Any, x: Tensor, j: Tensor, k: Tensor) -> Tensor:
    j, k = j, m.gate2(x).argmax(-1)
    return result(m, hidden(m, x, j), j) + result(m, hidden(m, x, k), k)


def shifted_rows(m: Any, x: Tensor, j: Tensor, k: Tensor) -> Tensor:
    h, later = hidden(m, x, j), hidden(m, x[1:], j[1:])
    return result(m, h, j).sum() + (h[:-1] * later).sum(-1)


MEETING: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "two routers": two_routers,
    "rows shifted against each other": shifted_rows,
    "up by one, down by the other": lambda m, x, j, k: result(m, hidden(m, x, j), k),
    "crossed": lambda m, x, j, k: result(m, hidden(m, x, j), k) + result(m, hidden(m, x, k), j),
    "multiplied": lambda m, x, j, k: (hidden(m, x, j) * hidden(m, x, k)).sum(-1) + result(m, hidden(m, x, j), j).sum(),
    "added": lambda m, x, j, k: result(m, hidden(m, x, j) + hidden(m, x, k), j),
    "other tokens": lambda m, x, j, k: result(m, hidden(m, x, j), j) @ x.T + hidden(m, x, j) @ hidden(m, x, j).T,
    "flipped": lambda m, x, j, k: result(m, hidden(m, x, j) + hidden(m, x, j).flip(0), j),
    "rolled": lambda m, x, j, k: result(m, hidden(m, x, j) + hidden(m, x, j).roll(1, 0), j),
    "known order": lambda m, x, j, k: result(m, hidden(m, x, j) + hidden(m, x, j)[[1, 0, 2, 3, 5, 4]], j),
    "padded": lambda m, x, j, k: result(m, hidden(m, x, j) + F.pad(hidden(m, x, j), (0, 0, 1, 0))[:-1], j),
    "turned": lambda m, x, j, k: result(m, hidden(m, x, j).view(2, 3, UNITS).transpose(0, 1).reshape(-1, UNITS), j),
    "stacked": lambda m, x, j, k: torch.einsum(
        "tbi,tbid->bd", torch.stack([hidden(m, x, k), hidden(m, x, j)]), m.down[torch.stack([j, k])]
    ),
    "one of both slots": lambda m, x, j, k: result(
        m, torch.einsum("bd,btdi->bti", x, m.up[torch.stack([j, k], 1)])[:, 1], j
    ),
}


@pytest.mark.parametrize("name", MEETING)
def test_no_order_is_invented_where_units_of_two_experts_meet(name: str) -> None:
    def run(m: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return MEETING[name](m, x, chosen[:, 0], chosen[:, 1])

    check_nothing_is_invented(lambda: Mixture(run, 2))


def check_nothing_is_invented(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model, moved = make().double(), make().double()
    spec = pg.auto_spec(model, (X.double(),))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for seed in range(12):  # each with tokens of its own, for a pair of experts must be chosen to be seen
            moved.load_state_dict(spec.random(seed=seed).apply(state))
            x = torch.randn(TOKENS, FEATURES, dtype=torch.float64)
            torch.testing.assert_close(moved(x), model(x), rtol=1e-9, atol=1e-9)


class Best(nn.Module):
    """The units of each expert and which of them is the largest, for all experts or for the one that a token chooses.

    `run` is given the units and the index of the largest.
    """

    def __init__(self, run: Callable[[Any, Tensor, Tensor, Tensor], Tensor], chosen: bool) -> None:
        super().__init__()
        self.gate, self.gate2 = nn.Linear(FEATURES, EXPERTS), nn.Linear(FEATURES, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, FEATURES, UNITS))
        self.mix = nn.Parameter(torch.randn(EXPERTS))
        self.run, self.chosen = run, chosen

    def forward(self, x: Tensor) -> Tensor:
        if self.chosen:
            units = self.units(x, self.gate(x))
            return self.run(self, x, units, units.argmax(-1))
        units = torch.einsum("td,edi->tei", x, self.up)
        return self.run(self, x, units, units.argmax(-1)) @ self.mix

    def units(self, x: Tensor, scores: Tensor) -> Tensor:
        return torch.einsum("td,tdi->ti", x, self.up[scores.argmax(-1)])


def at(units: Tensor, index: Tensor) -> Tensor:
    return units.gather(-1, index[..., None])[..., 0]


@pytest.mark.parametrize("chosen", [False, True])
def test_an_index_of_units_goes_with_its_expert(chosen: bool) -> None:
    # The index is that of the expert whose units it is used for: 3! (4!)^3.
    model = Best(lambda m, x, h, i: at(h, i.clone()[:, None][:, 0]), chosen)
    del model.gate2
    if chosen:
        del model.mix
    else:
        del model.gate
    check(model, (X,), s(EXPERTS) + EXPERTS * s(UNITS))


OF_ANOTHER_TOKEN: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "of another router's expert": lambda m, x, h, i: at(m.units(x, m.gate2(x)), i),
    "flipped": lambda m, x, h, i: at(h, i.flip(0)),
    "rolled": lambda m, x, h, i: at(h, i.roll(1, 0)),
    "known order": lambda m, x, h, i: at(h, i[[1, 0, 2, 3, 5, 4]]),
    "looked up": lambda m, x, h, i: at(h, i[x[:, 0].argsort()]),
    "gathered": lambda m, x, h, i: at(h, i.gather(0, x[:, 0].argsort())),
    "turned": lambda m, x, h, i: at(h, i.view(2, 3).T.reshape(-1)),
    "cut and joined": lambda m, x, h, i: at(h, torch.cat([i[1:], i[:1]])),
    "stacked": lambda m, x, h, i: h.gather(1, torch.stack([i.flip(0), i], 1)),
    "one of two": lambda m, x, h, i: at(h, torch.where(x[:, 0] > 0, i, i.flip(0))),
}
OF_ANOTHER_EXPERT: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "flipped": lambda m, x, h, i: at(h, i.flip(1)),
    "rolled": lambda m, x, h, i: at(h, i.roll(1, 1)),
    "looked up": lambda m, x, h, i: at(h, i[:, m.mix.argsort()]),
    "units looked up": lambda m, x, h, i: (h * h[:, m.mix.argsort()]).sum(-1),
    "units selected": lambda m, x, h, i: (h * h.index_select(1, m.mix.argsort())).sum(-1),
    "cut and joined": lambda m, x, h, i: at(h, torch.cat([i[:, 1:], i[:, :1]], 1)),
}


@pytest.mark.parametrize("name", OF_ANOTHER_TOKEN)
def test_no_order_is_invented_where_an_index_of_units_goes_to_another_token(name: str) -> None:
    check_nothing_is_invented(lambda: Best(OF_ANOTHER_TOKEN[name], chosen=True))


@pytest.mark.parametrize("name", OF_ANOTHER_EXPERT)
def test_no_order_is_invented_where_an_index_of_units_goes_to_another_expert(name: str) -> None:
    check_nothing_is_invented(lambda: Best(OF_ANOTHER_EXPERT[name], chosen=False))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_counter_looks_up_each_row_as_it_is_unless_it_is_written_over(shift: int) -> None:
    """``x[0, 1, 2, ...]`` is x, each row with an order of its own; rows that are looked up one further on are not."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(3, 5)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(3)
            if shift:
                places.add_(shift).remainder_(3)
            return x.sum() * (self.a[places] * self.b).sum(-1).sum(-1)

    model = Rows()
    spec = pg.auto_spec(model, (torch.randn(2, 4),))
    # Rows and, in each, columns: 3! (5!)^3; shifted rows leave one order of the columns for all, and rows in place.
    rows, columns = s(3), s(5)
    assert spec.log_order() == pytest.approx(columns if shift else rows + 3 * columns)
    assert pg.verify(model, spec, (torch.randn(2, 4),)).passed
