"""Models whose Python reads values: passes with other values show the other branches, and what values cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.capture import capture
from permgraph.capture.draws import drawn_like, draws
from permgraph.capture.record import otherwise

SIX = math.lgamma(7)


class Hidden(nn.Module):
    """Six hidden units, and something that reads a value."""

    def __init__(self, use: Callable[[Hidden, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.other = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.middle = nn.Linear(6, 6)
        self.gate = nn.Parameter(torch.randn(1))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.first(x).tanh())


def width(m: Hidden) -> int:
    return 1 + int(4 * torch.sigmoid(9 * m.gate))


def by_index(m: Hidden, h: Tensor) -> Tensor:
    at = torch.arange(width(m))
    return h[:, at] @ m.head.weight[:, at].t()


def in_parts(m: Hidden, h: Tensor) -> Tensor:
    k = width(m)
    left, _ = h.split([k, 6 - k], -1)
    return left @ m.head.weight.split([k, 6 - k], -1)[0].t()


def early(m: Hidden, h: Tensor) -> Tensor:
    if h.square().mean() > 0.3:
        return m.head(h)
    return m.other(m.middle(h).tanh())


def hidden_itself(m: Hidden, h: Tensor) -> Tensor:
    return h if m.gate.item() > 0.0 else nn.functional.pad(m.head(h), (0, 4))


def by_a_list(m: Hidden, h: Tensor) -> Tensor:
    (value,) = m.gate.tolist()
    return m.head(h) if value > 0 else h[:, :2] * 1


def steps(m: Hidden, h: Tensor) -> Tensor:
    n = 0
    while h.abs().max() > 0.2 and n < 3:
        h, n = 0.5 * m.middle(h).tanh(), n + 1
    return m.head(h)


MODELS: dict[str, tuple[Callable[[Hidden, Tensor], Tensor], float]] = {
    # cut at a place that a weight says: nothing of the six units may move
    "slice": (lambda m, h: h[:, : width(m)] @ m.head.weight[:, : width(m)].t(), 0.0),
    "start of a slice": (lambda m, h: h[:, width(m) :] @ m.head.weight[:, width(m) :].t(), 0.0),
    "narrow": (lambda m, h: h.narrow(1, 0, width(m)) @ m.head.weight.narrow(1, 0, width(m)).t(), 0.0),
    "parts": (in_parts, 0.0),
    "constant numbers": (by_index, 0.0),
    "turned": (lambda m, h: m.head(h.roll(width(m), 1)), 0.0),
    "order of dimensions": (lambda m, h: m.head(h[:6] @ m.middle.weight.permute(width(m) % 2, 1 - width(m) % 2)), 0.0),
    "one unit": (lambda m, h: m.head(h) + h[:, width(m), None], 0.0),
    # read, and of no consequence for the numbering: the cut is along the batch, or there is none
    "rows": (lambda m, h: m.head(h)[: width(m)], SIX),
    "factor": (lambda m, h: m.head(h) * m.gate.item(), SIX),
    # another branch ties, or returns, what the first does not: on both, what is common
    "early exit": (early, 2 * SIX),
    "the units themselves": (hidden_itself, 0.0),
    "by a list": (by_a_list, math.lgamma(5)),
    # the middle layer is square and run once, twice, three times or not at all: one axis
    "steps": (steps, SIX),
}


def errors(model: Hidden, spec: pg.PermutationSpec) -> list[float]:
    """The relative change of the outputs on many weights and inputs, of all scales, so that every branch is met."""
    found = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        net = copy.deepcopy(model).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(generator=generator).mul_(4.0 ** (seed % 5 - 2))
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        moved = copy.deepcopy(net)
        moved.load_state_dict(spec.random(seed=seed, every_group=True).apply(net.state_dict()))
        with torch.no_grad():
            a, b = net(x), moved(x)
        found.append(float((a - b).abs().max() / a.abs().max()) if a.numel() else 0.0)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_every_branch_holds(name: str, seed: int) -> None:
    """Whichever branch the first pass takes, the spec of several is the same, and right on all of them."""
    use, expected = MODELS[name]
    torch.manual_seed(seed)
    model = Hidden(use)
    spec = pg.auto_spec(model, (torch.randn(6, 3),), max_passes=12)
    assert max(errors(model, spec)) < 1e-9
    assert spec.log_order() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["slice", "by a list", "the units themselves"])
def test_one_pass_alone_gets_these_wrong(name: str) -> None:
    """The control: with one pass, on some weights, the errors are there; a note says on what the spec rests."""
    use, expected = MODELS[name]
    worst = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        model = Hidden(use)
        spec = pg.auto_spec(model, (torch.randn(6, 3),), vary=False)
        assert any("branch" in note for note in spec.notes)
        if spec.log_order() > expected:
            worst = max(worst, *errors(model, spec))
    assert worst > 1e-6


def test_what_reads_nothing_that_varies_has_no_draws() -> None:
    def constant(m: Hidden, h: Tensor) -> Tensor:
        return m.head(h) if torch.arange(3).sum().item() == 3 and h[h > 9].numel() == 0 else h

    names = [varied.name for varied in draws(capture(Hidden(constant), (torch.randn(2, 3),)))]
    assert names
    assert all(name.startswith("other values") for name in names), "only the selection depends on inputs"
    assert not list(draws(capture(Hidden(lambda m, h: m.head(h)), (torch.randn(2, 3),))))


def test_answers() -> None:
    assert otherwise(True, "otherwise") is False
    assert otherwise(3, "above") > 30
    assert isinstance(otherwise(3, "above"), int)
    assert otherwise(-2.5, "below") < -25


def test_drawn_values_are_others_of_the_same_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    variances = torch.rand(5) + 1
    assert (drawn_like(variances, generator, False) > 0).all()
    zeros = torch.zeros(5)
    assert drawn_like(zeros, generator, True).unique().numel() == 5
    assert torch.equal(drawn_like(torch.arange(3), generator, True), torch.arange(3))
    assert not torch.equal(variances, drawn_like(variances, generator, False))
