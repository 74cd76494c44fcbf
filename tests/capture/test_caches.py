"""Function caches around a forward pass are emptied, so that nothing of it is handed to the next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture.python_state import function_caches, python_state_restored


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
    with python_state_restored([model]):
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


TABLES: dict[str, Any] = {}


def counted(count: int, made: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    if count not in made:
        made[count] = torch.ones(count)
    return made[count]


class Keeps(nn.Module):
    """Keeps tables where a copy of the model does not reach."""

    kept: Any = None
    nested: ClassVar[dict[str, dict[int, Tensor]]] = {"inner": {}}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if "plain" not in TABLES:
            TABLES["plain"] = torch.ones(6)
            counted.made = torch.ones(6)  # type: ignore[attr-defined]
            type(self).kept = torch.ones(6, dtype=y.dtype)
        self.nested["inner"].setdefault(6, torch.ones(6, dtype=y.dtype))
        kept = TABLES["plain"] + counted(6) + counted.made + self.kept + self.nested["inner"][6]  # type: ignore[attr-defined]
        return self.second(y * kept.to(y.dtype))  # type: ignore[no-any-return]


def test_tables_kept_outside_the_model_are_not_left_behind() -> None:
    model, x = Keeps().eval(), torch.randn(4, 3)
    spec = pg.auto_spec(model, (x,))
    assert pg.verify(model, spec, (x,))
    assert TABLES == {} and Keeps.kept is None and Keeps.nested == {"inner": {}} and not hasattr(counted, "made")
    first = model(x)
    assert type(first) is Tensor and first.dtype == torch.float32
    kept = TABLES["plain"]
    assert list(pg.auto_spec(model, (x,)).moving) == list(spec.moving)
    assert TABLES["plain"] is kept and torch.equal(model(x), first)  # what was there before is there still
