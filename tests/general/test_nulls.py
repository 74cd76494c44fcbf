"""Null directions: what can be added without effect is found, nothing else is, and `verify` tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.spec.general import NullDirection
from tests.general import models
from tests.general.models import images, sequences, tokens, vectors
from tests.general.test_rotary import Rotary, halves

Found = set[tuple[str, tuple[int, ...], tuple[int, int, int] | None]]
STREAM: Found = {
    (f"blocks.{i}.down.{name}", (0,), None) for i in range(2) for name in ("weight", "bias")
}  # fmt: skip


class Router(nn.Module):
    """A mixture of three experts by a softmax, or by a sigmoid."""

    def __init__(self, softmax: bool, cap: bool = False) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(3, 5), nn.Linear(3, 5)
        self.softmax, self.cap = softmax, cap

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.cap:
            logits = 30 * torch.tanh(logits / 30)
        weights = logits.softmax(-1) if self.softmax else logits.sigmoid()
        return (weights * self.experts(x)).sum(-1)


class Sinks(models.Attention):
    """Attention with one more logit for each head, to which nothing belongs."""

    def __init__(self) -> None:
        super().__init__(kernel=False)
        self.sinks = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
        logits = torch.cat([q @ k.transpose(-1, -2), self.sinks.view(1, 2, 1, 1).expand(b, 2, t, 1)], -1)
        return self.o((logits.softmax(-1)[..., :-1] @ v).transpose(1, 2).reshape(b, t, -1))


class Split(models.Attention):
    """Attention whose queries, keys and values are three parts of one layer."""

    def __init__(self) -> None:
        super().__init__(fused=True)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, -1, 5).transpose(1, 2) for y in self.qkv(x).split(10, -1))
        return self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


class Fused(models.Attention):
    """Attention whose queries, keys and values are three indices of a view of one layer."""

    def __init__(self) -> None:
        super().__init__(fused=True, kernel=False)


class Dropped(nn.Module):
    """Of four parts of a layer the third is not read; nor is a second layer."""

    def __init__(self, sliced: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.sliced = nn.Linear(3, 8), nn.Linear(3, 2), nn.Linear(2, 4), sliced

    def forward(self, x: Tensor) -> Tensor:
        self.b(x).tanh()
        if self.sliced:
            return self.c(self.a(x)[:, :2].tanh())
        one, two, _, three = self.a(x).chunk(4, -1)
        return self.c((one * two + three).tanh())


class Patches(nn.Module):
    """Patches of images, embedded by a convolution, in front of a norm of their channels."""

    def __init__(self, norm: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 6, 3, stride=3, groups=groups), norm, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.norm(y) if isinstance(self.norm, nn.GroupNorm) else self.norm(y.flatten(2).mT).mT
        return self.head(y.flatten(2).mean(-1))


class Step(nn.Module):
    """One step of a recurrence that begins with zeros: nothing reaches what multiplies the state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        return self.b((self.a(x) + self.r(state)).tanh())


