"""Many modules of one kind: found from few proofs, and told apart where one of them is not like the others."""

from __future__ import annotations

from math import lgamma

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.inference.modules import families
from tests.modules.by_hand import worst_difference
from tests.modules.parts import Concatenated, D, Experts, Hierarchical, SoftSlices, Summed, TopKWhere

L = {n: lgamma(n + 1) for n in range(40)}


def _spec(model: nn.Module) -> pg.PermutationSpec:
    torch.manual_seed(0)
    return pg.auto_spec(model, (torch.randn(6, D),), modules=True, vary=False)


def _holds(model: nn.Module, spec: pg.PermutationSpec) -> None:
    assert worst_difference(model, spec, [(torch.randn(6, D),)], modes=(False,), tries=4) < 1e-9


@pytest.mark.parametrize("count", [5, 6, 9, 16])
@pytest.mark.parametrize("kind", [SoftSlices, TopKWhere, Summed, Concatenated], ids=lambda kind: kind.__name__)
def test_all_orders_of_many(kind: type[nn.Module], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    check = families.Proof.check
    monkeypatch.setattr(families.Proof, "check", lambda self, exchange: (tried.append(1), check(self, exchange))[1])
    model = kind(count)
    spec = _spec(model)
    assert spec.log_order() == pytest.approx(L[count] + count * L[4])
    assert len(tried) == 3, "one exchange and two reflections"
    _holds(model, spec)


def test_many_groups_of_many() -> None:
    model = Hierarchical(6, 5)
    spec = _spec(model)
    assert spec.log_order() == pytest.approx(L[6] + 6 * (L[5] + 5 * L[4]))
    _holds(model, spec)


class OneApart(SoftSlices):
    """Experts of which one is seen in the result by itself."""

    def __init__(self, count: int, apart: int) -> None:
        super().__init__(count)
        self.apart = apart

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), torch.tanh(self.experts[self.apart](x))


@pytest.mark.parametrize("apart", [0, 7])
def test_all_but_one(apart: int) -> None:
    model = OneApart(8, apart)
    spec = _spec(model)
    assert spec.log_order() == pytest.approx(L[7] + 8 * L[4])
    _holds(model, spec)


def test_a_router_with_another_row_among_theirs() -> None:
    model = OneApart(8, 3)
    spec = _spec(model)
    assert any("do not lie side by side" in note for note in spec.notes)
    _holds(model, spec)


class Ring(nn.Module):
    """Modules in a ring: turns and reflections of it are symmetries, exchanges of two alone are none."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.members = nn.ModuleList([nn.Linear(D, D) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        made = [torch.tanh(member(x)) for member in self.members]
        return sum(torch.sin(a * b) for a, b in zip(made, [*made[1:], made[0]], strict=True))


@pytest.mark.parametrize("count", [5, 6, 8])
def test_a_ring_is_no_set(count: int) -> None:
    model = Ring(count)
    spec = _spec(model)
    assert [spec.groups[name].size for name in spec.groups_of_modules] == [2], "a reflection"
    assert len(spec.stacks) == 2 * (count // 2)
    _holds(model, spec)


class Pairs(nn.Module):
    """Pairs of modules: those of a pair change places, and pairs do."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.members = nn.ModuleList([nn.Linear(D, D) for _ in range(2 * count)])

    def forward(self, x: Tensor) -> Tensor:
        made = [torch.tanh(member(x)) for member in self.members]
        return sum(torch.sin(a * b) for a, b in zip(made[::2], made[1::2], strict=True))


def test_pairs_of_modules() -> None:
    model = Pairs(4)
    spec = _spec(model)
    # Which units are tied to which: those of a pair are multiplied, and all pairs are added.
    assert spec.log_order() == pytest.approx(L[4] + 4 * L[2])
    _holds(model, spec)


def test_two_sets_of_one_kind() -> None:
    """Experts that look alike, with two routers whose gates say which set is which."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = SoftSlices(6), SoftSlices(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.left(x)) - 2 * torch.tanh(self.right(x))

    model = Two()
    spec = _spec(model)
    assert spec.log_order() == pytest.approx(2 * (L[6] + 6 * L[4]))
    _holds(model, spec)


def test_routers_that_are_read_in_other_orders() -> None:
    """The gate of each expert is the one of the next: still all of one kind."""

    class Shifted(Experts):
        def forward(self, x: Tensor) -> Tensor:
            gates = self.gates(x)
            return sum(gates[:, (i + 1) % self.count, None] * expert(x) for i, expert in enumerate(self.experts))

    model = Shifted(6)
    spec = _spec(model)
    _holds(model, spec)
