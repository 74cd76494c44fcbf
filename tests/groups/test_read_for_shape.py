"""Parts of tensors that are taken for their shape alone: they cut nothing, unless somebody reads an element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.groups.test_layouts import Net, lin, par
from tests.groups.test_table import check, s

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Any, Tensor], Tensor]


def _beside(part: Callable[[Tensor], Tensor]) -> Forward:
    """Hidden units, and a part of them made into one number more."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).tanh()
        return m.p(torch.cat([h, part(h)], 1))

    return forward


def _scaled(scale: Callable[[Tensor], Any]) -> Forward:
    """A layer whose weight is scaled by what is asked of it."""
    return lambda m, x: m.o(F.linear(x, m.w / scale(m.w)).tanh())


def _written(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    h[:, :1].mul_(2)
    return m.o(h)


MODULES: dict[str, tuple[Forward, float]] = {
    "ones": (_beside(lambda h: torch.ones_like(h[:, :1])), s(6)),
    "zeros of a part of a part": (_beside(lambda h: torch.zeros_like(h[:, 2:5].t()[1])[:, None]), s(6)),
    "full": (_beside(lambda h: h[:, 0].new_full((4, 1), 2.0)), s(6)),
    "empty and filled": (_beside(lambda h: torch.empty_like(h[:, :1]).fill_(1.0)), s(6)),
    "ones times a part": (_beside(lambda h: torch.ones_like(h[:, :1]) * h[:, :1]), s(5)),
    "a part that is read too": (_beside(lambda h: (lambda y: torch.ones_like(y) + y)(h[:, :1])), s(5)),
    "how many elements": (_scaled(lambda w: w[0].numel() ** 0.5), s(6)),
    "how many elements of a part": (_scaled(lambda w: w[1:4].numel()), s(6)),
    "the sum of some elements": (_scaled(lambda w: w[0].square().sum() + w[0].numel()), s(5)),
    "an element that Python reads": (_scaled(lambda w: 1 + w[0].square().sum().item()), s(5)),
    "a part that is written": (_written, s(5)),
}


@pytest.mark.parametrize("name", MODULES)
def test_parts(name: str) -> None:
    forward, order = MODULES[name]
    members = {m: {"a": lin(3, 6), "w": par(6, 3), "o": lin(6, 2), "p": lin(7, 2)}[m] for m in _used(name)}
    check(Net(forward, **members), (X,), order)


def _used(name: str) -> str:
    return "wo" if "element" in name else "ao" if "written" in name else "ap"
