"""Determinants, inverses, solutions, factors, sparse matrices and lists: what a renumbering of units does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.groups.test_layouts import Net, lin, par
from tests.groups.test_table import check, s

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
PLACES = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
Forward = Callable[[Any, Tensor], Any]


def _square(w: Tensor) -> Tensor:
    """Symmetric and positive."""
    return w @ w.mT + torch.eye(6).to(w)


def _beside(function: Callable[[Tensor], Tensor]) -> Forward:
    """A number from a square weight that joins two layers, whose rows and columns are units of one each."""
    return lambda m, x: (m.o((m.a(x) @ m.w).relu()), function(m.w))


# Functions of a vector of 3, with a layer of 6 units and a weight of (6, 6), and one of 6 to 2.
MODULES: dict[str, tuple[Forward, float]] = {
    "logarithm of a determinant": (_beside(lambda w: torch.linalg.slogdet(w)[1]), 2 * s(6)),
    "squared determinant": (_beside(lambda w: torch.linalg.det(w) ** 2), 2 * s(6)),
    "logarithm of a determinant's size": (_beside(lambda w: torch.det(w).abs().log()), 2 * s(6)),
    "determinant": (_beside(torch.linalg.det), s(6)),
    "sign and logarithm of a determinant": (_beside(lambda w: torch.cat([t[None] for t in torch.slogdet(w)])), s(6)),
    "determinant and its size": (_beside(lambda w: (lambda d: d + d.abs())(torch.det(w))), s(6)),
    "determinant to the third": (_beside(lambda w: torch.det(w) ** 3), s(6)),
    "nuclear norm": (_beside(lambda w: torch.linalg.matrix_norm(w, "nuc")), 2 * s(6)),
    "spectral norm": (_beside(lambda w: torch.linalg.matrix_norm(w, 2)), 2 * s(6)),
    "singular values": (_beside(torch.linalg.svdvals), 2 * s(6)),
    "a singular vector": (_beside(lambda w: torch.linalg.svd(w)[0][:, 0]), 0.0),
    "pseudoinverse": (_beside(lambda w: torch.linalg.pinv(w).square().sum()), 2 * s(6)),
    "pseudoinverse of a lower half": (_beside(lambda w: torch.linalg.pinv(w, hermitian=True).square().sum()), 0.0),
    "lower half as a symmetric matrix": (_beside(lambda w: torch.linalg.eigvalsh(w).sum()), 0.0),
    "triangle": (_beside(lambda w: torch.linalg.qr(w)[1].square().sum(0)), 0.0),
    "distances of pairs": (_beside(lambda w: torch.pdist(w).square()), s(6)),
    "distance to the transpose": (_beside(lambda w: torch.dist(w, w.mT)), s(6)),
    "solution": (lambda m, x: m.o(torch.linalg.solve(_square(m.w), m.a(x).T).T.tanh()), 2 * s(6)),
    "solution with any matrix": (lambda m, x: m.o(torch.linalg.solve(m.w, m.a(x).T).T.tanh()), 2 * s(6)),
    "solution from the right": (lambda m, x: m.o(torch.linalg.solve(m.w, m.a(x), left=False).tanh()), 2 * s(6)),
    "solution for vectors": (lambda m, x: m.o(torch.linalg.solve(m.w.expand(4, 6, 6), m.a(x)).tanh()), 2 * s(6)),
    "solution and its factors": (
        lambda m, x: (m.o(torch.linalg.lu_solve(*torch.linalg.lu_factor(m.w), m.a(x).T).T.tanh())), 0.0
    ),
    "sparse neighbours": (
        lambda m, x: m.o((torch.sparse.mm(torch.eye(4).to(x).to_sparse_coo(), m.a(x)) @ m.w).relu()), 2 * s(6)
    ),
    "sparse neighbours by their places": (
        lambda m, x: m.o((torch.sparse_coo_tensor(PLACES, torch.ones(4).to(x), (4, 4)) @ m.a(x) @ m.w).relu()),
        2 * s(6),
    ),
    "sparse weight": (lambda m, x: m.o(torch.sparse.mm(m.w.to_sparse(), m.a(x).T).T.relu()), 2 * s(6)),
    "two blocks": (lambda m, x: m.o((m.a(x) @ torch.block_diag(m.w[:3, :3], m.w[3:, 3:])).relu()), 4 * s(3)),
    "blocks of several sizes": (
        lambda m, x: m.o((m.a(x) @ torch.block_diag(m.w[:2, :3], m.w[2:, 3:])).relu()), s(2) + s(4) + 2 * s(3)
    ),
    "a list of one": (lambda m, x: m.o((m.a(x) @ torch._foreach_mul([m.w], 0.5)[0]).relu()), 2 * s(6)),
    "a list with its transpose": (
        lambda m, x: m.o((m.a(x) @ torch._foreach_add([m.w, m.w], [m.w.mT, m.w])[0]).relu()), s(6)
    ),
    "a list beside another": (
        lambda m, x: m.o((m.a(x) @ torch._foreach_add([m.w.mT, m.w], [m.w.mT, m.w])[1]).relu()), 2 * s(6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_units_that_are_rows_and_columns(name: str) -> None:
    forward, order = MODULES[name]
    check(Net(forward, a=lin(3, 6), w=par(6, 6), o=lin(6, 2)), (X,), order)
