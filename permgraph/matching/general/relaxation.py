"""Elements of general structures relaxed to convex hulls, for Frank-Wolfe's steps.

The hull of the orthogonal matrices is the ball of spectral norm one, whose corner in a direction is the polar factor;
that of permutations is the doubly stochastic matrices; that of signed permutations has for each pair of indices and
each combination of signs a weight, which all together are doubly stochastic, so that what is permuted without a sign
goes along.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from permgraph.assignment.solve import Solver, assign
from permgraph.errors import PermgraphError
from permgraph.matching.general.acting import Acting, Element
from permgraph.matching.general.compact import best_element
from permgraph.matching.problem.objective import Pair
from permgraph.matching.relaxation import Matrices, Relaxation
from permgraph.spec.blocks import Block

MOST_SIGNS = 10
"""Weights are held for each combination of signs: two to the power of their number."""


class GeneralRelaxation(Relaxation):
    """The objective between two models in one gauge, as a polynomial in relaxed elements.

    A group of matrices has them as `Relaxation` lays them out; one with signs has one dimension more, last, with an
    entry for each combination of them (the common ones last, +1 before -1).

    Raises:
        PermgraphError: a group has more than `MOST_SIGNS` signs.
    """

    def __init__(self, compared: Pair, acting: Acting) -> None:
        self.acting = acting
        self._signs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for group in acting.of_group:
            if self._number(group) > MOST_SIGNS:
                raise PermgraphError(
                    f"the group {group!r} has {self._number(group)} signs for each index: Frank-Wolfe would hold "
                    f"{1 << self._number(group)} weights for each pair of them; take WeightMatching(), or "
                    f"spec.permutations()"
                )
        super().__init__(compared, acting.plain)

    def _number(self, group: str) -> int:
        structure = self.acting.structure(group)
        return structure.signs + structure.flips

    def matrix_at(self, block: Block, axis: int) -> str | None:
        """The name of the matrix that an axis goes through: the group's, with the exponents of signs that act there."""
        group = block.leaves[axis].group
        if group is None or group not in self.groups:
            return None
        action = self.acting.action(block, axis)
        if self.acting.structure(group).linear:
            return group if action.powers else None
        if not self._number(group):
            return group
        exponents = action.signs or (0,) * self._number(group)
        name = f"{group} with signs {exponents}"
        self._signs[name] = group, exponents
        return name

    def through(self, matrices: Matrices) -> Matrices:
        """What the axes go through: of weights for combinations of signs the sums with the signs that act there."""
        found = {name: matrix for name, matrix in matrices.items() if not self._number(name)}
        for name, (group, exponents) in self._signs.items():
            found[name] = matrices[group] @ self._products(exponents)
        return found

    def value_and_slope(self, matrices: Matrices) -> tuple[float, Matrices]:
        """The relaxed objective and its derivative by each entry."""
        value, slopes = super().value_and_slope(self.through(matrices))
        slope = {name: slopes[name] for name in matrices if name in slopes}
        for name, (group, exponents) in self._signs.items():
            part = slopes[name][..., None] * self._products(exponents)
            slope[group] = slope[group] + part if group in slope else part
        return value, slope

    def _products(self, exponents: tuple[int, ...]) -> Tensor:
        """The product of the signs with these exponents, for each combination of signs."""
        combinations = itertools.product((1.0, -1.0), repeat=len(exponents))
        products = [math.prod(s for s, e in zip(signs, exponents, strict=True) if e) for signs in combinations]
        return torch.tensor(products, dtype=self.like.dtype, device=self.like.device)

    def barycentre(self) -> Matrices:
        """The mean over the whole group: permutations all alike, and zero where rotations or signs act."""
        found = {}
        for name in self.groups:
            shape = self.shape(name)
            if self.acting.structure(name).linear:
                found[name] = self.like.new_zeros(shape)
            else:
                number = self._number(name)
                sizes = (*shape, 1 << number) if number else shape
                found[name] = self.like.new_full(sizes, 1 / (shape[-1] << number))
        return found

    def identity(self) -> Matrices:
        """The matrices of the identity."""
        return self.corner_at(Element())

    def corner_at(self, element: Element) -> Matrices:
        """The matrices of an element; for pairs that it does not match, what is inside is the same for all."""
        found = self.corner({name: array.cpu().numpy() for name, array in element.arrays.items()})
        for name in self.groups:
            if self.acting.structure(name).linear and name in element.matrices:
                found[name] = self._apart(name, element.matrices[name], 2)
            elif self._number(name):
                signs = element.signs.get(name)
                number = self._number(name)
                if signs is None:
                    signs = self.like.new_ones(*self.acting.parents(name), self.shape(name)[-1], number)
                places = torch.tensor([1 << at for at in reversed(range(number))], device=signs.device)
                at = ((signs < 0) * places).sum(-1)
                chosen = torch.nn.functional.one_hot(at, 1 << number).to(self.like.dtype)
                found[name] = found[name][..., None] * self._apart(name, chosen, 2)[..., :, None, :]
        return found

    def _apart(self, name: str, tensor: Tensor, own: int) -> Tensor:
        """What is held at the new indices of a group's parents, for each of their old ones too."""
        shape = self.shape(name)[:-2]
        for at, parent in reversed(list(enumerate(self.spec.groups[name].parents))):
            if parent in self.groups:
                tensor = tensor.unsqueeze(at + 1)
        return tensor.expand(*shape, *tensor.shape[-own:]).to(self.like.dtype)

    def best_corner(self, slope: Matrices, solver: Solver, here: Matrices | None = None) -> Matrices:
        """The element that the slope favours; what it tells nothing of stays where it is.

        At the barycentre of rotations and signs, what is seen across two of them is nothing yet.
        """
        found = super().best_corner({n: s for n, s in slope.items() if self._is_plain(n)}, solver)
        for name, own in slope.items():
            structure = self.acting.structure(name)
            if structure.linear:
                matrix = best_element(structure, {(): own}).matrix
                assert matrix is not None
                found[name] = matrix
            elif self._number(name):
                columns, at = self._best_signed(name, own, solver)
                weights = torch.zeros_like(own)
                rows = torch.nn.functional.one_hot(at, own.shape[-1]).to(own.dtype)
                index = columns[..., None, None].expand(*columns.shape, 1, own.shape[-1])
                found[name] = weights.scatter_(-2, index, rows[..., None, :])
            else:
                continue
            if here is not None:
                dims = (-2, -1) if structure.linear else (-3, -2, -1)
                silent = own.abs().amax(dims, keepdim=True) == 0
                found[name] = torch.where(silent, here[name], found[name])
        return {name: found[name] for name in slope}

    def _is_plain(self, name: str) -> bool:
        return not self.acting.structure(name).linear and not self._number(name)

    def _best_signed(self, name: str, worth: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
        """The best column of each row (..., n), and which combination of signs goes with it."""
        flips = 1 << self.acting.structure(name).flips
        each = worth.reshape(*worth.shape[:-1], -1, flips)
        kept: tuple[Tensor, Tensor, Tensor] | None = None
        for flip in range(flips):
            best, own = each[..., flip].max(-1)
            found = assign(best, maximise=True, solver=solver, name=f"the weights of {name}")
            columns = torch.from_numpy(np.array(found.columns)).to(best.device)
            total = torch.take_along_dim(best, columns[..., None], -1).sum((-2, -1))
            at = torch.take_along_dim(own, columns[..., None], -1)[..., 0] * flips + flip
            if kept is not None:
                first = kept[0] >= total
                total = torch.where(first, kept[0], total)
                columns = torch.where(first[..., None], kept[1], columns)
                at = torch.where(first[..., None], kept[2], at)
            kept = total, columns, at
        assert kept is not None
        return kept[1], kept[2]

    def round_to_element(self, matrices: Matrices, solver: Solver) -> Element:
        """The element nearest to the matrices, parents first; inside, only for the pairs that they match."""
        element = Element()
        arrays: dict[str, np.ndarray] = {}
        for name in sorted(self.groups, key=lambda name: len(self.spec.groups[name].parents)):
            own, structure = self.matched(name, matrices[name], arrays), self.acting.structure(name)
            if structure.linear:
                matrix = best_element(structure, {(): own}).matrix
                assert matrix is not None
                element.matrices[name] = matrix
                continue
            if self._number(name):
                columns, at = self._best_signed(name, own, solver)
                number = self._number(name)
                bits = torch.tensor([1 << bit for bit in reversed(range(number))], device=at.device)
                element.signs[name] = 1.0 - 2.0 * ((at[..., None] & bits) > 0).to(self.like.dtype)
            else:
                found = assign(own, maximise=True, solver=solver, name=f"the matrix of {name}")
                columns = torch.from_numpy(np.array(found.columns)).to(own.device)
            element.arrays[name], arrays[name] = columns, columns.cpu().numpy()
        return element
