"""Polar factors and nuclear norms: the orthogonal matrix nearest to a matrix, and what it is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from permgraph.structures import Structure
from permgraph.structures.pairs import pairs_of


def polar(gram: Tensor) -> Tensor:
    """The orthogonal matrices (..., n, n) that maximise <Q, gram>: U Vᵀ of the singular value decomposition U S Vᵀ.

    Where a singular value is zero the factor is not unique; the decomposition's choice is deterministic.

    References:
        Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966.
    """
    u, _, v = torch.linalg.svd(gram)
    factor: Tensor = u @ v
    return factor


def nuclear_norm(gram: Tensor) -> Tensor:
    """The sums of singular values of matrices (..., n, n): what their polar factors are worth."""
    norm: Tensor = torch.linalg.svdvals(gram).sum(-1)
    return norm


def exactly_orthogonal(linear: str, matrix: Tensor) -> Tensor:
    """The rotations nearest to matrices (..., n, n), in float64; those of O1 with Q·1 = ±1."""
    near = matrix.double()
    if linear == "O1":
        n = near.shape[-1]
        along = near.sum((-2, -1), keepdim=True)
        ones = torch.where(along < 0, -1.0, 1.0).to(near.dtype) / n
        inside = near - near.mean(-1, keepdim=True)
        inside = inside - inside.mean(-2, keepdim=True)
        # On the complement of ones the matrix as it is, along them one: both singular values are then of one size.
        near = inside + ones
    return polar(near)


def exactly_paired(linear: str, matrix: Tensor) -> Tensor:
    """Matrices (..., n, n) in float64; those of rotary pairs with the same numbers at both places of each."""
    exact = matrix.double()
    if Structure(linear).is_paired:
        first, second = pairs_of(linear, exact.shape[-1])
        index = torch.arange(exact.shape[-1], device=exact.device)
        i, j = index[first], index[second]
        real = (exact[..., i, i] + exact[..., j, j]) / 2
        imaginary = (exact[..., j, i] - exact[..., i, j]) / 2
        return of_pairs(linear, real, imaginary, exact)
    return exact


def of_pairs(linear: str, real: Tensor, imaginary: Tensor, like: Tensor) -> Tensor:
    """Block-diagonal matrices, of the shape of `like`, that multiply each pair, seen as a complex number."""
    index = torch.arange(like.shape[-1], device=like.device)
    first, second = (index[part] for part in pairs_of(linear, like.shape[-1]))
    new = torch.zeros_like(like)
    new[..., first, first] = new[..., second, second] = real
    new[..., second, first], new[..., first, second] = imaginary, -imaginary
    return new
