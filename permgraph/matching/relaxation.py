"""Permutations relaxed to doubly stochastic matrices: the objective over these, and Frank-Wolfe's steps on it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from permgraph.assignment.solve import Solver
from permgraph.conventions.outcomes import Outcome
from permgraph.matching.ascent.step import choose, choose_each
from permgraph.matching.matcher import Progress, Sweep
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import Pair
from permgraph.matching.problem.renumber import Arrays
from permgraph.matching.threads import look_again
from permgraph.spec.blocks import Block
from permgraph.spec.permutation import old_parents
from permgraph.spec.spec import PermutationSpec

log = logging.getLogger(__name__)

Matrices = dict[str, torch.Tensor]
"""For each group its doubly stochastic matrices, as `Relaxation` lays them out."""


def relaxed_start(compared: Pair, spec: PermutationSpec, solver: Solver) -> Arrays:
    """Where Frank-Wolfe's steps from the barycentre end, rounded; the identity where that is worth less."""
    ascent = RelaxedAscent(Relaxation(compared, spec), solver)
    ascent.climb()
    if ascent.outcome == "interrupted":
        raise KeyboardInterrupt
    rounded = ascent.rounded()
    return rounded if compared.objective_at(spec, rounded) >= compared.objective(compared.b) else {}


class Relaxation:
    """The objective as a polynomial in doubly stochastic matrices, one stack of them for each group.

    A group of size n has a tensor (..., n, n), new index before old, with for each parent that moves two axes more in
    front, its new index and its old, and for one that does not move a single one.
    """

    def __init__(self, compared: Pair, spec: PermutationSpec) -> None:
        self.compared, self.spec = compared, compared.spec_of(spec)
        self.plan = Plan(self.spec, compared.a)
        self.groups = [name for name in self.spec.moving if self.plan.blocks_with[name]]
        self.like = next(iter(compared.a.values()), torch.zeros(()))
        self.terms = [
            Term(block, [self.matrix_at(block, axis) for axis in range(len(block.leaves))])
            for blocks in self.plan.blocks.values()
            for block in blocks
        ]
        self.degree = max((len(term.factors) for term in self.terms), default=0)
        self.size = sum(
            float(torch.linalg.vector_norm(tensor)) * float(torch.linalg.vector_norm(compared.b[name]))
            for name, tensor in compared.a.items()
        )
        """No permutation's objective is further from 0 than this."""

    def matrix_at(self, block: Block, axis: int) -> str | None:
        """The name of the matrix that an axis of a block goes through; None where it stays put."""
        group = block.leaves[axis].group
        return group if group in self.groups else None

    def through(self, matrices: Matrices) -> Matrices:
        """What the axes go through, by the names that `matrix_at` gives; here the matrices themselves."""
        return matrices

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a group's matrices."""
        sizes: list[int] = []
        for parent in self.spec.groups[name].parents:
            sizes += [self.spec.groups[parent].size] * (2 if parent in self.groups else 1)
        return (*sizes, self.spec.groups[name].size, self.spec.groups[name].size)

    def barycentre(self) -> Matrices:
        """All entries equal."""
        return {name: self.like.new_full(self.shape(name), 1 / self.spec.groups[name].size) for name in self.groups}

    def identity(self) -> Matrices:
        """The matrices of the identity."""
        return self.corner({})

    def corner(self, arrays: Mapping[str, np.ndarray]) -> Matrices:
        """The matrices of a permutation; for pairs that it does not match, what is inside is the same for all."""
        corner = {}
        for name in self.groups:
            shape = self.shape(name)
            array = np.arange(shape[-1]) if name not in arrays else arrays[name]
            parents = self.spec.groups[name].parents if name in arrays else ()
            # The array is read at the parents' new indices; the old ones are axes along which nothing changes.
            keep = [slice(None) if k == 0 else None for p in parents for k in range(2 if p in self.groups else 1)]
            corner[name] = self._one_hot(np.broadcast_to(array[(*keep, slice(None))], shape[:-1]))
        return corner

    def best_corner(self, slope: Matrices, solver: Solver, here: Matrices | None = None) -> Matrices:
        """The permutation matrices that the slope favours.

        Args:
            slope: the derivative of what is climbed.
            solver: for the assignments.
            here: the present matrices, for structures that have reason to stay; these have none.
        """
        return {name: self._one_hot(columns) for name, (columns, _) in choose_each(slope, solver).items()}

    def _one_hot(self, columns: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(np.array(columns)).to(self.like.device)
        return torch.zeros(*index.shape, index.shape[-1], dtype=self.like.dtype, device=self.like.device).scatter_(
            -1, index[..., None], 1.0
        )

    def round(self, matrices: Matrices, solver: Solver) -> Arrays:
        """The permutations nearest to the matrices, parents first; inside, only for the pairs that they match."""
        arrays: Arrays = {}
        for name in sorted(self.groups, key=lambda name: len(self.spec.groups[name].parents)):
            arrays[name] = choose(self.matched(name, matrices[name], arrays), solver, name)[0]
        return arrays

    def matched(self, name: str, matrix: torch.Tensor, arrays: Arrays) -> torch.Tensor:
        """Of a group's matrices those for the pairs of its parents' indices that these arrays match."""
        parents = self.spec.groups[name].parents
        new = np.indices([self.spec.groups[parent].size for parent in parents], sparse=True)
        index: list[Any] = []
        for parent, here, old in zip(parents, new, old_parents(self.spec.groups, arrays, name), strict=True):
            index += [here, old] if parent in self.groups else [here]
        if not index:
            return matrix
        at = np.broadcast_arrays(*index)
        return matrix[tuple(torch.from_numpy(np.array(i)).to(matrix.device) for i in at)]

    def value(self, matrices: Matrices) -> float:
        """The relaxed objective, before scale and offset."""
        with torch.no_grad():
            seen = self.through(matrices)
            return sum(float(term.value(self.compared, seen)) for term in self.terms)

    def permuted(self, matrices: Matrices) -> dict[str, torch.Tensor]:
        """B's compared tensors under the matrices, as new tensors through which gradients flow.

        At the matrices of a permutation these are B's tensors permuted by it; in between, each element is a mean of
        elements of B.
        """
        permuted: dict[str, torch.Tensor] = {}
        for name, tensor in self.compared.b.items():
            terms = [term for term in self.terms if term.block.parameter == name]
            if len(terms) == 1 and terms[0].block.size == tensor.numel():
                permuted[name] = terms[0].permuted(tensor, matrices).reshape(tensor.shape)
                continue
            whole = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for term in terms:
                term.block.view(whole).copy_(term.permuted(tensor, matrices))
            permuted[name] = whole
        return permuted

    def value_and_slope(self, matrices: Matrices) -> tuple[float, Matrices]:
        """The relaxed objective and its derivative by each entry."""
        leaves = {name: matrix.detach().requires_grad_() for name, matrix in matrices.items()}
        total = 0.0
        for term in self.terms:  # one at a time, so that only one's intermediate results are in memory
            with torch.enable_grad():
                value = term.value(self.compared, leaves)
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]
            total += float(value.detach())
        return total, {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
        }

    def best_length(self, matrices: Matrices, direction: Matrices, value: float, rate: float) -> float:
        """Where between 0 and 1 along a direction the objective is greatest: exactly, since it is a polynomial.

        `value` and `rate` are the objective and its derivative at 0; as many further values as the degree asks for
        settle the rest.
        """
        if self.degree <= 1:
            return 1.0
        count = self.degree - 1
        points = np.arange(1, count + 1) / count
        values = [
            self.value({name: matrix + float(point) * direction[name] for name, matrix in matrices.items()})
            for point in points
        ]
        powers = points[:, None] ** np.arange(2, self.degree + 1)
        rest = np.linalg.solve(powers, np.array(values) - value - rate * points)
        return highest_point(np.polynomial.Polynomial([value, rate, *rest]))


