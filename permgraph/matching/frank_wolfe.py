"""Frank-Wolfe matching: all groups at once, over doubly stochastic matrices in the place of permutations.

Crisostomi, Fumero, Baieri, Bernard & Rodolà, "C²M³: Cycle-Consistent Multi-Model Merging", 2024, section 3; the method
is Frank & Wolfe's of 1956. Here over any spec, dependent groups included.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching.ascent.step import choose, choose_each
from permgraph.matching.matcher import MatchResult, Progress, Sweep
from permgraph.matching.problem.blocks import Block
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import Pair, pair
from permgraph.matching.problem.renumber import Arrays
from permgraph.matching.weight_matching import WeightMatching
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import StateDict

log = logging.getLogger(__name__)

Matrices = dict[str, torch.Tensor]
"""For each group its doubly stochastic matrices, as `Relaxation` lays them out."""


@dataclass(frozen=True)
class FrankWolfe:
    """Maximise the sum over parameters of <A_p, pi(B_p)> over all groups jointly, relaxed, then rounded.

    Each group's permutation becomes a doubly stochastic matrix. A step finds the permutations that the slope at the
    present matrices favours, one assignment for each group, and goes towards all of them together, as far as is best:
    the objective is a polynomial along the way, which is maximised exactly. So the relaxed objective never falls. No
    group is ahead of the others, so the result does not hang on an order of the groups, as coordinate ascent's does.

    A group with others fibred over it has one matrix, and each of those a matrix for every pair of its new and old
    index: channels of head i are matched to channels of head j in a matrix of their own. At the corners of this space
    the objective is the true one, and no corner is better than the best permutation, so nothing is lost by
    relaxing. It costs memory: H^2 D^2 numbers for H heads of D channels.

    At the end each group is rounded by an assignment. If `polish`, an ascent of weight matching goes on from there, and
    the best of that and of the same ascent from its own start is kept. So the result is never worse than weight
    matching with the same seed, nor than the rounded permutation. Without, it is never worse than the identity.

    Args:
        max_steps: stop after so many steps.
        tolerance: stop when no direction promises more than this share of the objective's own size.
        init: where to begin: "barycentre", all entries equal; "identity"; or a `Permutation` of the spec.
        polish: whether to go on from the rounded permutation by `ascent`, and to compare with `ascent` itself.
        ascent: the weight matching; its objective, weights, patterns to ignore, solver and dtype are those of the
            relaxation as well.

    References:
        Crisostomi et al. 2024, section 3. A step costs, for each parameter, about twelve products with its groups'
        matrices, and one assignment for each group.

    Example:
        >>> spec = PermutationSpec.parse('''
        ... w  3x2  hidden .
        ... groups: hidden 3
        ... ''')
        >>> a = {"w": torch.tensor([[1.0, 0], [0, 1], [1, 1]])}
        >>> found = FrankWolfe().match(a, {"w": a["w"][[2, 0, 1]]}, spec)
        >>> found.permutation.arrays["hidden"].tolist()
        [1, 2, 0]
    """

    max_steps: int = 50
    tolerance: float = 1e-4
    init: Permutation | Literal["identity", "barycentre"] = "barycentre"
    polish: bool = True
    ascent: WeightMatching = field(default_factory=WeightMatching)

    def __post_init__(self) -> None:
        if self.max_steps < 0 or not self.tolerance >= 0:
            raise PermgraphError(f"max_steps={self.max_steps} and tolerance={self.tolerance}: neither can be negative")
        if isinstance(self.init, str) and self.init not in ("identity", "barycentre"):
            raise PermgraphError(f"unknown init {self.init!r}; choose 'identity', 'barycentre' or a Permutation")

    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        The history holds one `Sweep` for each step, with the relaxed objective and nothing in `moved`, then those of
        the ascent that is kept: between the two it may fall, by what rounding costs. `runs` has what each ascent
        reached, those from the rounded permutation first. `details` has the relaxed objective at the end
        ("relaxed"), that of the rounded permutation ("rounded"), the number of steps, and the last gap: how much the
        slope still promised.

        Args:
            a, b: state dicts that fit the spec; on any devices, in any floating dtype.
            spec: the group, and where it acts.
            seed: for the ascent; the relaxation draws nothing.
            progress: called after each step, and each sweep of the ascent from the rounded permutation.

        Raises:
            MismatchError: a state dict, or `init`, does not fit the spec.
            NonFiniteError: a weight is NaN or infinite.
        """
        started = time.perf_counter()
        if isinstance(self.init, Permutation) and self.init.spec != spec:
            raise MismatchError("init is a permutation of another spec than the one to match over")
        how = self.ascent
        compared = pair(a, b, spec, objective=how.objective, weights=how.weights, ignore=how.ignore, dtype=how.dtype)
        relaxation = Relaxation(compared, spec)
        run = _Run(self, compared, relaxation, started)
        run.climb(progress)
        try:
            rounded = Permutation(spec, relaxation.round(run.matrices, how))
        except KeyboardInterrupt:
            if run.outcome == "interrupted":  # for the second time
                raise
            run.outcome = "interrupted"
            rounded = Permutation(spec, relaxation.round(run.matrices, how))
        before = compared.objective(compared.b)
        reached = compared.objective({name: rounded.apply_to(name, tensor) for name, tensor in compared.b.items()})
        details = {
            "relaxed": compared.scale * run.value + compared.offset,
            "rounded": reached,
            "steps": float(len(run.history)),
            "gap": compared.scale * run.gap,
        }
        notes = (
            () if relaxation.groups else ("nothing to permute: no group of the spec stands in a compared parameter",)
        )
        if run.outcome == "sweep limit":
            notes = (*notes, f"Frank-Wolfe stopped at max_steps={self.max_steps}, before it converged")
        if self.polish and run.outcome != "interrupted":
            last = len(run.history)

            def later(sweep: Sweep) -> Sweep:
                return replace(sweep, number=last + sweep.number, seconds=sweep.seconds + before_ascent)

            before_ascent = time.perf_counter() - started
            found = replace(how, init=rounded).match(
                a, b, spec, seed, None if progress is None else lambda sweep: progress(later(sweep))
            )
            runs = found.runs
            if found.outcome != "interrupted":
                # Cheap next to the relaxation, and on some networks coordinate ascent does end higher.
                plain = how.match_again(a, b, spec, seed, None, None, relax=False)  # which this was
                runs = (*runs, *plain.runs)
                if plain.objective > found.objective or plain.outcome == "interrupted":
                    kept = max(found, plain, key=lambda result: result.objective)
                    if kept is plain:
                        notes = (*notes, "weight matching from its own start ended higher, and is kept")
                    found = replace(kept, outcome=plain.outcome)
            return replace(
                found,
                history=(*run.history, *map(later, found.history)),
                runs=runs,
                seconds=time.perf_counter() - started,
                notes=notes,
                details=details,
            )
        if reached < before:
            rounded, reached = spec.identity(), before
            notes = (*notes, "rounding ended below the identity, which is kept")
        return MatchResult(
            rounded,
            reached,
            before,
            run.outcome,
            tuple(run.history),
            (reached,),
            seed,
            time.perf_counter() - started,
            notes,
            details,
        )


