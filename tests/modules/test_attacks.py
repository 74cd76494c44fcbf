"""Programs that tell modules apart in ways that are easy to overlook, and some that do not though they look like it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg
from tests.modules.by_hand import worst_difference
from tests.modules.parts import D, mlp


class Many(nn.Module):
    """Six modules, so that all are tried at once, and a router."""

    count = 6

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([mlp() for _ in range(self.count)])
        self.router = nn.Linear(D, self.count)

    def made(self, x: Tensor) -> list[Tensor]:
        return [member(x) for member in self.members]


class SortedIndices(Many):
    """Which gate comes when is used as a number."""

    def forward(self, x: Tensor) -> Tensor:
        values, order = self.router(x).sort(-1)
        gates = values.softmax(-1)
        return sum(gates[:, i, None] * y for i, y in enumerate(self.made(x))) + order[:, :1]


class ByRank(Many):
    """The first module has the largest gate, whichever gate that is."""

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).sort(-1).values.softmax(-1)
        return sum(gates[:, i, None] * y for i, y in enumerate(self.made(x)))


class OtherEpsilon(Many):
    def forward(self, x: Tensor) -> Tensor:
        return sum(F.layer_norm(y, (D,), eps=10.0**-i) for i, y in enumerate(self.made(x)))


class OtherActivation(Many):
    def forward(self, x: Tensor) -> Tensor:
        return sum(F.leaky_relu(y, 0.1 * (i + 1)) for i, y in enumerate(self.made(x)))


class OtherPadding(Many):
    def forward(self, x: Tensor) -> Tensor:
        return sum(F.pad(y, (i, self.count - i)) for i, y in enumerate(self.made(x)))


class Window(Many):
    """Parts of one projection that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(D, 2 * self.count)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wide(x)
        return sum(y * h[:, 2 * i : 2 * i + 3].mean(-1, keepdim=True) for i, y in enumerate(self.made(x)))


class Strided(Many):
    """Parts of one projection that do not meet, seen with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(D, D * self.count)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.wide(x).unfold(-1, D, D).tanh()
        return sum(parts[:, i] * y for i, y in enumerate(self.made(x)))


class AsStrided(Many):
    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x))
        return made.as_strided((self.count - 1, len(x), D), made.stride(), D * len(x)).tanh().sum(0)


class Circle(Many):
    def forward(self, x: Tensor) -> Tensor:
        made = self.made(x)
        return sum(torch.sin(a - 2 * b) for a, b in zip(made, [*made[1:], made[0]], strict=True))


class Bipartite(Many):
    """The first three beside the last three, which are subtracted."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.made(x)
        return sum(made[:3]) - 2 * sum(made[3:])


class RankedChoice(Many):
    """The second choice is worth more for a larger number of the first."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(2, -1).indices
        more = (chosen[:, 0] > chosen[:, 1])[:, None]
        return sum((chosen == i).any(-1, keepdim=True) * y for i, y in enumerate(self.made(x))) * (1.0 + more)


class Balanced(Many):
    """A loss that goes by the number of an expert is returned too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.router(x).softmax(-1)
        loss = (gates.mean(0) * torch.arange(self.count)).sum()
        return sum(gates[:, i, None] * y for i, y in enumerate(self.made(x))), loss


class EvenlyBalanced(Many):
    """A loss that does not: the experts change places."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.router(x).softmax(-1)
        loss = (gates.mean(0) * F.one_hot(gates.argmax(-1), self.count).to(x.dtype).mean(0)).sum() * self.count
        return sum(gates[:, i, None] * y for i, y in enumerate(self.made(x))), loss


class Triangular(Many):
    """Each module attends to those before it."""

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x), 1)
        scores = (made @ made.transpose(1, 2)).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
        return (scores.softmax(-1) @ made).sum(1)


class CircularMask(Many):
    """A mask that a turn by one place keeps, and an exchange does not."""

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x), 1)
        mask = torch.eye(6) + torch.eye(6).roll(1, 0) + torch.eye(6).roll(-1, 0)
        scores = (made @ made.transpose(1, 2)).masked_fill(mask == 0, float("-inf"))
        return (scores.softmax(-1) @ made).sum(1)


class Convolved(Many):
    def __init__(self) -> None:
        super().__init__()
        self.across = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.across(torch.stack(self.made(x), -1))).sum(-1)


class CircularlyConvolved(Many):
    def __init__(self) -> None:
        super().__init__()
        self.across = nn.Conv1d(D, D, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.across(torch.stack(self.made(x), -1))).sum(-1)


class Fourier(Many):
    """The magnitudes of a Fourier transform do not see turns and reflections; they see exchanges."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.stack(self.made(x)), dim=0).abs().sum(0)


class Pooled(Many):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(torch.stack(self.made(x), -1), 2).tanh().sum(-1)


class Differences(Many):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.made(x)).diff(dim=0).abs().sum(0)


class AllDistances(Many):
    """The distances of all pairs: the modules change places."""

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x), 1)
        return torch.exp(-(made[:, :, None] - made[:, None]).square().sum(-1)).sum((1, 2))