def highest_point(polynomial: np.polynomial.Polynomial) -> float:
    """Where a polynomial is highest above 0 and up to 1."""
    flat = [complex(root) for root in np.atleast_1d(polynomial.deriv().roots())]
    inside = [root.real for root in flat if abs(root.imag) < 1e-9 and 0 < root.real < 1]
    return max((*inside, 1.0), key=lambda point: float(polynomial(point)))


class Term:
    """One block's part of the objective: A's block times B's, each moving axis through its group's matrix.

    Attributes:
        factors: (name of its matrix, axes of that, axes of the running product before, and after) for each moving axis,
            those inside others first. Axes are numbered: new indices from 0, old ones from the number of leaves.

    Args:
        block: the block.
        names: for each axis the name of the matrix that it goes through, None where it stays put.
    """

    def __init__(self, block: Block, names: Sequence[str | None]) -> None:
        self.block = block
        leaves = block.leaves
        count = len(leaves)

        def labels(axis: int) -> list[int]:
            return [axis, count + axis] if names[axis] is not None else [axis]

        axes = [axis for axis in range(count) if names[axis] is not None]
        # An axis with others inside it gives up its old index only once they no longer need it; until then both stand.
        # Those that have nothing to do with any other come first, while the product is smallest.
        axes.sort(
            key=lambda axis: (bool(leaves[axis].parents) or not _childless(block, axis), -len(leaves[axis].parents))
        )
        present = [labels(axis)[-1] for axis in range(count)]
        self.start = tuple(present)
        self.factors: list[tuple[str, list[int], list[int], list[int]]] = []
        for axis in axes:
            matrix = [label for parent in leaves[axis].parents for label in labels(parent)] + labels(axis)
            after = [label for label in dict.fromkeys([*present, *matrix]) if label != count + axis]
            name = names[axis]
            assert name is not None
            self.factors.append((name, matrix, present, after))
            present = after

    def value(self, compared: Pair, matrices: Matrices) -> torch.Tensor:
        """This part of the objective, a scalar."""
        name = self.block.parameter
        a = self.block.view(compared.a[name]).permute(self._end)
        return (a * self._product(compared.b[name], matrices)).sum()

    def permuted(self, tensor: torch.Tensor, matrices: Matrices) -> torch.Tensor:
        """This block of a parameter of B, each moving axis through its group's matrix; its axes are the leaves."""
        return self._product(tensor, matrices).permute([self._end.index(axis) for axis in range(len(self._end))])

    @property
    def _end(self) -> list[int]:
        """The leaves, in the order in which the product ends up having them."""
        return self.factors[-1][3] if self.factors else list(self.start)

    def _product(self, tensor: torch.Tensor, matrices: Matrices) -> torch.Tensor:
        product = self.block.view(tensor)
        for name, matrix, before, after in self.factors:
            product = torch.einsum(product, before, matrices[name], matrix, after)
        return product