class _Run:
    """The present matrices, and what has been reached."""

    def __init__(self, how: FrankWolfe, compared: Pair, relaxation: Relaxation, started: float) -> None:
        self.how, self.compared, self.relaxation, self.started = how, compared, relaxation, started
        if how.init == "barycentre":
            self.matrices = relaxation.barycentre()
        else:
            arrays = how.init.arrays if isinstance(how.init, Permutation) else {}
            self.matrices = relaxation.corner(arrays)
        self.value = self.gap = math.nan
        self.history: list[Sweep] = []
        self.outcome: Literal["converged", "sweep limit", "interrupted"] = "sweep limit"

    def climb(self, progress: Progress | None) -> None:
        """Step until the slope promises nothing, or the limit, or Ctrl-C."""
        relaxation = self.relaxation
        try:
            self.value, slope = relaxation.value_and_slope(self.matrices)
            while True:
                towards = relaxation.best_corner(slope, self.how.ascent)
                direction = {name: towards[name] - matrix for name, matrix in self.matrices.items()}
                self.gap = sum(float((slope[name] * step).sum(dtype=torch.float64)) for name, step in direction.items())
                if self.gap <= self.how.tolerance * relaxation.size:
                    self.outcome = "converged"
                    return
                if len(self.history) >= self.how.max_steps:
                    return
                length = relaxation.best_length(self.matrices, direction, self.value, self.gap)
                there = {name: matrix + length * direction[name] for name, matrix in self.matrices.items()}
                value, new_slope = relaxation.value_and_slope(there)
                if not value > self.value:
                    # What is left to gain is less than rounding.
                    self.outcome = "converged"
                    return
                self.matrices, self.value, slope = there, value, new_slope
                sweep = Sweep(
                    len(self.history) + 1,
                    self.compared.scale * value + self.compared.offset,
                    {},
                    {},
                    time.perf_counter() - self.started,
                )
                self.history.append(sweep)
                log.debug("%s", sweep)
                if progress is not None:
                    progress(sweep)
        except KeyboardInterrupt:
            self.outcome = "interrupted"


