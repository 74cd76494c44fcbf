"""Slots in front of the keys of causal attention: those that every query sees have no order, whatever the lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.groups.test_layouts import Net, lin, par
from tests.groups.test_table import check, s

X = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
Mask = Callable[[int, int], Tensor]  # of so many queries and keys


def _ones(queries: int, keys: int) -> Tensor:
    return torch.ones((queries, keys), dtype=torch.bool)


def _attend(m: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    logits = (q @ k.transpose(1, 2)).masked_fill(hidden, -1e9)
    return m.o(logits.softmax(-1) @ v)


# The number of slots out of four that may change places.
MASKS: dict[str, tuple[Mask, int]] = {
    "all are seen": (lambda i, j: _ones(i, j).triu(j - i + 1), 4),
    "all are seen, by what is kept": (lambda i, j: ~_ones(i, j).tril(j - i), 4),
    "the last one is seen later": (lambda i, j: _ones(i, j).triu(j - i - 1), 3),
    "one by one": (lambda i, j: _ones(i, j).triu(1), 1),
    "never one before": (lambda i, j: _ones(i, j).tril(-1), 1),
}


@pytest.mark.parametrize("name", MASKS)
def test_slots_before_the_keys(name: str) -> None:
    mask, free = MASKS[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        k = torch.cat([m.keys.expand(len(x), 4, 8), m.k(x)], 1)
        v = torch.cat([m.values.expand(len(x), 4, 8), m.v(x)], 1)
        return _attend(m, m.q(x), k, v, mask(x.shape[1], k.shape[1]))

    net = Net(forward, q=lin(6, 8), k=lin(6, 8), v=lin(6, 8), keys=par(4, 8), values=par(4, 8), o=lin(8, 5))
    check(net, (X,), s(free) + 2 * s(8))


@pytest.mark.parametrize("queries", [1, 2, 7])
def test_slots_that_longer_inputs_see_one_by_one_stay_put(queries: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        keys, values = (t.expand(len(x), 9, 8) for t in (m.keys, m.values))
        return _attend(m, m.q(x), keys, values, _ones(x.shape[1], 9).triu(1))

    net = Net(forward, q=lin(6, 8), keys=par(9, 8), values=par(9, 8), o=lin(8, 5))
    check(net, (X[:, :queries],), 2 * s(8))
