"""Modules that something tells apart: what looks like an exchange, and changes what is computed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg
from tests.modules.by_hand import worst_difference
from tests.modules.parts import D, Summed, mlp


class Members(nn.Module):
    """Modules of one kind, and a function of what they make."""

    def __init__(self, count: int = 3, outputs: int = D) -> None:
        super().__init__()
        self.members = nn.ModuleList([mlp(outputs=outputs) for _ in range(count)])
        self.table = nn.Linear(D, D)

    def made(self, x: Tensor) -> list[Tensor]:
        return [member(x) for member in self.members]


class InSequence(Members):
    def forward(self, x: Tensor) -> Tensor:
        for member in self.members:
            x = x + member(x)
        return x


class Weighted(Members):
    def forward(self, x: Tensor) -> Tensor:
        return sum(i * y for i, y in enumerate(self.made(x), 1))


class ByTable(Members):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(torch.stack(self.made(x))) * self.places.to(x.dtype)[:, None, None]).sum(0)


class Listed(Members):
    def forward(self, x: Tensor) -> list[Tensor]:
        return self.made(x)


class ListedSums(Members):
    """The sum, and one of those that were summed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.made(x)
        return sum(made), made[1]


class Running(Members):
    """A sum seen through a view while it grows."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        view = total.view(-1)
        seen = []
        for y in self.made(x):
            total.add_(y)
            seen.append(view * 1.0)
        return total + seen[0].view_as(x) ** 2


class Copied(Members):
    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.made(x)
        part = first[:, :2]
        first.add_(others[0])
        kept = part.clone()
        first.add_(others[1])
        return torch.cat([first, kept], -1)


class Expanded(Members):
    """Rows that are one memory."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.zeros(D, dtype=x.dtype).expand(3, D)
        kept = []
        for i, y in enumerate(self.made(x)):
            rows[i].add_(y.sum(0))
            kept.append(rows[i].clone())
        return torch.stack(kept).prod(0)


class OwnNumbers(Members):
    """Each says how much of each there shall be."""

    def __init__(self, count: int = 2) -> None:
        super().__init__(count, outputs=count)

    def forward(self, x: Tensor) -> Tensor:
        made = self.made(x)
        gates = sum(made).softmax(-1)
        return sum(gates[:, i] * torch.sigmoid(y).sum(-1) for i, y in enumerate(made))


class Largest(Members):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.made(x)).argmax()


class LargestOfEquals(Members):
    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x))
        return made.gather(0, torch.relu(made).argmax(0, keepdim=True))[0]


class ThroughTime(Members):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(torch.stack(self.made(x)))[0].sum(0)


class Trace(Members):
    def __init__(self) -> None:
        super().__init__(outputs=3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([y.sum(0) for y in self.made(x)]).trace()


class OtherScatters(Members):
    """Two sums over indices, of which one is of a single element and then of many."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(3, dtype=torch.int64)
        a, b, _ = (y[0, :3] for y in self.made(x))
        first = torch.scatter_add(torch.zeros(1, dtype=x.dtype), 0, zeros, a)
        return torch.scatter_add(first + torch.zeros(D, dtype=x.dtype), 0, zeros, b)


class OtherDimensions(Members):
    def forward(self, x: Tensor) -> Tensor:
        at = torch.tensor([0, 1, 1, 3])
        a, b, _ = (y[:4] for y in self.made(x))
        out = torch.zeros(D, D, dtype=x.dtype).index_put((at,), a, accumulate=True)
        return torch.ops.aten.index_put(out, [None, at], b.t(), True)


class Overflowing(Members):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = ((y * 60).clamp(-120, 120).to(torch.int8) for y in self.made(x))
        return (a + b) + (c + torch.tensor(100, dtype=torch.int32).expand(x.shape))


class Noisy(Members):
    def forward(self, x: Tensor) -> Tensor:
        return sum(y * (1 + torch.randn((), dtype=x.dtype)) for y in self.made(x))


class OneBatchNorm(Members):
    """In training its statistics are updated one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.norm(y) for y in self.made(x))


class Remembering(Members):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        made = self.made(x)
        for y in made:
            self.memory.mul_(0.5).add_(y.mean(0))
        return sum(made) + self.memory.clone()


