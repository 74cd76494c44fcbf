"""Gains between which matrices act: what multiplies an axis and nothing else, and what else may read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import permgraph as pg
from permgraph.errors import MismatchError
from permgraph.matching.general.between import BalancedLine
from tests.general import models

Function = Callable[[nn.Module, Tensor], Tensor]


class Widened(nn.Module):
    """A linear layer, something with vectors of weights, and a linear layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.a, self.h, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function
        self.g, self.v = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.tied = self.g
        self.register_buffer("kept", torch.ones(6))
        self.norm = nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.function(self, self.a(x)))


def _randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.double()


def _moved(model: nn.Module, spec: pg.PermutationSpec, *inputs: Tensor | bool) -> float:
    """How far random elements move what a model returns."""
    before, state, worst = model(*inputs), {n: t.clone() for n, t in model.state_dict().items()}, 0.0
    for seed in range(3):
        model.load_state_dict(spec.random(seed).apply(state))
        after = model(*inputs)
        for one, other in zip(*((y,) if isinstance(y, Tensor) else y for y in (before, after)), strict=True):
            worst = max(worst, (one - other).abs().max().item() / one.abs().max().item())
    model.load_state_dict(state)
    return worst


#: What is added to or multiplied with six channels, and what acts on them. A square grows by the square of a factor, so
#: that factors pass and matrices do not; what is multiplied twice with one gain has the square of the gain before it.
#: A sign before the norm is taken up by the norm's gain, and the sign of what is squared shows nowhere.
SQUARES: list[tuple[str, Function, str]] = [
    ("square", lambda m, y: y + m.g * m.g, "M"),
    ("square as a function", lambda m, y: y + torch.mul(m.g, m.g), "M"),
    ("square of a copy", lambda m, y: y + m.g * m.g.clone(), "M"),
    ("square of two names", lambda m, y: y + m.g * m.tied, "M"),
    ("square of a buffer", lambda m, y: y + m.kept * m.kept, "M"),
    ("square of a row", lambda m, y: y + m.g[None] * m.g[None], "M"),
    ("cube", lambda m, y: y + m.g * m.g * m.g, "M"),
    ("square of the bias", lambda m, y: y + m.a.bias * m.a.bias, "S"),
    ("square taken off", lambda m, y: m.norm(y) - m.g * m.g, "M×B"),
    ("square as a gain", lambda m, y: m.norm(y) * (m.g * m.g), "M^2×B"),
    ("product of two", lambda m, y: y + m.g * m.v, "GL"),
    ("twice a gain", lambda m, y: y * m.g * m.g, "GL"),
    ("gain and bias", lambda m, y: y * m.g + m.v, "GL"),
]


@pytest.mark.parametrize(("function", "structure"), [row[1:] for row in SQUARES], ids=[row[0] for row in SQUARES])
def test_a_vector_times_itself_is_not_linear(function: Function, structure: str) -> None:
    model, x = _randomised(Widened(function)).eval(), torch.randn(5, 4).double()
    spec = pg.auto_spec(model, (x,), symmetry="general")
    assert [str(group.structure) for group in spec.acting.values()] == [structure]
    assert _moved(model, spec, x) < 1e-9
    assert pg.verify(model, spec, (x,)).passed


