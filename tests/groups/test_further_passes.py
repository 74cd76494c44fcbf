"""Passes that do something else than the first one, in ways that are easily overlooked: each is to be solved too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import permgraph as pg

UNITS = 8
EIGHT = math.lgamma(9)


class Base(nn.Module):
    """Eight units between two linear layers, all of them free unless something in between says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, UNITS), nn.Linear(UNITS, 2)
        self.register_buffer("table", torch.arange(float(2 * UNITS)).view(2, UNITS).cos(), persistent=False)

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = self.into(x).relu()
        return h


class Number(Base):
    """With a whole number as an argument, which `between` uses."""

    def __init__(self, between: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor, k: int = 2) -> Tensor:
        y: Tensor = self.out(self.between(self.hidden(x), k))
        return y


class Flag(Base):
    """With a flag, or training mode, in which `between` does something else."""

    def __init__(self, between: Callable[[Base, Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        y: Tensor = self.out(self.between(self, self.hidden(x), flag))
        return y


class Mode(Flag):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.training)


def set_to_zero(h: Tensor, k: int) -> Tensor:
    h = h.clone()
    h[:, k] = 0.0
    return h


#: What uses a number, and the log order that its value two and every larger one leave.
NUMBERS: list[tuple[Callable[[Tensor, int], Tensor], float]] = [
    (lambda h, k: h + h[:, k : k + 1], math.lgamma(7)),
    (lambda h, k: h + h.select(1, k)[:, None], math.lgamma(7)),
    (lambda h, k: h * h[:, :k].sum(1, keepdim=True), math.lgamma(3) + math.lgamma(6)),
    (lambda h, k: h + h.narrow(1, k, 1), math.lgamma(7)),
    (set_to_zero, math.lgamma(7)),
    (lambda h, k: h.view(-1, k, UNITS // k).flip(1).reshape(-1, UNITS) if UNITS % k == 0 else h, -1.0),
    (lambda h, k: h * k, EIGHT),
    (lambda h, k: h**k, EIGHT),
]

_MASK = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
_ORDER = [1, 0, 3, 2, 5, 4, 7, 6]
_FOUR = 2 * math.lgamma(5)

FLAGS: dict[str, tuple[Callable[[Base, Tensor, bool], Tensor], float]] = {
    "a mask": (lambda m, h, f: h * h.new_tensor(_MASK if f else [1.0] * UNITS), _FOUR),
    "a mask and its complement": (lambda m, h, f: h * h.new_tensor(_MASK if f else _MASK[::-1]), _FOUR),
    "an order": (
        lambda m, h, f: h[:, torch.tensor(_ORDER if f else list(range(UNITS)))],
        4 * math.log(2) + math.log(24),
    ),
    "a row of a table": (lambda m, h, f: h * m.table[int(f)], 0.0),  # type: ignore[index, operator]
    "which dimension": (lambda m, h, f: h.cumsum(1 if f else 0), 0.0),
    "from the end": (lambda m, h, f: h.flip(-1 if f else -2), 4 * math.log(2) + math.log(24)),
    "how many groups": (lambda m, h, f: F.group_norm(h, 4 if f else 2), math.log(2) * 7),
    "how often": (lambda m, h, f: h.repeat(1 + f, 1)[: len(h)], EIGHT),
    "which function": (lambda m, h, f: h.sin() if f else h.cos(), EIGHT),
}


def _error(model: nn.Module, spec: pg.PermutationSpec, run: Callable[[nn.Module], Any]) -> float:
    model = model.double()
    before = run(model)
    model.load_state_dict(spec.random(seed=3).apply(model.state_dict()))
    after = run(model)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("at", range(len(NUMBERS)))
def test_a_number_that_is_no_size_makes_another_pass(at: int) -> None:
    between, expected = NUMBERS[at]
    model = Number(between).eval()
    spec = pg.auto_spec(model, (torch.randn(5, 4),))
    if expected >= 0:
        # Both values tell units apart, those of the second pass beside those of the first.
        assert spec.log_order() <= expected + 1e-9
    if expected == EIGHT:
        assert spec.log_order() == pytest.approx(EIGHT)
    for k in (2, 3):
        assert _error(model, spec, lambda net, k=k: net(torch.randn(5, 4, generator=_seeded()).double(), k)) < 1e-12


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("kind", [Flag, Mode])
@pytest.mark.parametrize("what", FLAGS)
def test_constants_dimensions_and_groups_are_compared(what: str, kind: type[Flag]) -> None:
    between, expected = FLAGS[what]
    model = kind(between).eval()
    spec = pg.auto_spec(model, (torch.randn(6, 4),))
    # A constant pins all that it is multiplied with, so that less than what is free may be found.
    assert spec.log_order() <= expected + 1e-9
    if expected == EIGHT:
        assert spec.log_order() == pytest.approx(EIGHT)
    for flag in (False, True):

        def run(net: nn.Module, flag: bool = flag) -> Tensor:
            x = torch.randn(6, 4, generator=_seeded()).double()
            found: Tensor = net.train(flag)(x) if kind is Mode else net(x, flag)
            return found

        assert _error(model, spec, run) < 1e-12


def test_a_place_along_a_size_that_varies_is_no_difference() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(4, UNITS), nn.Linear(UNITS, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.into(x).relu()
            y: Tensor = self.out(h[:, : x.shape[1] - 1].sum(1) / x.shape[1] + h[:, x.shape[1] - 1])
            return y

    spec = pg.auto_spec(Last(), (torch.randn(2, 6, 4),))
    assert spec.log_order() == pytest.approx(EIGHT)
    assert [one.outcome for one in spec.passes if one.outcome != "failed"] == ["solved", "alike"]


class Memory:
    """An object that is no module."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.calls = 0
        self.inner = {"calls": 0, "more": [[], {"n": 0}]}


class Kept(nn.Module):
    """Every second call sums up the units, by a counter that is kept in some place."""

    calls = 0

    def __init__(self, where: Literal["object", "dict", "list", "class", "closure", "iterator"]) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, UNITS), nn.Linear(UNITS, 2)
        self.memory, self.where, self.numbers = Memory(), where, itertools.count(1)
        if where == "closure":
            counted = [0]

            def hook(module: nn.Module, given: Any, out: Tensor) -> Tensor:
                counted[0] += 1
                return out if counted[0] % 2 else out.cumsum(-1)

            self.into.register_forward_hook(hook)

    def count(self) -> int:
        if self.where == "object":
            self.memory.calls += 1
            return self.memory.calls
        if self.where == "dict":
            self.memory.inner["calls"] += 1  # type: ignore[operator]
            return self.memory.inner["calls"]  # type: ignore[return-value]
        if self.where == "list":
            self.memory.inner["more"][1]["n"] += 1  # type: ignore[index]
            return self.memory.inner["more"][1]["n"]  # type: ignore[index, no-any-return]
        if self.where == "class":
            Kept.calls += 1
            return Kept.calls
        return next(self.numbers) if self.where == "iterator" else 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        y: Tensor = self.out(h if self.count() % 2 else h.cumsum(-1))
        return y


@pytest.mark.parametrize("where", ["object", "dict", "list", "class", "closure", "iterator"])
def test_what_is_kept_below_an_attribute_makes_a_second_call(where: Any) -> None:
    Kept.calls = 0
    spec = pg.auto_spec(Kept(where), (torch.randn(5, 4),))
    assert "two calls" in [one.name for one in spec.passes]
    assert spec.log_order() == 0


def test_what_is_only_read_makes_none() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out, self.memory = nn.Linear(4, UNITS), nn.Linear(UNITS, 2), Memory()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.into(x)) * len(self.memory.inner)
            return y

    assert "two calls" not in [one.name for one in pg.auto_spec(Reads(), (torch.randn(5, 4),)).passes]


class Drops(nn.Module):
    """Three heads of four, dropped in training; `layout` says where they stand when they are."""

    def __init__(self, layout: Literal["folded", "apart", "transposed", "samples"]) -> None:
        super().__init__()
        self.into, self.out, self.layout = nn.Linear(4, 12), nn.Linear(12, 2), layout

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x).relu()
        if self.training:
            h = self.dropped(h)
        y: Tensor = self.out(h)
        return y

    def dropped(self, h: Tensor) -> Tensor:
        if self.layout == "samples":
            return h * h.new_empty(len(h), 1).bernoulli_(0.5)
        if self.layout == "transposed":
            return (h.T.reshape(3, -1) * torch.rand(3, 1)).view(12, -1).T
        heads = h.view(-1, 3, 4)
        if self.layout == "apart":
            return (heads * torch.rand(len(heads), 3, 1)).flatten(1)
        folded = heads.reshape(-1, 4)
        return (folded * folded.new_empty(len(folded), 1).bernoulli_(0.5)).view(-1, 12)


@pytest.mark.parametrize("layout", ["folded", "apart", "transposed", "samples"])
def test_factors_drawn_for_parts_of_samples_tell_the_parts(layout: Any) -> None:
    spec = pg.auto_spec(Drops(layout), (torch.randn(2, 4),))
    heads = math.lgamma(4) + 3 * math.lgamma(5)
    assert spec.log_order() == pytest.approx(math.lgamma(13) if layout == "samples" else heads)


class Steps(nn.Module):
    """As many layers as there are places, of which the last belongs to another stream on long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 6), nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))
        self.out = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, g = self.one(x).relu(), self.other(x).relu()
        for layer in list(self.layers)[: min(x.shape[1], 22) // 2]:
            h = layer(h).relu()
        if x.shape[1] > 20:
            g = self.layers[11](g).relu()
        y: Tensor = self.out[0](h) + self.out[1](g)
        return y


def test_parts_that_no_pass_reached_are_named_where_passes_reach_different_ones() -> None:
    spec = pg.auto_spec(Steps(), (torch.randn(3, 5, 4),))
    assert len([one for one in spec.passes if one.outcome == "solved"]) > 1
    assert any("no pass reached" in note and "layers." in note for note in spec.notes), spec.notes


@pytest.mark.parametrize("name", ["output_norm", "output_size", "return_sum", "norm_output"])
def test_flags_are_tried_whatever_their_names(name: str) -> None:
    source = f"""
def forward(self, x, {name}: bool = False):
    h = self.into(x).relu()
    return self.out(h.cumsum(-1) if {name} else h)
"""
    made: dict[str, Any] = {}
    exec(source, made)
    model = type("Named", (Base,), {"forward": made["forward"]})()
    assert pg.auto_spec(model, (torch.randn(5, 4),)).log_order() == 0
