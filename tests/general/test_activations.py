"""Every activation of `torch.nn` between two linear layers: the structure of its units, derived by hand."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn.modules import activation

import permgraph as pg
from tests.general import models
from tests.general.models import vectors

POSITIVE, ODD, NEITHER = "P", "B", "S"

#: What f(c x) is: of a positive c f is homogeneous, of -1 it is odd, or nothing passes. A sigmoid is 1 less its mirror
#: image, which would move the next bias, and is no matrix on an axis; the same holds of a hard one.
STRUCTURES: dict[str, tuple[nn.Module, str]] = {
    "CELU": (nn.CELU(), NEITHER),
    "ELU": (nn.ELU(), NEITHER),
    "GELU": (nn.GELU(), NEITHER),
    "Hardshrink": (nn.Hardshrink(), ODD),
    "Hardsigmoid": (nn.Hardsigmoid(), NEITHER),
    "Hardswish": (nn.Hardswish(), NEITHER),
    "Hardtanh": (nn.Hardtanh(), ODD),
    "LeakyReLU": (nn.LeakyReLU(), POSITIVE),
    "LogSigmoid": (nn.LogSigmoid(), NEITHER),
    "LogSoftmax": (nn.LogSoftmax(-1), NEITHER),
    "Mish": (nn.Mish(), NEITHER),
    "PReLU": (nn.PReLU(), POSITIVE),
    "ReLU": (nn.ReLU(), POSITIVE),
    "ReLU6": (nn.ReLU6(), NEITHER),
    "RReLU": (nn.RReLU(), POSITIVE),
    "SELU": (nn.SELU(), NEITHER),
    "SiLU": (nn.SiLU(), NEITHER),
    "Sigmoid": (nn.Sigmoid(), NEITHER),
    "Softmax": (nn.Softmax(-1), NEITHER),
    "Softmin": (nn.Softmin(-1), NEITHER),
    "Softplus": (nn.Softplus(), NEITHER),
    "Softshrink": (nn.Softshrink(), ODD),
    "Softsign": (nn.Softsign(), ODD),
    "Tanh": (nn.Tanh(), ODD),
    "Tanhshrink": (nn.Tanhshrink(), ODD),
    "Threshold": (nn.Threshold(0.1, 0.2), NEITHER),
}
MORE = {
    "asymmetric Hardtanh": (nn.Hardtanh(-1, 2), NEITHER),
    "negative slope": (nn.LeakyReLU(-0.3), POSITIVE),
    "Threshold at zero": (nn.Threshold(0.0, 0.0), POSITIVE),
}
#: Those that halve an axis, take several inputs, or need images, stand elsewhere: `test_table.py`, and below.
ELSEWHERE = {"GLU", "MultiheadAttention", "Softmax2d"}


def test_all_are_here() -> None:
    known = {name for name in activation.__all__ if inspect.isclass(getattr(activation, name))}
    assert known == STRUCTURES.keys() | ELSEWHERE


@pytest.mark.parametrize(("function", "structure"), [*STRUCTURES.values(), *MORE.values()], ids=[*STRUCTURES, *MORE])
def test_structure(function: nn.Module, structure: str) -> None:
    torch.manual_seed(0)
    model = models.mlp(function).eval()
    spec = pg.auto_spec(model, (vectors(),), symmetry="general")
    assert [str(group.structure) for group in spec.groups.values()] == [structure]
    proof = pg.verify(model, spec, (vectors(),))
    assert proof.passed and proof.maximal, str(proof)


def test_softmax_over_channels() -> None:
    torch.manual_seed(0)
    model = models.convolutions(nn.Softmax2d()).eval()
    spec = pg.auto_spec(model, (models.images(),), symmetry="general")
    # The second axis is the linear bottleneck of that model.
    assert [str(group.structure) for group in spec.groups.values()] == ["S", "GL"]


def test_attention_as_a_module() -> None:
    """Of each head any matrix for queries and keys, and for values and what comes after."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Attends().eval(), models.sequences(12)
    spec = pg.auto_spec(model, (x,), symmetry="general")
    assert sorted(str(group.structure) for group in spec.groups.values()) == ["GL", "GL", "S"]
    assert spec.dimension() == 2 * 2 * 6**2
    assert pg.verify(model, spec, (x,)).passed
