"""Function caches around a forward pass are emptied, so that nothing of it is handed to the next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture.caches import caches_emptied, function_caches


@functools.lru_cache(maxsize=4)
def positions(count: int) -> Tensor:
    return torch.arange(count)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    cached = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return cached(*args)

    return wrapper


@wrapped
def angles(count: int) -> Tensor:
    return torch.arange(count) / 3


class Placed(nn.Module):
    @wrapped
    def table(self, count: int) -> Tensor:
        return torch.arange(count) * 2

    @staticmethod
    @functools.lru_cache
    def other(count: int) -> Tensor:
        return torch.arange(count)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        return x + positions(n) + angles(n) + self.table(n) + self.other(n)


class Derived(Placed):
    pass


def test_caches_of_functions_methods_and_wrappers_are_found_through_the_bases() -> None:
    assert len(list(function_caches([Placed()]))) == 4
    assert len(list(function_caches([Derived(), nn.Linear(2, 2)]))) == 4
    assert list(function_caches([nn.Linear(2, 2)])) == []


def test_nothing_is_left_in_them() -> None:
    model = Placed()
    model(torch.zeros(5))
    assert positions.cache_info().currsize == 1
    with caches_emptied([model]):
        assert all(cache.cache_info().currsize == 0 for cache in function_caches([model]))
        model(torch.zeros(5))
        assert all(cache.cache_info().currsize == 1 for cache in function_caches([model]))
    assert all(cache.cache_info().currsize == 0 for cache in function_caches([model]))


def test_what_a_capture_computes_does_not_reach_the_caller() -> None:
    model = nn.Sequential(nn.Linear(3, 5), Placed(), nn.Linear(5, 2))
    x = torch.randn(2, 3)
    spec = pg.auto_spec(model, (x,))
    assert type(positions(5)) is Tensor and type(model[1].table(5)) is Tensor
    assert torch.isfinite(model(x)).all()
    positions.cache_clear()
    assert pg.verify(model, spec, (x,)).passed
    assert model(x).dtype == torch.float32
    assert spec.moving == {}, "each unit has a place of its own, whether its table was cached or not"