class Before(nn.Module):
    """Something between logits and the softmax over them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, 5), nn.Linear(5, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)).softmax(-1))


TAKEN_OUT: Found = {("a.weight", (0,), None), ("a.bias", (0,), None)}

ROWS: list[tuple[str, Callable[[], nn.Module], Callable[[], Tensor], Found]] = [
    ("keys", lambda: models.Attention(kernel=False), lambda: sequences(11), {("k.bias", (), None)}),
    ("keys of a kernel", models.Attention, lambda: sequences(11), {("k.bias", (), None)}),
    ("a part", Split, lambda: sequences(11), {("qkv.bias", (), (0, 10, 20))}),
    ("turned keys", lambda: Rotary(halves), lambda: sequences(11), set()),
    ("sinks", Sinks, lambda: sequences(11), set()),
    ("stream", lambda: models.Residual(nn.LayerNorm), tokens, {*STREAM, ("table.weight", (1,), None)}),
    ("tied stream", lambda: models.Residual(nn.LayerNorm, tied=True), tokens, STREAM),
    ("norm after", lambda: models.Residual(nn.LayerNorm, "after"), tokens, STREAM),
    ("no mean", lambda: models.Residual(models.Rms), tokens, set()),
    ("router", lambda: Router(True), vectors, {("router.weight", (0,), None), ("router.bias", (0,), None)}),
    ("sigmoids", lambda: Router(False), vectors, set()),
    ("cap", lambda: Router(True, cap=True), vectors, set()),
    ("keys of a view", Fused, lambda: sequences(11), {("qkv.bias", (), (0, 10, 20))}),
    ("norm by hand", lambda: models.Residual(models.Centred), tokens, {*STREAM, ("table.weight", (1,), None)}),
    ("patches", lambda: Patches(nn.LayerNorm(6)), images, {("a.weight", (0,), None), ("a.bias", (0,), None)}),
    ("one group", lambda: Patches(nn.GroupNorm(1, 6)), images, {("a.bias", (0,), None)}),
    ("a group each", lambda: Patches(nn.GroupNorm(6, 6)), images, {("a.bias", (), None)}),
    ("two groups", lambda: Patches(nn.GroupNorm(2, 6)), images, {("a.bias", (0,), None)}),
    ("depthwise", lambda: Patches(nn.LayerNorm(6), groups=3), images, {("a.bias", (0,), None)}),
    ("no norm", lambda: Patches(nn.Identity()), images, set()),
    (
        "dropped",
        Dropped,
        vectors,
        {
            ("a.weight", (), (0, 4, 6)),
            ("a.bias", (), (0, 4, 6)),
            ("b.weight", (), None),
            ("b.bias", (), None),
        },
    ),
    ("cut off", lambda: Dropped(sliced=True), vectors, {("b.weight", (), None), ("b.bias", (), None)}),
    ("no state", Step, vectors, {("r.weight", (), None)}),
    ("linear", lambda: models.mlp(nn.ReLU()), vectors, set()),
    ("divided", lambda: Before(lambda x: torch.div(x, 0.5)), vectors, TAKEN_OUT),
    ("floor", lambda: Before(lambda x: torch.div(x, 0.5, rounding_mode="floor")), vectors, set()),
    ("trunc", lambda: Before(lambda x: torch.div(x, 0.5, rounding_mode="trunc")), vectors, set()),
    ("floor by a tensor", lambda: Before(lambda x: torch.div(x, x.new_ones(5), rounding_mode="floor")), vectors, set()),
    ("with alpha", lambda: Before(lambda x: torch.sub(torch.ones(5), x, alpha=2)), vectors, TAKEN_OUT),
    ("summed as whole numbers", lambda: Before(lambda x: x[:, None].sum(1, dtype=torch.long).to(x)), vectors, set()),
]


@pytest.mark.parametrize(("build", "inputs", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_null_directions(build: Callable[[], nn.Module], inputs: Callable[[], Tensor], expected: Found) -> None:
    torch.manual_seed(0)
    model = build().eval()
    spec = pg.auto_spec(model, (inputs(),), symmetry="general")
    assert {(d.parameter, d.uniform, d.part) for d in spec.null_directions} == expected
    assert all(d.reason for d in spec.null_directions)
    proof = pg.verify(model, spec, (inputs(),), controls="none")
    assert proof.passed and len(proof.null_errors) == len(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        NullDirection("q.bias", (), None, "a mistake"),
        NullDirection("k.weight", (0,), None, "a mistake"),
        NullDirection("o.bias", (0,), None, "a mistake"),
    ],
)
def test_what_is_none_is_refused(wrong: NullDirection) -> None:
    model = models.Attention(kernel=False).eval()
    spec = pg.auto_spec(model, (sequences(11),), symmetry="general")
    assert spec.general is not None
    claimed = replace(spec, general=replace(spec.general, null_directions=(*spec.null_directions, wrong)))
    proof = pg.verify(model, claimed, (sequences(11),), controls="none")
    assert not proof.passed and "no null direction" in str(proof)


def test_they_are_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    spec = pg.auto_spec(Split().eval(), (sequences(11),), symmetry="general")
    spec.save(tmp_path / "spec.json")
    assert (
        spec.null_directions and pg.PermutationSpec.load(tmp_path / "spec.json").null_directions == spec.null_directions
    )