def _childless(block: Block, axis: int) -> bool:
    return not any(axis in leaf.parents for leaf in block.leaves)


class RelaxedAscent:
    """Frank-Wolfe steps: the present matrices, and what has been reached.

    Args:
        relaxation: what to climb.
        solver: for the assignments.
        start: the matrices to begin with; the barycentre by default.
        max_steps, tolerance: as in `FrankWolfe`.
        started: what the seconds in the records are counted from.
    """

    def __init__(
        self,
        relaxation: Relaxation,
        solver: Solver = "auto",
        start: Matrices | None = None,
        max_steps: int = 50,
        tolerance: float = 1e-4,
        started: float | None = None,
    ) -> None:
        self.relaxation, self.compared, self.solver = relaxation, relaxation.compared, solver
        self.max_steps, self.tolerance = max_steps, tolerance
        self.started = time.perf_counter() if started is None else started
        self.matrices = relaxation.barycentre() if start is None else start
        self.value = self.gap = math.nan
        self.history: list[Sweep] = []
        self.outcome: Outcome = "sweep limit"

    def rounded(self) -> Arrays:
        """The permutations nearest to the matrices."""
        return self.relaxation.round(self.matrices, self.solver)

    def climb(self, progress: Progress | None = None) -> None:
        """Step until the slope promises nothing, or the limit, or Ctrl-C."""
        relaxation = self.relaxation
        try:
            self.value, slope = relaxation.value_and_slope(self.matrices)
            while True:
                towards = relaxation.best_corner(slope, self.solver, self.matrices)
                direction = {name: towards[name] - matrix for name, matrix in self.matrices.items()}
                self.gap = sum(float((slope[name] * step).sum(dtype=torch.float64)) for name, step in direction.items())
                if self.gap <= self.tolerance * relaxation.size:
                    self.outcome = "converged"
                    return
                if len(self.history) >= self.max_steps:
                    return
                length = relaxation.best_length(self.matrices, direction, self.value, self.gap)
                there = {name: matrix + length * direction[name] for name, matrix in self.matrices.items()}
                value, new_slope = relaxation.value_and_slope(there)
                if not value > self.value:
                    # What is left to gain is less than rounding.
                    self.outcome = "converged"
                    return
                self.matrices, self.value, slope = there, value, new_slope
                seconds = time.perf_counter() - self.started
                sweep = Sweep(len(self.history) + 1, self.compared.reported(value), {}, {}, seconds)
                self.history.append(sweep)
                log.debug("%s", sweep)
                look_again()
                if progress is not None:
                    progress(sweep)
        except KeyboardInterrupt:
            self.outcome = "interrupted"
