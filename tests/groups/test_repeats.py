"""What is ranked: free where its elements are distinct, and never where they may be equal by more than chance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import permgraph as pg
from permgraph.rules import registry, rule

ROWS = 4000
library = torch.library.Library("permgraph_repeats", "DEF")
library.define("half_steps(Tensor x) -> Tensor")
library.impl("half_steps", lambda x: (2 * x).round() / 2, "CompositeExplicitAutograd")


class Ranked(nn.Module):
    """The number of the largest of eight units, after `between`, looks up a table with a row for each unit."""

    def __init__(self, between: Callable[[Ranked, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.a = nn.Linear(3, width, bias=False)
        self.mix, self.mix_biased = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.scale, self.table = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width, 2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.table[self.between(self, self.a(x)).argmax(-1)]


def _changed_rows(model: Ranked, spec: pg.PermutationSpec) -> int:
    """On how many of many rows a random element of every group changes the result."""
    model = model.double()
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        moved = spec.random(1, every_group=True).apply(model.state_dict())
        after = torch.func.functional_call(model, moved, (x,))
    return int((before != after).any(-1).sum())


def _saliency(m: Ranked, h: Tensor) -> Tensor:
    g = torch.ops.aten.threshold_backward(m.scale.expand_as(h), h, 0)
    return -g.abs()


REPEATING: dict[str, Callable[[Ranked, Tensor], Tensor]] = {
    "the sign of a number as an angle": lambda m, h: torch.angle(h),
    "only the sign of one": lambda m, h: torch.copysign(torch.ones_like(h), h),
    "a leaky relu that leaks nothing": lambda m, h: F.leaky_relu(h, 0.0),
    "an elu that is flat": lambda m, h: F.elu(h, 0.0),
    "a product with a logarithm": lambda m, h: torch.xlogy(h.relu(), m.scale.exp()),
    "a gradient through a relu": _saliency,
    "a custom operator that rounds": lambda m, h: torch.ops.permgraph_repeats.half_steps(h),
    "the exponents of floating-point numbers": lambda m, h: torch.frexp(h)[1],
    "few units switched off at once": lambda m, h: m.mix(h.relu()),
    "a number less its own magnitude": lambda m, h: h - h.abs(),
    "a relu by hand": lambda m, h: h * (h > 0),
    "a norm of two zeros": lambda m, h: torch.stack([h.relu(), h.roll(1, 0).relu()], -1).norm(dim=-1),
    "a count, as a norm": lambda m, h: torch.stack([h, h.relu()], -1).norm(p=0, dim=-1),
    "a power of nothing": lambda m, h: h ** h.relu(),
    "dropped, and zero before": lambda m, h: F.dropout(h.relu(), training=False),
    "less its logsumexp of one": lambda m, h: h - h[..., None].logsumexp(-1),
    "less its logsumexp of one, mixed": lambda m, h: m.mix(h - h[..., None].logsumexp(-1)),
    "log_softmax of one": lambda m, h: h[..., None].log_softmax(-1)[..., 0],
    "layer_norm of one": lambda m, h: nn.functional.layer_norm(h[..., None], (1,))[..., 0],
    "group_norm of one": lambda m, h: nn.functional.group_norm(h, h.shape[-1]),
    "normalised alone": lambda m, h: nn.functional.normalize(h[..., None], dim=-1)[..., 0],
}


@pytest.fixture(autouse=True)
def _restored():  # type: ignore[no-untyped-def]
    """The table of rules as it was, with one rule that declares nothing."""
    before = dict(registry._rules)
    rule("permgraph_repeats.half_steps")(lambda call: call.link((call["x"], "..."), (call.out, "...")))
    yield
    registry._rules.clear()
    registry._rules.update(before)


@pytest.mark.parametrize("width", [5, 8, 9, 12])
@pytest.mark.parametrize("between", REPEATING.values(), ids=REPEATING)
def test_elements_that_may_be_equal_are_not_renumbered(between: Callable[[Ranked, Tensor], Tensor], width: int) -> None:
    torch.manual_seed(0)
    model = Ranked(between, width).double()
    spec = pg.auto_spec(model, (torch.randn(2, 3).double(),))
    assert _changed_rows(model, spec) == 0
    assert not any("table" in {name for name, _ in spec.uses(group)} for group in spec.moving)


DISTINCT: dict[str, Callable[[Ranked, Tensor], Tensor]] = {
    "as they are": lambda m, h: h,
    "scaled and shifted": lambda m, h: h * m.scale + 3,
    "a softmax": lambda m, h: h.softmax(-1),
    "less their mean, by their deviation": lambda m, h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True),
    "monotone": lambda m, h: torch.sigmoid(F.leaky_relu(h)),
    "zeros mixed, with a bias": lambda m, h: m.mix_biased(h.relu()),
    "normalised, gated": lambda m, h: F.layer_norm(h, (8,)) * torch.tanh(m.mix_biased(h)),
    "a sum of squares": lambda m, h: torch.cdist(h.unsqueeze(-1), m.scale[:1, None])[..., 0],
    "the fractional parts": lambda m, h: torch.frexp(h)[0],
    "attended to": lambda m, h: F.scaled_dot_product_attention(h[:, None], h[:, None], m.mix(h)[:, None])[:, 0],
}


@pytest.mark.parametrize("between", DISTINCT.values(), ids=DISTINCT)
def test_distinct_elements_are(between: Callable[[Ranked, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Ranked(between).double()
    spec = pg.auto_spec(model, (torch.randn(2, 3).double(),))
    assert any("table" in {name for name, _ in spec.uses(group)} for group in spec.moving)
    assert _changed_rows(model, spec) == 0


def test_a_custom_operator_may_say_that_it_keeps_numbers_apart() -> None:
    rule("permgraph_repeats.half_steps", values="distinct")(
        lambda call: call.link((call["x"], "..."), (call.out, "..."))
    )
    model = Ranked(lambda m, h: torch.ops.permgraph_repeats.half_steps(h))
    spec = pg.auto_spec(model, (torch.randn(2, 3),))
    assert [group.size for group in spec.moving.values()] == [8]


def _overwritten(m: Ranked, h: Tensor) -> Tensor:
    places = h.argsort(-1)
    places.copy_(places.clamp(max=2))
    return m.scale[places.argsort(-1)] + h


def _overwritten_through_a_view(m: Ranked, h: Tensor) -> Tensor:
    places = h.argsort(-1)
    places[..., :4].fill_(3)
    return m.scale[places.argsort(-1)] + h


RANKS: dict[str, tuple[Callable[[Ranked, Tensor], Tensor], bool]] = {
    "of distinct numbers": (lambda m, h: m.scale[h.argsort(-1).argsort(-1)] + h, True),
    "of the largest first": (lambda m, h: m.scale[h.argsort(-1, descending=True).argsort(-1)] + h, True),
    "by the largest of all": (lambda m, h: m.scale[h.argsort(-1).topk(8, -1).indices] + h, False),
    "of zeros": (lambda m, h: m.scale[h.relu().argsort(-1).argsort(-1)] + h, False),
    "overwritten": (_overwritten, False),
    "overwritten through a view": (_overwritten_through_a_view, False),
}


@pytest.mark.parametrize(("between", "free"), RANKS.values(), ids=RANKS)
def test_a_weight_for_each_rank(between: Callable[[Ranked, Tensor], Tensor], free: bool) -> None:
    torch.manual_seed(0)
    model = Ranked(between).double()
    spec = pg.auto_spec(model, (torch.randn(2, 3).double(),))
    assert any("a.weight" in {name for name, _ in spec.uses(group)} for group in spec.moving) == free
    assert _changed_rows(model, spec) == 0
