"""What a model returns, in whatever it returns it: every tensor in it is an output, for the spec and for the proof."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture.outputs import returned_tensors, tensor_leaves

X = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),)


class Returning(nn.Module):
    """Two layers; `give` puts the result, and the hidden tensor, into something."""

    def __init__(self, give: Callable[[Returning, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x)
        return self.give(self, self.b(hidden), hidden)


@dataclasses.dataclass
class Record:
    y: Tensor
    hidden: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    y: Tensor
    hidden: Tensor


class Table(OrderedDict[str, Any]):
    """A mapping with room for attributes, as the outputs of Hugging Face are."""


class Plain:
    """An object with whatever it is given."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)


class Items:
    """Something with a length and an iterator, and nothing else that shows."""

    __slots__ = ("_at",)

    def __init__(self, *items: Tensor) -> None:
        self._at = {id(item): item for item in items}

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._at.values())


def _with(value: Any, **attributes: Any) -> Any:
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


CONTAINERS: dict[str, Callable[[Returning, Tensor, Tensor], Any]] = {
    "tuple": lambda m, y, h: (y, h),
    "deque": lambda m, y, h: {"y": y, "hidden": deque([h])},
    "view of a dictionary": lambda m, y, h: (y, {"hidden": h}.values()),
    "items of a dictionary": lambda m, y, h: (y, {"hidden": h}.items()),
    "keys of a dictionary": lambda m, y, h: {y: 0, h: 1},
    "user's dictionary": lambda m, y, h: UserDict(y=y, hidden=h),
    "user's list": lambda m, y, h: UserList([y, [h]]),
    "dataclass": lambda m, y, h: Record(y, h),
    "dataclass with slots": lambda m, y, h: Slotted(y, h),
    "dataclass with an attribute": lambda m, y, h: _with(Record(y), more=h),
    "dictionary with an attribute": lambda m, y, h: _with(Table(y=y), hidden=h),
    "object": lambda m, y, h: Plain(y=y, inner=Plain(hidden=[h])),
    "sized iterable": lambda m, y, h: Items(y, h),
    "tensor with an attribute": lambda m, y, h: _with(y, hidden=h),
}


@pytest.mark.parametrize("give", CONTAINERS.values(), ids=CONTAINERS)
def test_the_hidden_tensor_is_an_output(give: Callable[[Returning, Tensor, Tensor], Any]) -> None:
    spec = pg.auto_spec(Returning(give), X, outputs="all")
    assert dict(spec.moving) == {}
    assert spec.notes == ()


@pytest.mark.parametrize("give", CONTAINERS.values(), ids=CONTAINERS)
def test_verify_sees_it_move(give: Callable[[Returning, Tensor, Tensor], Any]) -> None:
    free = pg.auto_spec(Returning(lambda m, y, h: y), X)
    assert len(free.moving) == 1
    assert not pg.verify(Returning(give), free, X).passed
    assert pg.verify(Returning(lambda m, y, h: y), free, X).passed


ONCE: dict[str, Callable[[Returning, Tensor, Tensor], Any]] = {
    "generator": lambda m, y, h: (y, (t for t in [h])),
    "map": lambda m, y, h: map(torch.neg, [y, h]),
    "list_iterator": lambda m, y, h: {"y": y, "rest": iter([h])},
}


@pytest.mark.parametrize(("kind", "give"), ONCE.items(), ids=ONCE)
def test_what_can_be_read_only_once_is_refused(kind: str, give: Callable[[Returning, Tensor, Tensor], Any]) -> None:
    message = f"the model returns a {kind}, whose tensors can be read only once"
    with pytest.raises(pg.errors.CaptureError, match=message):
        pg.auto_spec(Returning(give), X)
    free = pg.auto_spec(Returning(lambda m, y, h: y), X)
    with pytest.raises(pg.errors.CaptureError, match=message):
        pg.verify(Returning(give), free, X)


def test_what_cannot_be_looked_into_is_named() -> None:
    spec = pg.auto_spec(Returning(lambda m, y, h: (y, lambda: h, functools.partial(torch.add, h), 3, "x", None)), X)
    assert spec.notes == (
        "what objects of these types that the model returns hold was not seen: builtins.function, functools.partial",
    )


def test_attributes_that_forward_leaves_are_named_where_they_move() -> None:
    def keep(model: Returning, y: Tensor, hidden: Tensor) -> Tensor:
        model.b.features = {"of the first layer": [hidden]}  # type: ignore[assignment]
        model.result = y
        return y

    spec = pg.auto_spec(Returning(keep), X)
    assert spec.notes == ("the forward pass keeps tensors whose units move, as b.features",)
    assert [group.size for group in spec.moving.values()] == [5]


def test_each_tensor_once_and_in_order() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    value = {"x": [a, (b, a)], "y": _with(Plain(c=c), itself=None)}
    value["y"].itself = value
    assert [t.numel() for t in tensor_leaves(value)] == [1, 2, 3]
    assert returned_tensors(value) == ([a, b, c], ())


def test_a_generator_among_the_arguments_is_not_used_up() -> None:
    given = (t for t in [torch.zeros(2)])
    assert list(tensor_leaves([given, torch.ones(1)])) == [torch.ones(1)]
    assert len(list(given)) == 1