class Relaxation:
    """The objective as a polynomial in doubly stochastic matrices, one stack of them for each group.

    A group of size n has a tensor (..., n, n), new index before old, with for each parent that moves two axes more in
    front, its new index and its old, and for one that does not move a single one.
    """

    def __init__(self, compared: Pair, spec: PermutationSpec) -> None:
        self.compared, self.spec = compared, spec
        self.plan = Plan(spec, compared.a)
        self.groups = [name for name in spec.moving if self.plan.standing[name]]
        self.like = next(iter(compared.a.values()), torch.zeros(()))
        self.terms = [
            _Term(block, spec, frozenset(self.groups)) for blocks in self.plan.blocks.values() for block in blocks
        ]
        self.degree = max((len(term.factors) for term in self.terms), default=0)
        self.size = sum(
            float(torch.linalg.vector_norm(tensor)) * float(torch.linalg.vector_norm(compared.b[name]))
            for name, tensor in compared.a.items()
        )
        """No permutation's objective is further from 0 than this."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a group's matrices."""
        sizes: list[int] = []
        for parent in self.spec.groups[name].parents:
            sizes += [self.spec.groups[parent].size] * (2 if parent in self.groups else 1)
        return (*sizes, self.spec.groups[name].size, self.spec.groups[name].size)

    def barycentre(self) -> Matrices:
        """All entries equal."""
        return {name: self.like.new_full(self.shape(name), 1 / self.spec.groups[name].size) for name in self.groups}

    def corner(self, arrays: Mapping[str, np.ndarray]) -> Matrices:
        """The matrices of a permutation; for pairs that it does not match, what is inside is the same for all."""
        found = {}
        for name in self.groups:
            shape = self.shape(name)
            array = np.arange(shape[-1]) if name not in arrays else arrays[name]
            parents = self.spec.groups[name].parents if name in arrays else ()
            # The array is read at the parents' new indices; the old ones are axes along which nothing changes.
            keep = [slice(None) if k == 0 else None for p in parents for k in range(2 if p in self.groups else 1)]
            found[name] = self._one_hot(np.broadcast_to(array[(*keep, slice(None))], shape[:-1]))
        return found

    def best_corner(self, slope: Matrices, how: WeightMatching) -> Matrices:
        """The permutation matrices that the slope favours."""
        return {name: self._one_hot(columns) for name, (columns, _) in choose_each(slope, how.solver).items()}

    def _one_hot(self, columns: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(np.array(columns)).to(self.like.device)
        return torch.zeros(*index.shape, index.shape[-1], dtype=self.like.dtype, device=self.like.device).scatter_(
            -1, index[..., None], 1.0
        )

    def round(self, matrices: Matrices, how: WeightMatching) -> Arrays:
        """The permutations nearest to the matrices, parents first; inside, only for the pairs that they match."""
        arrays: Arrays = {}
        for name in sorted(self.groups, key=lambda name: len(self.spec.groups[name].parents)):
            matrix = matrices[name]
            parents = self.spec.groups[name].parents
            new = dict(zip(parents, np.indices([self.spec.groups[p].size for p in parents], sparse=True), strict=True))
            index: list[Any] = []
            for parent in parents:
                index.append(new[parent])
                if parent in self.groups:
                    above = (new[over] for over in self.spec.groups[parent].parents)
                    index.append(arrays[parent][(*above, new[parent])])
            if index:
                at = np.broadcast_arrays(*index)
                matrix = matrix[tuple(torch.from_numpy(np.ascontiguousarray(i)).to(matrix.device) for i in at)]
            arrays[name] = choose(matrix, how.solver, name)[0]
        return arrays

    def value(self, matrices: Matrices) -> float:
        """The relaxed objective, before scale and offset."""
        with torch.no_grad():
            return sum(float(term.value(self.compared, matrices)) for term in self.terms)

    def permuted(self, matrices: Matrices) -> dict[str, torch.Tensor]:
        """B's compared tensors under the matrices, as new tensors through which gradients flow.

        At the matrices of a permutation these are B's tensors permuted by it; in between, each element is a mean of
        elements of B.
        """
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self.compared.b.items():
            terms = [term for term in self.terms if term.block.parameter == name]
            if len(terms) == 1 and terms[0].block.size == tensor.numel():
                found[name] = terms[0].permuted(tensor, matrices).reshape(tensor.shape)
                continue
            whole = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for term in terms:
                term.block.view(whole).copy_(term.permuted(tensor, matrices))
            found[name] = whole
        return found

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
        polynomial = np.polynomial.Polynomial([value, rate, *rest])
        flat = [complex(root) for root in np.atleast_1d(polynomial.deriv().roots())]
        inside = [root.real for root in flat if abs(root.imag) < 1e-9 and 0 < root.real < 1]
        return max((*inside, 1.0), key=lambda point: float(polynomial(point)))


class _Term:
    """One block's part of the objective: A's block times B's, each moving axis through its group's matrix.

    Attributes:
        factors: (group, axes of its matrix, axes of the running product before, and after) for each moving axis, those
            inside others first. Axes are numbered: new indices from 0, old ones from the number of leaves.
    """

    def __init__(self, block: Block, spec: PermutationSpec, moving: frozenset[str]) -> None:
        self.block = block
        leaves = block.leaves
        count = len(leaves)

        def labels(axis: int) -> list[int]:
            return [axis, count + axis] if leaves[axis].group in moving else [axis]

        axes = [axis for axis in range(count) if leaves[axis].group in moving]
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
            group = leaves[axis].group
            assert group is not None
            self.factors.append((group, matrix, present, after))
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
        for group, matrix, before, after in self.factors:
            product = torch.einsum(product, before, matrices[group], matrix, after)
        return product


def _childless(block: Block, axis: int) -> bool:
    return not any(axis in leaf.parents for leaf in block.leaves)
