"""The best element of each compact structure for given Gram matrices: assignments, signs, polar factors, phases.

A Gram matrix G says how well A's indices agree with B's, so that an element g is worth the inner product <g, G>. Where
a group has signs, each place where it stands counts with the signs that act there: Gram matrices come apart by the
exponents of the signs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from permgraph.assignment.solve import Solver, assign
from permgraph.matching.general.acting import Element, powered
from permgraph.matching.general.polar import nuclear_norm, of_pairs, polar
from permgraph.spec.general import Action
from permgraph.structures import Structure
from permgraph.structures.pairs import pairs_of

Grams = Mapping[tuple[int, ...], Tensor]
"""For each combination of exponents of signs (empty where none acts) a Gram matrix (..., n, n): A's indices, B's."""


class Best(NamedTuple):
    """The best element: its value (...), and what of it there is: (..., n), (..., n, n), (..., n, number of signs)."""

    value: Tensor
    array: Tensor | None = None
    matrix: Tensor | None = None
    signs: Tensor | None = None

    def step(self, group: str) -> Element:
        """The element in which this group moves so, and all others are at rest."""
        parts = ({} if part is None else {group: part} for part in (self.array, self.matrix, self.signs))
        arrays, matrices, signs = parts
        return Element(arrays, matrices, {}, signs)


def signs_of(action: Action) -> tuple[int, ...]:
    """The exponents of signs by which a Gram matrix counts where a group acts so; empty where none acts."""
    return action.signs if any(action.signs) else ()


def gain(best: Best, grams: Grams) -> float:
    """How much more an element is worth than staying, for these Gram matrices."""
    if best.matrix is not None:
        gram = whole(grams)
        return float(
            torch.sum(best.matrix * gram, dtype=torch.float64)
            - torch.sum(gram.diagonal(dim1=-2, dim2=-1), dtype=torch.float64)
        )
    assert best.array is not None
    total = 0.0
    for exponents, gram in grams.items():
        moved = torch.take_along_dim(gram, best.array[..., None], -1)[..., 0]
        if exponents:
            assert best.signs is not None
            moved = moved * powered(best.signs, exponents)
        total += float(torch.sum(moved - gram.diagonal(dim1=-2, dim2=-1), dtype=torch.float64))
    return total


def best_value(structure: Structure, grams: Grams, solver: Solver = "auto") -> Tensor:
    """What the best element is worth: (...)."""
    if structure.linear in ("", "1"):
        return best_element(structure, grams, solver).value
    gram = whole(grams)
    if structure.is_paired:
        return _phases(structure.linear, gram).abs().sum(-1)
    if structure.linear == "O1":
        inner, along = _apart(gram)
        return nuclear_norm(inner) + along.abs()
    return nuclear_norm(gram)


def best_element(structure: Structure, grams: Grams, solver: Solver = "auto") -> Best:
    """The element of a structure's compact part that is worth most.

    Scales are at rest, and of invertible matrices only rotations are tried: models are balanced beforehand.
    """
    if structure.linear:
        return _best_matrix(structure.linear, whole(grams))
    found: Best | None = None
    combinations = list(itertools.product((1.0, -1.0), repeat=structure.signs))
    for flips in itertools.product((1.0, -1.0), repeat=structure.flips):
        best = _most(grams, structure.signs, flips)
        found = _better(found, _assigned(grams, best, combinations, flips, solver))
    assert found is not None
    return found


def _most(grams: Grams, number: int, flips: tuple[float, ...]) -> Tensor:
    """What each pair of indices is worth with its best signs, so many for each index, and the given common ones."""
    if number == 1:
        even, odd = (
            {key: gram for key, gram in grams.items() if bool(key and key[0] % 2) == is_odd} for is_odd in (False, True)
        )
        if not odd:
            return _signed(even, (1.0, *flips))
        turned = _signed(odd, (1.0, *flips)).abs()
        return turned.add_(_signed(even, (1.0, *flips))) if even else turned
    best: Tensor | None = None
    for signs in itertools.product((1.0, -1.0), repeat=number):
        total = _signed(grams, (*signs, *flips))
        best = total if best is None else torch.maximum(best, total)
    assert best is not None
    return best


def whole(grams: Grams) -> Tensor:
    """The sum of Gram matrices, where signs count for nothing."""
    total = None
    for gram in grams.values():
        total = gram if total is None else total + gram
    assert total is not None
    return total


def _signed(grams: Grams, signs: tuple[float, ...]) -> Tensor:
    total = None
    for exponents, gram in grams.items():
        odd = sum(e for e, sign in zip(exponents, signs, strict=False) if sign < 0) % 2
        term = -gram if odd else gram
        total = term if total is None else total + term
    assert total is not None
    return total


def _assigned(
    grams: Grams, best: Tensor, combinations: list[tuple[float, ...]], flips: tuple[float, ...], solver: Solver
) -> Best:
    """The best assignment where each pair is worth `best`, and the signs with which it is: the first that are best."""
    found = assign(best, maximise=True, solver=solver, name="a Gram matrix")
    columns = torch.from_numpy(found.columns).to(best.device)
    value = torch.take_along_dim(best, columns[..., None], -1).sum((-2, -1))
    if not flips and len(combinations) == 1:
        return Best(value, columns)
    own = {key: torch.take_along_dim(gram, columns[..., None], -1)[..., 0] for key, gram in grams.items()}
    each = torch.stack([_signed(own, (*signs, *flips)) for signs in combinations], -1)
    table = torch.tensor(combinations, dtype=best.dtype, device=best.device).reshape(len(combinations), -1)
    signs = table[(each == each.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)]
    common = torch.tensor(flips, dtype=best.dtype, device=best.device).expand(*signs.shape[:-1], len(flips))
    return Best(value, columns, None, torch.cat([signs, common], -1))


def _better(one: Best | None, other: Best) -> Best:
    if one is None:
        return other
    assert one.array is not None and other.array is not None and one.signs is not None and other.signs is not None
    first = one.value >= other.value
    return Best(
        torch.where(first, one.value, other.value),
        torch.where(first[..., None], one.array, other.array),
        None,
        torch.where(first[..., None, None], one.signs, other.signs),
    )


def _best_matrix(name: str, gram: Tensor) -> Best:
    if Structure(name).is_paired:
        z = _phases(name, gram)
        size = z.abs()
        cosine = torch.where(size > 0, z.real / size.clamp_min(torch.finfo(size.dtype).tiny), torch.ones_like(size))
        sine = torch.where(size > 0, z.imag / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(size))
        matrix = of_pairs(name, cosine, sine, gram)
        return Best(size.sum(-1), None, matrix)
    if name == "O1":
        inner, along = _apart(gram)
        turned = polar(inner)
        sign = torch.where(along < 0, -torch.ones_like(along), torch.ones_like(along))
        mirror = mirror_of_ones(gram)
        whole = torch.nn.functional.pad(turned, (1, 0, 1, 0))
        whole[..., 0, 0] = sign
        return Best((turned * inner).sum((-2, -1)) + along.abs(), None, mirror @ whole @ mirror)
    matrix = polar(gram)
    return Best((matrix * gram).sum((-2, -1)), None, matrix)


def _phases(name: str, gram: Tensor) -> Tensor:
    """For each pair of indices the complex number whose phase turns B's pair to A's, and whose size is its worth."""
    first, second = pairs_of(name, gram.shape[-1])

    def diagonal(i: slice, j: slice) -> Tensor:
        return torch.diagonal(gram[..., i, j], dim1=-2, dim2=-1)

    real = diagonal(first, first) + diagonal(second, second)
    turned = diagonal(second, first) - diagonal(first, second)
    return torch.complex(real, torch.zeros_like(turned) if name in ("R", "R2") else turned)


def mirror_of_ones(like: Tensor) -> Tensor:
    """The reflection that takes the first unit vector to the direction of ones."""
    n = like.shape[-1]
    first = -torch.full((n,), n**-0.5, dtype=like.dtype, device=like.device)
    first[0] += 1
    length = first @ first
    identity = torch.eye(n, dtype=like.dtype, device=like.device)
    return identity - (2 / length) * torch.outer(first, first) if float(length) > 1e-12 else identity


def _apart(gram: Tensor) -> tuple[Tensor, Tensor]:
    """A Gram matrix on the complement of the vector of ones, and along that vector."""
    mirror = mirror_of_ones(gram)
    turned = mirror @ gram @ mirror
    return turned[..., 1:, 1:], turned[..., 0, 0]