class OwnMemories(Members):
    """States of their own that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            self.register_buffer(f"memory{i}", torch.zeros(D), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for i, y in enumerate(self.made(x)):
            memory = getattr(self, f"memory{i}")
            total = total + torch.tanh(y + memory)
            memory.add_(y.mean(0))
        return total


class Chained(Members):
    """One choice after another where masks may meet."""

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for y in self.made(x):
            out = torch.where(y > 0, torch.tanh(y), out)
        return out


class SameNumber(Members):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.table(x).argmax(-1, keepdim=True)
        out = x
        for i, y in zip((0, 1, 1), self.made(x), strict=True):
            out = torch.where(chosen == i, y, out)
        return out


class ReadBetween(Members):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.table(x).argmax(-1, keepdim=True)
        out = x
        for i, y in enumerate(self.made(x)):
            out = torch.where(chosen == i, y + out.mean(), out)
        return out


class WrittenBetween(Members):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.table(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, y in enumerate(self.made(x)):
            out[chosen == i] = y[chosen == i]
            chosen.add_(1)
        return out


class IncrementOfOthers(Members):
    def forward(self, x: Tensor) -> Tensor:
        there, here = torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1])
        out = torch.zeros_like(x)
        for y in self.made(x):
            out[there] = out[here] + y[:3]
        return out


class ShiftedNumbers(Members):
    """What was chosen is compared with a number that is another's."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (self.router(x).argmax(-1) + 1) % 3
        return sum((chosen == i)[:, None] * y for i, y in enumerate(self.made(x)))


class MixedNumbers(ShiftedNumbers):
    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.cat([self.router(x).argmax(-1), torch.tensor([0, 1, 1])])
        x = torch.cat([x, x[:3]])
        return sum((chosen == i)[:, None] * y for i, y in enumerate(self.made(x)))


class CountedNumbers(ShiftedNumbers):
    """A number that is used as such."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return sum((chosen == i)[:, None] * y for i, y in enumerate(self.made(x))) * (1 + chosen[:, None])


class GroupsAcross(Members):
    """A group norm whose groups are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.GroupNorm(5, 3 * D), nn.Linear(3 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat(self.made(x), -1)))


class Bits(Members):
    """A tensor seen as of another type: a view that is no view of the same elements."""

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x))
        return (made.view(torch.int64 if made.dtype == torch.float64 else torch.int32) < 0).sum(0)


class Cumulated(Members):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.stack(self.made(x)).cumsum(0)).sum(0)


class Neighbours(Members):
    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x))
        return (made * made.roll(1, 0)).sum(0)[:, :2] @ torch.eye(2, dtype=x.dtype) + made[0, :, :2]


APART = [
    InSequence, Weighted, ByTable, Listed, Expanded, OwnNumbers, Largest, LargestOfEquals, Trace, OtherDimensions,
    Noisy, OneBatchNorm, Remembering, OwnMemories, Chained, ReadBetween, WrittenBetween, IncrementOfOthers,
    ShiftedNumbers, MixedNumbers, CountedNumbers, GroupsAcross, Cumulated, ThroughTime, OtherScatters, Copied,
]  # fmt: skip
IN_PART = [ListedSums, Running, Overflowing, SameNumber, Bits, Neighbours]
"""Those of which some modules may change places, and others may not."""


def _spec(model: nn.Module, *shape: int) -> pg.PermutationSpec:
    torch.manual_seed(0)
    return pg.auto_spec(model, (torch.randn(*shape),), modules=True)


def _check(model: nn.Module, spec: pg.PermutationSpec, modes: Sequence[bool] = (False, True)) -> None:
    inputs = [(torch.randn(4, D),), (torch.randn(4, D),)]
    assert worst_difference(model, spec, inputs, modes=modes) < 1e-9


@pytest.mark.parametrize("kind", APART, ids=lambda kind: kind.__name__)
def test_nothing_changes_places(kind: type[Members]) -> None:
    model = kind()
    spec = _spec(model, 4, D)
    if kind in (OtherScatters, Copied, ThroughTime):  # of three, two may be alike
        assert all(len(names) == 2 for names in spec.stacks.values())
    else:
        assert not spec.stacks
    _check(model, spec, (False,) if kind is Noisy else (False, True))


@pytest.mark.parametrize("kind", IN_PART, ids=lambda kind: kind.__name__)
def test_what_changes_places_may(kind: type[Members]) -> None:
    model = kind()
    spec = _spec(model, 4, D)
    assert all(len(names) == 2 for names in spec.stacks.values()) or kind is Bits
    _check(model, spec)


def test_three_that_number_themselves() -> None:
    model = OwnNumbers(3)
    spec = _spec(model, 4, D)
    assert not spec.stacks
    _check(model, spec)


def test_other_widths_and_classes() -> None:
    model = Summed(4)
    model.branches[1] = mlp(6)
    model.branches[3] = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, D))
    spec = _spec(model, 4, D)
    assert set(spec.stacks.values()) == {
        tuple(f"branches.{i}.{layer}.{kind}" for i in (0, 2)) for layer in (0, 2) for kind in ("weight", "bias")
    }
    _check(model, spec)


