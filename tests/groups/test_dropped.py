"""What is computed and then dropped: no output tells how its units are numbered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import permgraph as pg


class Tower(nn.Module):
    """Takes the features before the last layer, and computes a head that it does not return."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.last = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x).relu()
        self.last(features)
        return self.out(features)


class WrittenThroughAView(nn.Module):
    """What is written into memory that is read later has an effect, though its own result is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.outer = nn.Linear(8, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.new_zeros(len(x), 4)
        memory[:, :].copy_(self.outer(self.inner(x)))
        return self.out(memory)


class KeptInABuffer(nn.Module):
    """What a buffer keeps is seen by the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(5))
        self.probe = nn.Linear(3, 5)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.copy_(self.probe(x).mean(0))
        return self.out(x)


def test_units_that_no_output_depends_on_are_pinned_and_verify_passes():
    model = Tower()
    spec = pg.auto_spec(model)
    assert {name: group.size for name, group in spec.moving.items()} == {"first": 6}
    assert str(spec.axes["last.0.weight"][1]) == "first"  # it moves along, in case another mode returns it
    assert {pin.reason for pin in spec.pins if pin.parameter == "last.0.weight"} == {"no output depends on it"}
    assert pg.verify(model, spec).passed


def test_memory_written_through_a_view_counts():
    model = WrittenThroughAView()
    spec = pg.auto_spec(model)
    assert sorted(group.size for group in spec.moving.values()) == [4, 8]
    assert pg.verify(model, spec).passed


def test_what_a_buffer_keeps_counts():
    spec = pg.auto_spec(KeptInABuffer())
    assert [group.size for group in spec.moving.values()] == [5]


class OnlyTheShape(nn.Module):
    """Makes zeros like the hidden units, and does not look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.zeros_like(self.first(x)) + x[:, :1])


def test_reading_a_shape_is_no_effect():
    spec = pg.auto_spec(OnlyTheShape())
    assert {pin.reason for pin in spec.pins if pin.parameter == "first.bias"} == {"no output depends on it"}


class ReadByPython(nn.Module):
    """Python takes the hidden units one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.out(hidden) * (hidden[0].tolist()[0] > 0)


def test_values_read_outside_torch_pin_and_say_where():
    spec = pg.auto_spec(ReadByPython())
    (pin,) = [pin for pin in spec.pins if pin.parameter == "first.bias"]
    assert pin.reason == "its values were read outside torch"
    assert "test_dropped" in str(pin.source)
    assert not spec.moving
    assert not spec.unknown_ops