class Written(Many):
    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), self.count, D)
        for i, y in enumerate(self.made(x)):
            out[:, i] = y
        return (out * torch.arange(self.count).view(1, -1, 1)).sum(1)


class WrittenAcross(Many):
    """Each is written over a part of the one before it."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), self.count + D)
        for i, y in enumerate(self.made(x)):
            out[:, i : i + D] = y
        return out.tanh().sum(1)


class WrittenBack(Many):
    """The last one wins: nothing is seen of the others."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, y in enumerate(self.made(x)):
            out[:, : D - i % 2] = y[:, : D - i % 2]
        return out


class ScatteredOver(Many):
    """Where two are written to one element, the last one wins."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        at = self.router(x).argmax(-1) % len(x)
        for y in self.made(x):
            out = out.index_copy(0, at, y)
        return out


class RunningScale(Many):
    """A state that the first module alone updates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        made = self.made(x)
        self.scale.copy_(made[0].detach().abs().mean(0))
        return sum(made) * self.scale


class Hooked(Many):
    """A hook on one module changes what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.members[2].register_forward_hook(lambda module, given, made: made.tanh())

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.made(x))


class Reused(Many):
    """One is used again further down."""

    def forward(self, x: Tensor) -> Tensor:
        return self.members[1](torch.tanh(sum(self.made(x))))


class TiedAcross(Many):
    """The second layer of each is the first one's of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ParameterList([nn.Parameter(torch.randn(D, D)) for _ in range(self.count)])

    def forward(self, x: Tensor) -> Tensor:
        weights = [*self.inner, self.inner[0]]
        return sum(torch.tanh(x @ a) @ b for a, b in itertools.pairwise(weights))


class Dropped(Many):
    """In training each draws its own numbers, in order: the same in distribution, and not in what is drawn."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.dropout(y, 0.5, training=True) for y in self.made(x))


class Bernoulli(Many):
    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.bernoulli(torch.sigmoid(y)) * y for y in self.made(x))


class ByLength(Many):
    """More of the members run for a longer batch."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(member(x) for member in self.members[: 3 + len(x) // 4])


class ByTraining(Many):
    def forward(self, x: Tensor) -> Tensor:
        made = self.made(x)
        return sum(made) + (made[0] if self.training else made[1])


class FirstFirst(Many):
    """The usual loop that starts from the first: the modules change places."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.members[0](x)
        for member in self.members[1:]:
            out = out + member(x)
        return out


class Complement(Many):
    """One minus each: the modules change places."""

    def forward(self, x: Tensor) -> Tensor:
        out = 1 - torch.sigmoid(self.members[0](x))
        for member in self.members[1:]:
            out = out * (1 - torch.sigmoid(member(x)))
        return torch.rsub(out, 1)


class NegatedSum(Many):
    """Subtracted one after the other: the modules change places."""

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for y in self.made(x):
            out = out - y
        return out


class Einsum(Many):
    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack(self.made(x), 1)
        return torch.einsum("be,bf,bed,bfd->bd", *(self.router(x).softmax(-1),) * 2, made, made)


WRONG = [
    SortedIndices, OtherEpsilon, OtherActivation, OtherPadding, Window, RankedChoice, Balanced, Triangular,
    CircularMask, Convolved, CircularlyConvolved, Fourier, Pooled, Written, WrittenAcross, RunningScale,
    TiedAcross, Dropped, Bernoulli, Circle, WrittenBack, ScatteredOver, Differences, AsStrided,
]  # fmt: skip
"""All of their members stay, or few change places: not all six."""

RIGHT = [EvenlyBalanced, AllDistances, FirstFirst, Complement, NegatedSum, Einsum]
"""All of their members change places."""

SOME = [Bipartite, Hooked, Reused, ByRank, Strided, ByLength, ByTraining]


def _spec(model: nn.Module) -> pg.PermutationSpec:
    torch.manual_seed(0)
    return pg.auto_spec(model, (torch.randn(4, D),), modules=True)


def _holds(model: nn.Module, spec: pg.PermutationSpec) -> None:
    inputs = [(torch.randn(4, D),), (torch.randn(9, D),)]
    assert worst_difference(model, spec, inputs, modes=(False, True), tries=2) < 1e-9


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_not_all_change_places(kind: type[nn.Module]) -> None:
    model = kind()
    spec = _spec(model)
    assert all(spec.groups[name].size < Many.count for name in spec.groups_of_modules)
    _holds(model, spec)


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_all_change_places(kind: type[nn.Module]) -> None:
    model = kind()
    spec = _spec(model)
    assert [spec.groups[name].size for name in spec.groups_of_modules] == [Many.count]
    _holds(model, spec)


@pytest.mark.parametrize("kind", SOME, ids=lambda kind: kind.__name__)
def test_what_changes_places_may(kind: type[nn.Module]) -> None:
    model = kind()
    _holds(model, _spec(model))