class Penalised(nn.Module):
    """A norm whose gain something else reads: always, in training mode, or under a flag."""

    def __init__(self, penalty: Function, when: str, norm: Callable[[int], nn.Module] = nn.RMSNorm, n: int = 6) -> None:
        super().__init__()
        self.a, self.norm, self.h, self.penalty, self.when = nn.Linear(4, n), norm(n), nn.Linear(n, 3), penalty, when

    def forward(self, x: Tensor, more: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        y = self.h(self.norm(self.a(x)))
        read = {"always": True, "in training": self.training, "under a flag": more}[self.when]
        return (y, self.penalty(self, y)) if read else y


READERS: list[tuple[str, Function]] = [
    ("sum of magnitudes", lambda m, y: m.norm.weight.abs().sum()),
    ("norm", lambda m, y: m.norm.weight.norm()),
    ("sum", lambda m, y: m.norm.weight.sum()),
    ("sum of squares", lambda m, y: (m.norm.weight * m.norm.weight).sum()),
    ("product with itself", lambda m, y: m.norm.weight @ m.norm.weight),
    ("softplus", lambda m, y: F.softplus(m.norm.weight).mean()),
    ("distance from one", lambda m, y: (m.norm.weight - 1).square().sum()),
    ("largest", lambda m, y: m.norm.weight.max()),
    ("the gain itself", lambda m, y: m.norm.weight.clone()),
]


@pytest.mark.parametrize("when", ["always", "in training", "under a flag"])
@pytest.mark.parametrize("penalty", [row[1] for row in READERS], ids=[row[0] for row in READERS])
def test_a_gain_that_is_read_elsewhere_stays(penalty: Function, when: str) -> None:
    model, x = _randomised(Penalised(penalty, when)).eval(), torch.randn(5, 4).double()
    spec = pg.auto_spec(model, (x,), symmetry="general")
    assert not spec.general_gains
    assert _moved(model, spec, x, True) < 1e-9
    assert _moved(model.train(), spec, x) < 1e-9


def test_a_gain_stays_while_matrices_act(tmp_path: Path) -> None:
    model = Penalised(READERS[0][1], "in training").eval()
    spec = pg.auto_spec(model, (torch.randn(5, 4),), symmetry="general")
    assert [str(group.structure) for group in spec.acting.values()] == ["O"]
    assert spec.gains_that_stay == {"norm.weight"}
    spec.save(tmp_path / "spec.json")
    again = pg.PermutationSpec.load(tmp_path / "spec.json")
    assert again.gains_that_stay == {"norm.weight"} and again.fingerprint == spec.fingerprint


PLUS_ONE: Callable[[int], nn.Module] = lambda n: models.Rms(n, 1.0)  # noqa: E731
CHANGES: list[tuple[str, Callable[[], nn.Module], set[str]]] = [
    ("nothing else", lambda: Penalised(lambda m, y: y, "always"), {"norm.weight"}),
    ("1 + gain", lambda: Penalised(lambda m, y: y, "always", PLUS_ONE), {"norm.weight"}),
    ("1 + gain, whose weight is read", lambda: Penalised(READERS[0][1], "in training", PLUS_ONE), set()),
    ("1 + gain, which is read", lambda: Penalised(lambda m, y: (1 + m.norm.weight).sum(), "always", PLUS_ONE), set()),
    ("a gain in another precision", lambda: Widened(lambda m, y: F.rms_norm(y, (6,)) * m.g.to(y.dtype)), {"g"}),
    ("a gain of two norms", lambda: Widened(lambda m, y: m.g * F.rms_norm(m.g * F.rms_norm(y, (6,)), (6,))), set()),
    ("a gain twice", lambda: Widened(lambda m, y: m.g * (m.g * F.rms_norm(y, (6,)))), {"g"}),
    ("two gains", lambda: Widened(lambda m, y: m.g * (m.v * F.rms_norm(y, (6,)))), {"g", "v"}),
    ("in two ways", lambda: Widened(lambda m, y: m.g * ((1 + m.g) * F.rms_norm(y, (6,)))), set()),
    ("two products", lambda: Widened(lambda m, y: m.g * y + m.g * F.rms_norm(y, (6,))), {"g"}),
]


@pytest.mark.parametrize(("build", "free"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_a_gain_that_nothing_else_reads_may_change(build: Callable[[], nn.Module], free: set[str]) -> None:
    model, x = _randomised(build()).eval(), torch.randn(5, 4).double()
    spec = pg.auto_spec(model, (x,), symmetry="general")
    assert set(spec.general_gains) == free
    assert _moved(model, spec, x) < 1e-9
    assert _moved(model.train(), spec, x) < 1e-9


@pytest.mark.parametrize("when", ["always", "in training"])
def test_what_is_aligned_keeps_gains_that_stay(when: str) -> None:
    a, b = (_randomised(Penalised(READERS[0][1], when), seed).eval() for seed in (1, 2))
    x = torch.randn(5, 4).double()
    spec = pg.auto_spec(a, (x,), symmetry="general")
    fit = pg.align(a, b, spec=spec)
    assert any("norm.weight" in note for note in fit.notes)
    aligned = _randomised(Penalised(READERS[0][1], when))
    aligned.load_state_dict(fit.transformation.apply(b.state_dict()))
    for ours, theirs in zip(aligned.train()(x), b.train()(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert torch.equal(aligned.norm.weight, b.norm.weight)


def test_what_needs_one_gain_in_both_networks_refuses_those_that_stay() -> None:
    a, b, wide = (_randomised(Penalised(READERS[0][1], "in training", n=n), n).eval() for n in (6, 6, 8))
    x = torch.randn(5, 4).double()
    spec, wider = (pg.auto_spec(model, (x,), symmetry="general") for model in (a, wide))
    with pytest.raises(MismatchError, match=r"norm\.weight.*spec\.permutations"):
        BalancedLine(a, a.state_dict(), b.state_dict(), spec, F.mse_loss)
    with pytest.raises(MismatchError, match=r"norm\.weight.*spec\.permutations"):
        pg.match_widths(wide.state_dict(), b.state_dict(), wider, spec)
