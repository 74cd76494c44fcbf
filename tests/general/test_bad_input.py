"""What general symmetries are given and cannot take: a clear error, or permutations alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.errors import MismatchError
from permgraph.structures import is_member, random_element
from tests.general import models
from tests.general.models import tokens, vectors


def _linear() -> pg.PermutationSpec:
    return pg.auto_spec(models.mlp(nn.Identity()), (vectors(),), symmetry="general")


def _element(spec: pg.PermutationSpec, matrix: np.ndarray) -> pg.Transformation:
    return pg.Transformation(spec, spec.identity().permutation, {"0.weight": matrix}, {}, {})


@pytest.mark.parametrize("where", ["plain", "one more"])
def test_a_gain_with_a_zero_is_named(where: str) -> None:
    more = 1.0 if where == "one more" else 0.0
    model = models.Residual(lambda n: models.Rms(n, more))
    spec = pg.auto_spec(model, (tokens(),), symmetry="general")
    with torch.no_grad():
        model.blocks[1].norm.weight[2] = -more
    named = r"1 \+ blocks\.1\.norm\.weight" if more else r"blocks\.1\.norm\.weight"
    with pytest.raises(MismatchError, match=rf"the gain {named} has a zero.*spec\.permutations\(\)"):
        spec.random(0).apply(model.state_dict())
    assert spec.permutations().random(0).apply(model.state_dict())


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((7, 7)),
        np.ones((7, 7)),
        np.diag([1.0] * 6 + [0.0]),
        np.diag([1.0] * 6 + [1e-13]),
        np.eye(7) + np.triu(np.full((7, 7), 1e6), 1),
    ],
    ids=["zeros", "ones", "a zero", "a small one", "sheared"],
)
def test_singular_and_ill_conditioned_elements_are_refused(matrix: np.ndarray) -> None:
    with pytest.raises(MismatchError, match=r"'0\.weight' has the structure GL.*singular, or with a condition number"):
        _element(_linear(), matrix)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_elements_that_are_not_finite_are_refused(number: float) -> None:
    matrix = np.eye(7)
    matrix[2, 3] = number
    with pytest.raises(MismatchError, match=r"'0\.weight': matrices that are not finite"):
        _element(_linear(), matrix)


@pytest.mark.parametrize("factor", [1e-6, 0.1, 1e6])
def test_the_size_of_a_matrix_is_no_matter(factor: float) -> None:
    """Determinants of large matrices leave the range of numbers long before the matrices are singular."""
    generator = np.random.default_rng(0)
    for name in ("GL", "T", "T2", "R", "R2"):
        many = np.stack([factor * random_element(name, 128, generator) for _ in range(50)])
        # As large as matrices are taken to be by mistake; an error of that size relative to the matrix counts.
        assert is_member(name, many, 1e-9 * factor if name != "GL" else 1e-9).all(), name


def test_random_elements_of_many_pairs_belong() -> None:
    from tests.general.test_closed_forms import ROWS

    with torch.device("meta"):
        model = ROWS["llama3"][0](d=16, layers=2, heads=8, keys=8, each=128, inner=4, vocabulary=8).eval()
    spec = pg.auto_spec(model, symmetry="general")
    assert "T" in {str(group.structure) for group in spec.groups.values()}
    for seed in range(10):
        spec.random(seed).inverse()


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_numbers_of_other_kinds_are_refused(kind: torch.dtype) -> None:
    spec, model = _linear(), models.mlp(nn.Identity())
    state = model.state_dict() | {"0.weight": torch.ones(7, 3).to(kind)}
    with pytest.raises(MismatchError, match=rf"{kind} cannot be scaled or mixed.*spec\.permutations\(\)"):
        spec.random(0).apply(state)
    assert spec.permutations().random(0).apply(state)["0.weight"].dtype is kind


def test_quantised_weights_are_refused() -> None:
    spec, model = _linear(), models.mlp(nn.Identity())
    state = model.state_dict()
    quantised = torch.quantize_per_tensor(state["0.weight"], 0.1, 0, torch.qint8)
    with pytest.raises(MismatchError, match=r"0\.weight.*quantised"):
        spec.random(0).apply(state | {"0.weight": quantised})


class Stored(nn.Module):
    """A linear layer whose weight is whole numbers, with a scale for each row."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(outputs))
        self.register_buffer("whole", torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.whole.to(x.dtype) * self.scale[:, None]).T


def test_whole_numbers_keep_what_acts_on_them_to_permutations() -> None:
    """Saved integers stay put; of what only the real layer holds, nothing is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(Stored(3, 7), nn.Linear(7, 5), nn.Linear(5, 4)).eval()
    spec = pg.auto_spec(model, (vectors(),), symmetry="general")
    assert {str(g.structure) for g in spec.acting.values()} <= {"M", "GL"}
    assert "GL" in {str(g.structure) for g in spec.acting.values()}
    assert pg.verify(model, spec, (vectors(),)).passed
    moved = spec.random(0).apply(model.state_dict())
    assert moved["0.whole"].dtype is torch.int8


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(*s, dtype=torch.complex64)) for s in ((7, 3), (4, 7)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(self.a.dtype) @ self.a.T @ self.b.T)


def test_complex_parameters_keep_permutations() -> None:
    torch.manual_seed(0)
    model = Complex().eval()
    spec = pg.auto_spec(model, (vectors(),), symmetry="general")
    assert {str(g.structure) for g in spec.groups.values()} == {"S"}
    proof = pg.verify(model, spec, (vectors(),))
    assert proof.passed and proof.groups
    moved = spec.random(0, every_group=True).apply(model.state_dict())
    assert moved["a"].dtype is torch.complex64 and bool((moved["a"].imag != 0).any())
