"""What shows only where two things differ together, or one of them alone: modes and sizes, calls, arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg


class Stream(nn.Module):
    """A hidden layer between two; where it is residual, its units and those before it are one group, else two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def result(self, h: Tensor, residual: bool) -> Tensor:
        y = torch.tanh(self.mix(h))
        made: Tensor = self.out(y + h if residual else y)
        return made


class OddLengths(Stream):
    def forward(self, x: Tensor) -> Tensor:
        return self.result(self.embed(x), x.shape[1] % 2 == 1)


class Waveforms(Stream):
    def forward(self, x: Tensor) -> Tensor:
        frames = x.unfold(1, 3, 3)
        return self.result(self.embed(frames), frames.shape[1] > 4)


class WideImages(Stream):
    def forward(self, x: Tensor) -> Tensor:
        return self.result(self.embed(x[..., :3]), x.shape[2] > 8)


class KeptInTraining(Stream):
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        y = torch.tanh(self.mix(h))
        if self.training:
            y, self.kept = y if self.kept is None else y + self.kept, h.detach().mean(0)
        made: Tensor = self.out(y)
        return made


class UsedAfterTraining(Stream):
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        y = torch.tanh(self.mix(h))
        if self.training:
            self.kept = h.detach().mean(0)
        elif self.kept is not None:
            y = y - self.kept
        made: Tensor = self.out(y)
        return made


class ValueInTraining(Stream):
    def forward(self, x: Tensor) -> Tensor:
        return self.result(self.embed(x), self.training and bool(x.mean() > 0))


class DrawnInTraining(Stream):
    def forward(self, x: Tensor) -> Tensor:
        return self.result(self.embed(x), self.training and bool(torch.rand(()) < 0.5))


class Scale(Stream):
    def forward(self, x: Tensor, alpha: float = 0.0) -> Tensor:
        return self.result(self.embed(x), alpha > 0)


class Maybe(Stream):
    def forward(self, x: Tensor, residual: bool | None = None) -> Tensor:
        return self.result(self.embed(x), bool(residual))


class ShortInTraining(nn.Module):
    """Short inputs go by one layer and long ones by two; training alone takes the mean of all units before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.short, self.long = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        y = torch.tanh(self.short(h) if x.shape[1] <= 4 else self.long(h))
        made: Tensor = self.out(y if self.training else torch.tanh(self.mix(y)))
        return made


Run = tuple[tuple[Any, ...], bool]
FIVE, LONG = torch.randn(5, 3), torch.randn(2, 15)
CASES: dict[str, tuple[Callable[[], Stream], Tensor, list[Run]]] = {
    "odd lengths": (OddLengths, torch.randn(2, 6, 3), [((torch.randn(2, 7, 3),), False)]),
    "waveforms": (Waveforms, torch.randn(2, 12), [((LONG,), False)]),
    "wide images": (WideImages, torch.randn(2, 8, 8), [((torch.randn(2, 8, 12),), False)]),
    "kept in training": (KeptInTraining, FIVE, [((FIVE,), True)] * 2),
    "used after training": (UsedAfterTraining, FIVE, [((FIVE,), True), ((FIVE,), False)]),
    "a value in training": (ValueInTraining, FIVE.abs(), [((-FIVE.abs(),), True), ((FIVE.abs(),), True)]),
    "drawn in training": (DrawnInTraining, FIVE, [((FIVE,), True)] * 6),
    "a float": (Scale, FIVE, [((FIVE, 0.3), False)]),
    "a flag or None": (Maybe, FIVE, [((FIVE, True), False)]),
}


def error(model: nn.Module, spec: pg.PermutationSpec, runs: list[Run]) -> float:
    """The largest change of the outputs of these calls, one after the other, under a random permutation."""
    model = copy.deepcopy(model).double()
    state = {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}
    outputs = []
    for weights in (state, spec.random(seed=3, every_group=True).apply(state)):
        other = copy.deepcopy(model)
        other.load_state_dict(weights)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append([other.train(training)(args[0].double(), *args[1:]) for args, training in runs])
    return max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_is_residual_on_some_runs_is_one_group(name: str) -> None:
    make, x, runs = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    spec, alone = (pg.auto_spec(model, (x,), vary=vary) for vary in (True, False))
    assert spec.log_order() == pytest.approx(math.lgamma(7)), "one stream of six units"
    assert error(model, spec, runs) < 1e-10
    assert alone.log_order() == pytest.approx(2 * math.lgamma(7))
    assert error(model, alone, runs) > 1e-3


def test_training_on_these_sizes_is_looked_at_where_both_differ() -> None:
    model = ShortInTraining().eval()
    spec = pg.auto_spec(model, (torch.randn(2, 4, 3),))
    # The embedding, what follows it on short, long and all inputs: in training mode both meet the last layer.
    assert spec.log_order() == pytest.approx(2 * math.lgamma(7))
    runs: list[Run] = [((torch.randn(2, n, 3),), training) for n in (4, 9) for training in (True, False)]
    assert error(model, spec, runs) < 1e-10
    assert {"larger sizes in training mode", "larger sizes", "training mode"} <= {p.name for p in spec.passes}


class ByWord(Stream):
    def forward(self, x: Tensor, mode: str = "plain") -> Tensor:
        return self.result(self.embed(x), mode == "residual")


def test_a_word_of_which_nothing_says_what_else_it_may_be_is_named() -> None:
    spec = pg.auto_spec(ByWord().eval(), (FIVE,))
    assert "no pass ran with another mode='plain': nothing says what else it may be" in spec.notes
