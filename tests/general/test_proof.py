"""What `verify` tries of a general spec beside the first inputs, and groups of which no control can be torn apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.structures import Structure
from tests.general import models
from tests.general.models import sequences, vectors


class Pairs(nn.Module):
    """A factorisation machine: its table is its only parameter, in which each column may change its sign."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return 0.5 * (rows.sum(1) ** 2 - (rows**2).sum(1)).sum(-1)


class Tied(nn.Module):
    """An autoencoder whose encoder is its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.w.T


class Asked(nn.Module):
    """A third of its channels show under a flag alone, and then by their norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 18), nn.Linear(6, 2)

    def forward(self, x: Tensor, more: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        one, asked, other = self.a(x).chunk(3, -1)
        y = self.b(torch.tanh(one) + other)
        return (y, asked.norm(dim=-1)) if more else y


ONE_PLACE: list[tuple[str, Callable[[], nn.Module], Callable[[], Tensor], list[str], int]] = [
    ("pairs", Pairs, lambda: torch.arange(12).reshape(2, 6) % 9, ["B"], 0),
    ("tied", Tied, vectors, ["B"], 0),
    ("shown under a flag", Asked, vectors, ["B", "O"], 1),
]


@pytest.mark.parametrize(
    ("build", "inputs", "structures", "silent"), [row[1:] for row in ONE_PLACE], ids=[row[0] for row in ONE_PLACE]
)
def test_groups_that_cannot_be_torn_apart_pass(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], structures: list[str], silent: int
) -> None:
    model = build().eval()
    spec = pg.auto_spec(model, (inputs(),), symmetry="general")
    assert [str(group.structure) for group in spec.acting.values()] == structures
    proof = pg.verify(model, spec, (inputs(),))
    assert proof.passed, str(proof)
    assert len(proof.without_influence) == silent


@pytest.mark.parametrize(("build", "inputs", "group"), [(Pairs, ONE_PLACE[0][2], 0), (Tied, vectors, 0)])
def test_at_one_place_a_group_that_is_too_large_is_found(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], group: int
) -> None:
    model = build().eval()
    spec = pg.auto_spec(model, (inputs(),), symmetry="general")
    assert spec.general is not None
    name = list(spec.acting)[group]
    acts = {p: tuple(replace(a, powers=(1,), signs=()) for a in own) for p, own in spec.general.actions.items()}
    groups = {**spec.groups, name: replace(spec.groups[name], structure=Structure("GL"))}
    larger = replace(spec, groups=groups, general=replace(spec.general, actions=acts))
    proof = pg.verify(model, larger, (inputs(),))
    assert not proof.passed and proof.failed == (name,)


class Later(models.Attention):
    """Attention of one kind on the first inputs, and of another where `other` says."""

    def __init__(self, other: Callable[[nn.Module, Tensor], bool], what: str) -> None:
        super().__init__(kernel=False)
        self.other, self.what, self.count = other, what, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        changed = self.other(self, x)
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 2, 5).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if changed and self.what == "values":
            v = v.tanh()
        scores = q @ k.transpose(-1, -2)
        if changed and self.what == "scores":
            scores = scores.tanh()
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


RUNS: list[tuple[str, Callable[[nn.Module, Tensor], bool]]] = [
    ("training", lambda m, x: m.training),
    ("sizes", lambda m, x: x.numel() > sequences(11).numel()),
    ("calls", lambda m, x: m.count > 1),
]


@pytest.mark.parametrize("what", ["values", "scores"])
@pytest.mark.parametrize("other", [row[1] for row in RUNS], ids=[row[0] for row in RUNS])
def test_what_one_pass_shows_is_tried_on_others(other: Callable[[nn.Module, Tensor], bool], what: str) -> None:
    """With the values' function the matrices are wrong; with that of the scores the keys' bias is no null direction."""
    model, x = Later(other, what).eval(), sequences(11)
    spec = pg.auto_spec(model, (x,), symmetry="general", vary=False)
    assert {str(group.structure) for group in spec.acting.values()} == {"S", "GL"} and spec.null_directions
    model.count = 0
    assert pg.verify(model, spec, (x,), further=0, controls="none").passed
    proof = pg.verify(model, spec, (x,), controls="none")
    assert not proof.passed and len(proof.runs) > 1
    assert any(run.error is not None and run.error > proof.tolerance for run in proof.runs[1:])


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_what_holds_in_all_runs_passes(seconds: float) -> None:
    model, x = models.Attention().eval(), sequences(11)
    proof = pg.verify(model, pg.auto_spec(model, (x,), symmetry="general"), (x,), further=seconds)
    assert proof.passed and (len(proof.runs) > 1) == (seconds > 0)
