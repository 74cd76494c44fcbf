"""First states: a weight that met only constants is never free of the axis that it meets in the second step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg
from tests.groups.renumbered import error, factorials


class Recurrent(nn.Module):
    """A state of six units that goes through some operator before it meets the weight."""

    def __init__(self, through: Callable[[nn.Module, Tensor], Tensor], first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.state, self.out = nn.Linear(3, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.norm, self.added = nn.LayerNorm(6), nn.Parameter(torch.randn(6))
        self.through, self.first = through, first

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for t in x.unbind(1):
            h = torch.tanh(self.embed(t) + self.state(self.through(self, h)))
        return self.out(h)


def zeros(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), 6)


THROUGH: dict[str, Callable[..., Tensor]] = {
    "nothing": lambda m, h: h,
    "sigmoid": lambda m, h: h.sigmoid(),
    "exp": lambda m, h: h.exp(),
    "add": lambda m, h: h + m.added,
    "layer norm": lambda m, h: m.norm(h),
    "normalize": lambda m, h: F.normalize(h, dim=-1),
    "softmax": lambda m, h: h.softmax(-1),
    "double": lambda m, h: h + h,
    "clamp": lambda m, h: h.clamp(-1, 1),
    "cosine": lambda m, h: h.cos(),
    "flip": lambda m, h: h.flip(-1),
    "chunks": lambda m, h: torch.cat(h.chunk(2, -1)[::-1], -1),
    "cumulative": lambda m, h: h.cumsum(0),
    "index": lambda m, h: h[:, [1, 0, 2, 4, 3, 5]],
}
FIRST = {
    "ones": lambda x: x.new_ones(len(x), 6),
    "a third": lambda x: x.new_full((1, 6), 1 / 3).expand(len(x), -1),
    "padding": lambda x: F.pad(x[:, 0, :0], (0, 6)),
    "two halves": lambda x: torch.cat([x.new_zeros(len(x), 3), x.new_ones(len(x), 3)], 1),
}
CASES = {name: (through, zeros) for name, through in THROUGH.items()}
CASES |= {name: (THROUGH["nothing"], first) for name, first in FIRST.items()}


@pytest.mark.parametrize("name", CASES)
def test_one_step_shows_nothing_of_the_state(name: str):
    model = Recurrent(*CASES[name]).eval()
    for batch in (1, 2):
        spec = pg.auto_spec(model, (torch.randn(batch, 1, 3),))
        assert error(model, spec, torch.randn(2, 4, 3)) < 1e-9, "whatever is found holds for longer inputs"


def test_two_steps_show_the_state():
    model = Recurrent(THROUGH["sigmoid"], zeros).eval()
    spec = pg.auto_spec(model, (torch.randn(2, 2, 3),))
    assert abs(spec.log_order() - factorials(6)) < 1e-9
    assert error(model, spec, torch.randn(2, 4, 3)) < 1e-9


class Joined(nn.Module):
    """The state is joined to the input before it meets the weight; a second level is updated at every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow, self.out = nn.Linear(3 + 6, 6), nn.Linear(6 + 7, 7), nn.Linear(6 + 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), 6), x.new_ones(len(x), 7)
        for number, t in enumerate(x.unbind(1)):
            h = torch.tanh(self.fast(torch.cat([t, h], 1)))
            if number % 3 == 0:
                c = torch.tanh(self.slow(torch.cat([h, c], 1)))
        return self.out(torch.cat([h, c], 1))


def test_a_part_of_an_input_may_be_constant():
    model = Joined().eval()
    one, four = (pg.auto_spec(model, (torch.randn(2, n, 3),), vary=n > 1) for n in (1, 4))
    assert one.log_order() == 0
    assert {name: group.size for name, group in four.moving.items()} == {"fast": 6, "slow": 7}
    assert max(error(model, spec, torch.randn(2, 9, 3)) for spec in (one, four)) < 1e-9


def test_what_is_taken_for_constant_is_named():
    spec = pg.auto_spec(Joined().eval(), (torch.randn(2, 3, 3),), vary=False)
    assert [note for note in spec.notes if note.startswith("slow.weight met only constants")]
    passes = pg.auto_spec(Joined().eval(), (torch.randn(2, 3, 3),), max_passes=4)
    assert not [note for note in passes.notes if "constants" in note]
    assert error(Joined().eval(), passes, torch.randn(2, 9, 3)) < 1e-9


class Gated(nn.Module):
    """The state meets the weight behind a gate that the input alone opens, in another writing of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.out = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        self.state = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        for t in x.unbind(1):
            h = torch.tanh(self.embed(t) + ((self.gate(t).sigmoid() * h).unsqueeze(1) * self.state).sum(-1))
        return self.out(h)


def test_a_gate_before_zeros_shows_nothing():
    model = Gated().eval()
    spec = pg.auto_spec(model, (torch.randn(2, 1, 3),))
    assert error(model, spec, torch.randn(2, 4, 3)) < 1e-9


class ConstantsThatStay(nn.Module):
    """A sum by a product with ones, waves of positions, and a mask: constants in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.waves, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        places = torch.arange(n)[:, None] / torch.arange(1, 5)[None]
        h = self.embed(x) + self.waves(places.to(x.dtype).sin())
        scores = h @ h.mT + torch.full((n, n), -1e4, dtype=x.dtype).triu(1)
        h = torch.relu(h + scores.softmax(-1) @ h)
        return self.out(h) / (1 + (self.out.weight @ x.new_ones(6)).abs())


def test_constants_that_are_constant_cost_nothing():
    model = ConstantsThatStay().eval()
    spec = pg.auto_spec(model, (torch.randn(2, 5, 3),))
    assert abs(spec.log_order() - factorials(6)) < 1e-9
    assert error(model, spec, torch.randn(2, 9, 3)) < 1e-9


class Padded(nn.Module):
    """A map that is padded to the size of the kernel: its outer rows meet zeros, and pixels where the map is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2)
        self.kernel = nn.Conv2d(8, 8, 5, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(torch.relu(self.first(x)), (2, 1, 2, 1))
        return self.out(torch.relu(self.kernel(h)).mean((2, 3)))


def test_what_of_a_kernel_met_margins_alone_stays_put():
    model = Padded().eval()
    spec = pg.auto_spec(model, (torch.randn(2, 3, 8, 8),))
    assert abs(spec.log_order() - factorials(8)) < 1e-9
    assert error(model, spec, torch.randn(2, 3, 16, 16)) < 1e-9


class NoBoxes(nn.Module):
    """Features of the boxes that were found, of which there may be none, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.out = nn.Conv2d(3, 5, 1), nn.Linear(5 * 4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, boxes: int = 0) -> Tensor:
        h = torch.relu(self.first(x))[:boxes]
        return torch.cat([self.out(torch.relu(self.hidden(h.flatten(1)))), h.mean((1, 2, 3))[:, None]], 1)


def test_a_view_without_elements_says_what_one_with_elements_says():
    model = NoBoxes().eval()
    none, some = (pg.auto_spec(model, (torch.randn(4, 3, 2, 2), boxes)) for boxes in (0, 3))
    assert [str(axis) for axis in none.axes["hidden.weight"]] == [str(axis) for axis in some.axes["hidden.weight"]]
    assert error(model, none, torch.randn(4, 3, 2, 2), 2) < 1e-9