def test_a_module_used_twice_is_no_other_one() -> None:
    class Twice(Summed):
        def forward(self, x: Tensor) -> Tensor:
            return sum(branch(x) for branch in (*self.branches, self.branches[0]))

    model = Twice()
    spec = _spec(model, 4, D)
    assert set(spec.stacks["branches.*.0.weight"]) == {"branches.1.0.weight", "branches.2.0.weight"}
    _check(model, spec)


def test_a_weight_that_is_shared_with_the_outside() -> None:
    class Outside(Summed):
        def forward(self, x: Tensor) -> Tensor:
            first = self.branches[0][0]
            return super().forward(x) + F.linear(torch.tanh(first(x)), first.weight.t())

    model = Outside()
    spec = _spec(model, 4, D)
    assert set(spec.stacks["branches.*.0.weight"]) == {"branches.1.0.weight", "branches.2.0.weight"}
    _check(model, spec)


def test_weights_that_members_share_stay_theirs() -> None:
    model = Summed()
    for branch in model.branches[1:]:
        branch[0].weight = model.branches[0][0].weight
    spec = _spec(model, 4, D)
    assert {"branches.*.0.bias", "branches.*.2.weight", "branches.*.2.bias"} >= set(spec.stacks)
    _check(model, spec)


def test_two_modules_of_which_each_feeds_the_other() -> None:
    class Crossed(Members):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.members
            return a(b(x)) + b(a(x))

    model = Crossed(2)
    spec = _spec(model, 4, D)
    assert not spec.stacks
    assert any("could change places, but stay put: a group is shared" in note for note in spec.notes)
    _check(model, spec)


def test_a_router_that_is_a_buffer_goes_along() -> None:
    class Fixed(Members):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("router", torch.randn(3, D))

        def forward(self, x: Tensor) -> Tensor:
            gates = (x @ self.router.t()).softmax(-1)
            return sum(gates[:, i, None] * y for i, y in enumerate(self.made(x)))

    model = Fixed()
    spec = _spec(model, 4, D)
    assert str(spec.axes["router"][0]) == "members.*"
    _check(model, spec)


def test_stacks_of_one_module_have_names_of_their_own() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(D, D) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d = self.weights
            return torch.tanh(x @ a) @ b + torch.tanh(x @ c) @ d

    model = Listed()
    spec = _spec(model, 4, D)
    assert sorted(map(sorted, spec.stacks.values())) == [["weights.0", "weights.2"], ["weights.1", "weights.3"]]
    _check(model, spec)


def test_a_part_that_a_sum_reads_twice() -> None:
    class Twice(Members):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.made(x)
            part, factor = a + b, a * b
            return (part - (part - c)) * part + factor * (factor * c)

    model = Twice()
    spec = _spec(model, 4, D)
    assert {tuple(name.split(".")[1] for name in names) for names in spec.stacks.values()} == {("0", "1")}
    _check(model, spec)


class OneIsWider(nn.Module):
    """Three experts, of which the last has more hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 5)) for hidden in (7, 7, 9)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) + self.experts[1](x) + self.experts[2](x)


def test_says_why_modules_do_not_change_places():
    spec = pg.auto_spec(OneIsWider(), (torch.randn(2, 5),), modules=True)
    assert spec.groups_of_modules == {"experts.*"} and spec.groups["experts.*"].size == 2
    said = str(spec.explain("experts.2.0.weight", 0))
    assert "experts.2.0.weight is 9x5, experts.0.0.weight 7x5" in said
    layers = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    assert not pg.auto_spec(layers, (torch.randn(2, 5),), modules=True).refusals, (
        "nothing is said of layers in sequence"
    )


class AsManyAsSteps(nn.Module):
    """As many branches run, side by side, as there are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mlp() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return sum((branch(x.mean(1)) for branch, _ in zip(self.branches, x.unbind(1), strict=False)), torch.zeros(1))


class RoutedByNumber(nn.Module):
    """Each row goes to one expert, and experts to which none goes do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(5, 8), nn.ModuleList(mlp() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            if rows.numel():
                mixed[rows] = expert(x[rows]) * weights[rows, None]
        return mixed


@pytest.mark.parametrize("vary", [False, True])
@pytest.mark.parametrize(
    ("make", "inputs", "others"),
    [(AsManyAsSteps, (2, 4, 5), (2, 2, 5)), (AsManyAsSteps, (2, 6, 5), (2, 6, 5)), (RoutedByNumber, (3, 5), (64, 5))],
)
def test_what_runs_for_some_inputs_alone_stays(
    make: type[nn.Module], inputs: tuple[int, ...], others: tuple[int, ...], vary: bool
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    spec = pg.auto_spec(model, (torch.randn(*inputs),), modules=True, vary=vary)
    assert worst_difference(model, spec, [(torch.randn(*others),)], tries=4) < 1e-9
    if inputs != others:
        assert not spec.stacks
