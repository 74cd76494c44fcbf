"""Blocks: a parameter seen as pieces in which every axis is one group, or fixed.

A concatenation is one block for each part, a flattened product is one axis for each factor, and a family is the member
for the part that its label stands at. So every parameter, whatever its axis expressions, becomes a few strided views
with one axis for each leaf, and all that matching needs to know is which group acts on each axis. No view copies.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from permgraph.spec.binding import Layout
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Path, Product, Ref, Sum, size_of


@dataclass(frozen=True)
class Leaf:
    """One axis of a block.

    Attributes:
        size: its length.
        group: the group that acts on it; None where the axis stays put.
        parents: for each parent of the group, the axis of the block whose index chooses the permutation.
        occurrence: which of the parameter's occurrences of groups this is, in the order of its text; -1 where none is.
    """

    size: int
    group: str | None = None
    parents: tuple[int, ...] = ()
    occurrence: int = -1


@dataclass(frozen=True, eq=False)
class Block:
    """A piece of one parameter with one axis for each leaf of its axis expressions; a block is equal to itself only."""

    parameter: str
    leaves: tuple[Leaf, ...]
    cuts: tuple[Cut, ...]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece of `tensor`, which has the parameter's shape, as a view with one axis for each leaf."""
        for dim in reversed(range(len(self.cuts))):
            tensor = self.cuts[dim].view(tensor, dim)
        return tensor

    @functools.cached_property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(leaf.size for leaf in self.leaves)

    def axes_of(self, group: str) -> tuple[int, ...]:
        """The axes on which `group` acts."""
        return tuple(axis for axis, leaf in enumerate(self.leaves) if leaf.group == group)


def blocks_of(spec: SpecData, parameter: str) -> tuple[Block, ...]:
    """The blocks of one parameter: together they hold each of its elements once."""
    layout = spec.layout(spec.axes[parameter], parameter)
    found: list[tuple[tuple[Cut, ...], _Choices]] = [((), {})]
    for dim, axis in enumerate(layout.axes):
        found = [
            ((*cuts, cut), chosen)
            for cuts, choices in found
            for cut, chosen in _cuts(axis, (dim, ()), choices, spec, layout)
        ]
    parents = {(o.dim, o.path): o.parents for o in layout.occurrences}
    number = {(o.dim, o.path): at for at, o in enumerate(layout.occurrences)}
    blocks = []
    for cuts, _ in found:
        places = [(dim, leaf) for dim, cut in enumerate(cuts) for leaf in cut.leaves()]
        position = {(dim, leaf.path): axis for axis, (dim, leaf) in enumerate(places)}
        leaves = tuple(
            Leaf(
                leaf.length,
                leaf.group,
                tuple(position[o.dim, o.path] for o in parents.get((dim, leaf.path), ())),
                number.get((dim, leaf.path), -1),
            )
            for dim, leaf in places
        )
        if all(leaf.size for leaf in leaves):
            blocks.append(Block(parameter, leaves, cuts))
    return tuple(blocks)


_Choices = dict[tuple[int, Path], int]
"""Which part has been chosen of the sum at each place (dimension, path)."""


@dataclass(frozen=True)
class Cut:
    """How one dimension becomes axes: narrowed to a part of a concatenation, then split into factors.

    A leaf has no `inner` cuts; more than one are the factors of a product.
    """

    length: int
    path: Path
    group: str | None = None
    part: tuple[int, int] | None = None
    inner: tuple[Cut, ...] = ()

    def leaves(self) -> Iterator[Cut]:
        """The cuts that become axes, in order."""
        if not self.inner:
            yield self
        for cut in self.inner:
            yield from cut.leaves()

    def view(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """`tensor` with the axes of this cut in the place of its dimension `dim`."""
        if self.part is not None:
            start, end = self.part
            tensor = tensor.narrow(dim, start, end - start)
        if len(self.inner) > 1:
            sizes = [cut.length for cut in self.inner]
            tensor = tensor.view(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])
        for offset in reversed(range(len(self.inner))):
            tensor = self.inner[offset].view(tensor, dim + offset)
        return tensor


def _cuts(
    axis: Axis, place: tuple[int, Path], choices: _Choices, spec: SpecData, layout: Layout
) -> Iterator[tuple[Cut, _Choices]]:
    """Every way through the concatenations in one expression, and the choices made on the way."""
    dim, path = place

    def below(child: Axis, step: int, chosen: _Choices) -> Iterator[tuple[Cut, _Choices]]:
        return _cuts(child, (dim, (*path, step)), chosen, spec, layout)

    match axis:
        case Fixed(size):
            yield Cut(size, path), choices
        case Ref(group):
            yield Cut(spec.groups[group].size, path, group), choices
        case Product(factors):
            ways: list[tuple[tuple[Cut, ...], _Choices]] = [((), choices)]
            for step, factor in enumerate(factors):
                ways = [((*cuts, cut), new) for cuts, old in ways for cut, new in below(factor, step, old)]
            size = size_of(axis, spec.groups)
            for cuts, chosen in ways:
                yield Cut(size, path, inner=cuts), chosen
        case Sum(parts):
            ends = list(itertools.accumulate((size_of(part, spec.groups) for part in parts), initial=0))
            for part in _part(place, len(parts), choices):
                for cut, chosen in below(parts[part], part, {**choices, place: part}):
                    yield Cut(ends[-1], path, part=(ends[part], ends[part + 1]), inner=(cut,)), chosen
        case Label(_, expr):
            yield from below(expr, 0, choices)
        case Family(_, members):
            labelled = layout.families[place]
            for part in _part(labelled, len(members), choices):
                yield from below(members[part], part, {**choices, labelled: part})


def _part(place: tuple[int, Path], count: int, choices: _Choices) -> tuple[int, ...]:
    return (choices[place],) if place in choices else tuple(range(count))
