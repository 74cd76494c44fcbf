"""Units that the model's code names by their numbers: they are written to, and the others are free beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg

X = (torch.randn(4, 3),)


def s(n: int) -> float:
    return math.lgamma(n + 1)


class Written(nn.Module):
    """Eight hidden units, some of which are written over."""

    def __init__(self, write: Callable[[Written, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.c, self.o = nn.Linear(3, 8), nn.Linear(3, 3), nn.Linear(8, 2)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.write(self, self.a(x).tanh(), self.c(x)).tanh())  # type: ignore[no-any-return]


def put(places: list[int]) -> Callable[[Written, Tensor, Tensor], Tensor]:
    def write(m: Written, h: Tensor, c: Tensor) -> Tensor:
        h = h.clone()
        h[:, places] = c
        return h

    return write


def zero(m: Written, h: Tensor, c: Tensor) -> Tensor:
    h[:, [2, 3, -1]] = 0.0
    return h


def rows(m: Written, h: Tensor, c: Tensor) -> Tensor:
    t = h.t().clone()
    t[[2, 3, 7]] = c.t()
    return t.t()


# Units 0 and 1, 2 and 3, 4 to 6 and 7 stand together: what is written has two parts as well.
APART = 2 * s(2) + s(3)

CASES: dict[str, tuple[Callable[[Written, Tensor, Tensor], Tensor], float]] = {
    "zeros": (zero, APART),
    "values": (put([2, 3, 7]), APART),
    "values in another order": (put([3, 2, 7]), s(2) + s(3)),  # 2 and 3 are told apart by their order
    "one twice, of which the last wins": (put([2, 3, 2]), s(2) + s(4)),
    "rows": (rows, APART),
    "added": (lambda m, h, c: h.index_add(1, torch.tensor([2, 3, 7]), c), APART),
    "copied": (lambda m, h, c: h.index_copy(1, torch.tensor([2, 3, 7]), c), APART),
    "filled": (lambda m, h, c: h.index_fill(1, torch.tensor([2, 3, 7]), 3.0), APART),
    "accumulated": (lambda m, h, c: h.t().index_put((torch.tensor([2, 3, 7]),), c.t(), accumulate=True).t(), APART),
}


@pytest.mark.parametrize("name", CASES)
def test_units_that_are_written_over_by_number(name: str) -> None:
    write, expected = CASES[name]
    torch.manual_seed(0)
    model = Written(write).eval()
    spec = pg.auto_spec(model, X)
    assert spec.log_order() == pytest.approx(expected), str(spec)
    assert pg.verify(model, spec, X).passed
    general = pg.auto_spec(model, X, symmetry="general")
    assert pg.verify(model, general, X).passed
