"""Small modules with the structures that they have, in closed form: inferred, verified, and shown to be the largest.

The structures are those of the groups in the order of the spec; `dimension` counts by hand: n² for GL(n), n (n - 1) / 2
for O(n), (n - 1) (n - 2) / 2 for what leaves the vector of ones in its place, n for each free positive factor.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import permgraph as pg
from tests.general import models
from tests.general.models import images, sequences, tokens, vectors

O7, O7_1 = 7 * 6 // 2, 6 * 5 // 2
NORM, RMS, PLUS_ONE = nn.LayerNorm, models.Rms, lambda n: models.Rms(n, 1.0)
BARE = lambda n: nn.LayerNorm(n, elementwise_affine=False)  # noqa: E731

Row = tuple[str, Callable[[], nn.Module], Callable[[], torch.Tensor], list[str], int]

ROWS: list[Row] = [
    # linear, function, linear
    ("relu", lambda: models.mlp(nn.ReLU()), vectors, ["P"], 7),
    ("relu in place", lambda: models.mlp(nn.ReLU(inplace=True)), vectors, ["P"], 7),
    ("leaky relu", lambda: models.mlp(nn.LeakyReLU()), vectors, ["P"], 7),
    ("one slope", lambda: models.mlp(nn.PReLU()), vectors, ["P"], 7),
    ("a slope each", lambda: models.mlp(nn.PReLU(7)), vectors, ["P"], 7),
    ("tanh", lambda: models.mlp(nn.Tanh()), vectors, ["B"], 0),
    ("sin", lambda: models.Elementwise(torch.sin), vectors, ["B"], 0),
    ("erf", lambda: models.Elementwise(torch.erf), vectors, ["B"], 0),
    ("asinh", lambda: models.Elementwise(torch.asinh), vectors, ["B"], 0),
    ("gelu", lambda: models.mlp(nn.GELU()), vectors, ["S"], 0),
    ("gelu by tanh", lambda: models.mlp(nn.GELU("tanh")), vectors, ["S"], 0),
    ("silu", lambda: models.mlp(nn.SiLU()), vectors, ["S"], 0),
    ("relu6", lambda: models.mlp(nn.ReLU6()), vectors, ["S"], 0),
    ("softplus", lambda: models.mlp(nn.Softplus()), vectors, ["S"], 0),
    ("hardswish", lambda: models.mlp(nn.Hardswish()), vectors, ["S"], 0),
    ("identity", lambda: models.mlp(nn.Identity()), vectors, ["GL"], 49),
    ("shifted", lambda: models.Elementwise(lambda x: x + 1), vectors, ["S"], 0),
    ("scaled", lambda: models.Elementwise(lambda x: 3 * x), vectors, ["GL"], 49),
    # of cosine, magnitude and square the sign is free on one side alone; the last two have a degree besides
    ("cosine", lambda: models.Elementwise(torch.cos), vectors, ["B"], 0),
    ("magnitude", lambda: models.Elementwise(torch.abs), vectors, ["M"], 7),
    ("square", lambda: models.Elementwise(torch.square), vectors, ["M"], 7),
    ("cube", lambda: models.Elementwise(lambda x: x**3), vectors, ["M"], 7),
    ("square of relu", lambda: models.Elementwise(lambda x: F.relu(x) ** 2), vectors, ["P"], 7),
    ("softmax over the units", lambda: models.mlp(nn.Softmax(-1)), vectors, ["S"], 0),
    # gates
    ("swiglu", lambda: models.Gated(F.silu), vectors, ["M"], 7),
    ("swiglu in one", lambda: models.Gated(F.silu, fused=True), vectors, ["M"], 7),
    ("geglu", lambda: models.Gated(F.gelu), vectors, ["M"], 7),
    ("reglu", lambda: models.Gated(F.relu), vectors, ["M×P"], 14),
    ("bilinear", lambda: models.Gated(lambda x: x), vectors, ["M^2"], 14),
    ("glu", lambda: nn.Sequential(nn.Linear(3, 14), nn.GLU(), nn.Linear(7, 4)), vectors, ["M"], 7),
    # any matrix
    ("low rank", models.LowRank, lambda: sequences(5), ["GL"], 9),
    ("gain between", lambda: nn.Sequential(nn.Linear(3, 7), Gain(), nn.Linear(7, 4)), vectors, ["GL"], 49),
    ("gram", models.Gram, vectors, ["O"], O7),
    ("cosines", models.Cosine, vectors, ["O"], O7),
    ("norm", lambda: models.Elementwise(lambda x: x / (1 + x.norm(dim=-1, keepdim=True))), vectors, ["O"], O7),
    ("norm of order one", lambda: models.Elementwise(lambda x: x / (1 + x.norm(1, -1, keepdim=True))), vectors,
     ["B"], 0),
    ("deviation", lambda: models.Elementwise(lambda x: x / (1 + x.std(-1, keepdim=True))), vectors, ["O1"], O7_1),
    ("its own mean left in", lambda: models.Elementwise(lambda x: x + x.mean(-1, keepdim=True)), vectors, ["S"], 0),
    # heads: query-key and value-output, each at each head
    ("heads", models.Attention, lambda: sequences(11), ["S", "GL", "GL"], 2 * 2 * 25),
    ("heads in one", lambda: models.Attention(fused=True), lambda: sequences(11), ["S", "GL", "GL"], 100),
    ("heads by hand", lambda: models.Attention(kernel=False), lambda: sequences(11), ["S", "GL", "GL"], 100),
    ("grouped", lambda: models.Attention(2, 3), lambda: sequences(11), ["S", "S", "GL", "GL"], 100),
    # of mixed logits each head has a factor beside the matrices of its channels, which the mixture undoes
    ("mixed heads", models.TalkingHeads, lambda: sequences(11), ["M", "S", "GL", "GL"], 3 + 2 * 3 * 25),
    # one axis that a view splits on the way
    ("viewed relu", lambda: models.Viewed(nn.ReLU()), vectors, ["P"], 12),
    ("viewed tanh", lambda: models.Viewed(nn.Tanh()), vectors, ["B"], 0),
    ("viewed", lambda: models.Viewed(nn.Identity()), vectors, ["GL"], 144),
    # streams
    ("rms norm", lambda: models.Residual(RMS), tokens, ["O", "S", "S"], O7),
    ("1 + gain", lambda: models.Residual(PLUS_ONE), tokens, ["O", "S", "S"], O7),
    ("layer norm", lambda: models.Residual(NORM), tokens, ["O1", "S", "S"], O7_1),
    ("layer norm by hand", lambda: models.Residual(models.Centred), tokens, ["O1", "S", "S"], O7_1),
    ("layer norm without gain", lambda: models.Residual(BARE), tokens, ["O1", "S", "S"], O7_1),
    ("layer scale", lambda: models.Residual(RMS, "scaled"), tokens, ["O", "S", "S"], O7),
    # a gain that is in the way: signs, and factors for each gain whose readers can take it
    ("tied", lambda: models.Residual(RMS, tied=True), tokens, ["M^2×B", "S", "S"], 14),
    ("tied, 1 + gain", lambda: models.Residual(PLUS_ONE, tied=True), tokens, ["B", "S", "S"], 0),
    ("tied without gain", lambda: models.Residual(BARE, tied=True), tokens, ["O1", "S", "S"], O7_1),
    ("tied layer norm", lambda: models.Residual(NORM, tied=True), tokens, ["M^2×S±", "S", "S"], 14),
    ("norm on the branch", lambda: models.Residual(RMS, "branch"), tokens, ["M^3×B^3", "S", "S"], 21),
    ("norm on the branch, 1 + gain", lambda: models.Residual(PLUS_ONE, "branch"), tokens, ["B", "S", "S"], 0),
    ("norm after", lambda: models.Residual(NORM, "after"), tokens, ["M×S±^3", "S", "S"], 7),
    ("rms norm after", lambda: models.Residual(RMS, "after"), tokens, ["M×B^3", "S", "S"], 7),
    # recurrent
    ("tanh cell", lambda: models.Recurrent(nn.RNN), lambda: sequences(3), ["B"], 0),
    ("relu cell", lambda: models.Recurrent(nn.RNN, nonlinearity="relu"), lambda: sequences(3), ["P"], 7),
    ("lstm", lambda: models.Recurrent(nn.LSTM), lambda: sequences(3), ["B"], 0),
    ("gru", lambda: models.Recurrent(nn.GRU), lambda: sequences(3), ["B"], 0),
    # images; the second group is a linear bottleneck of five channels
    ("conv relu", lambda: models.convolutions(nn.ReLU()), images, ["P", "GL"], 7 + 25),
    ("conv relu pool", lambda: models.convolutions(nn.ReLU(), nn.MaxPool2d(2)), images, ["P", "GL"], 32),
    ("batch norm", lambda: models.convolutions(nn.BatchNorm2d(7), nn.ReLU()), images, ["M×P", "GL"], 14 + 25),
    ("batch norm alone", lambda: models.convolutions(nn.BatchNorm2d(7)), images, ["M^2", "GL"], 39),
    ("batch norm without gain", lambda: models.convolutions(nn.BatchNorm2d(7, affine=False), nn.ReLU()), images,
     ["P", "GL"], 32),
    ("depthwise", lambda: models.convolutions(nn.Conv2d(7, 7, 3, groups=7), nn.ReLU6()), images, ["M", "GL"], 32),
    ("group norm", lambda: models.convolutions(nn.GroupNorm(1, 7)), images, ["M", "GL"], 32),
]  # fmt: skip


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.fixture(params=ROWS, ids=[row[0] for row in ROWS])
def row(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    name, build, inputs, structures, dimension = request.param
    # In training mode a scale before BatchNorm changes the variance beside ε, so it is a symmetry of evaluation alone.
    return build().eval(), (inputs(),), structures, dimension, not name.startswith("batch norm")


def test_permutations_cost_nothing_more() -> None:
    code = (
        "import sys, torch, permgraph as pg; pg.auto_spec(torch.nn.Sequential(torch.nn.Linear(3, 5)));"
        "assert not [name for name in sys.modules if name.startswith('permgraph.inference.general')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_structures_are_those_of_the_table(row: Any) -> None:
    model, inputs, structures, dimension, vary = row
    spec = pg.auto_spec(model, inputs, symmetry="general", vary=vary)
    assert [str(group.structure) for group in spec.groups.values()] == structures
    assert spec.dimension() == dimension
    assert spec.symmetry == "general"


def test_they_keep_the_function_and_nothing_larger_does(row: Any) -> None:
    model, inputs, _, _, vary = row
    spec = pg.auto_spec(model, inputs, symmetry="general", vary=vary)
    found = pg.verify(model, spec, inputs, further=2 if vary else 0)
    assert found.passed and found.max_error < 1e-12, str(found)
    assert found.maximal, str(found)


def test_the_permutations_are_what_they_were(row: Any) -> None:
    model, inputs, _, _, _ = row
    plain = pg.auto_spec(model, inputs)
    assert pg.auto_spec(model, inputs, symmetry="general").permutations() == plain
    assert plain.symmetry == "permutation" and plain.dimension() == 0
    assert math.isclose(plain.log_order(), pg.auto_spec(model, inputs, symmetry="general").log_order())


@pytest.mark.parametrize(
    ("between", "structures"),
    [
        (
            (nn.BatchNorm2d(7), nn.ReLU()),
            ["M", "GL"],
        ),  # a sign before, a positive factor after, which gain and bias take up
        ((nn.BatchNorm2d(7),), ["M×B", "GL"]),  # and after it either sign
        ((nn.BatchNorm2d(7, affine=False),), ["B", "GL"]),
    ],
)
def test_in_training_mode_no_scale_passes_batch_norm(between: tuple[nn.Module, ...], structures: list[str]) -> None:
    spec = pg.auto_spec(models.convolutions(*between), (images(),), symmetry="general")
    assert [str(group.structure) for group in spec.groups.values()] == structures
