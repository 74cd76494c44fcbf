"""A tensor as the rules see it: an axis for each dimension, and one for its values where they index something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from permgraph.algebra import Axes, Axis, Index, Kind
from permgraph.errors import ConflictError

VALUE = -1  # the dimension number by which the axis of an integer tensor's values goes


class TypedTensor:
    """A tensor of the graph with an axis for each dimension, and one for its values where they index something."""

    __slots__ = (
        "_origin", "asked_for_repeats", "counts", "dims", "dtype", "known", "name", "permutes", "read", "shape",
        "uniform", "use_of", "value", "viewed", "written",
    )  # fmt: skip

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, axes: Axes) -> None:
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.dims = [axes.atom(size) for size in self.shape]
        self.value: Axis | None = None
        self._origin: TypedTensor | None = None  # no cycle: thousands of them go as soon as nobody holds them
        # Dimensions along which it does not vary: no link ties them, as if they were broadcast.
        self.uniform: frozenset[int] = frozenset()
        self.use_of: TypedTensor | None = None  # the tensor of which this is one use, where dimensions do not vary
        self.asked_for_repeats: tuple[Callable[[], frozenset[int]], ...] = ()  # see `may_repeat`
        self.read = True  # whether anything depends on it
        self.viewed = False  # whether its memory is seen through other tensors as well
        self.written = False  # whether an operator writes into its memory
        self.counts = False  # whether the value at each index of its one dimension is that index, and stays so
        # The values of a short vector of integers that the model's code has.
        self.known: tuple[int, ...] | None = None
        # The dimension along which its values are a permutation, as sorting gives it.
        self.permutes: int | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def origin(self) -> TypedTensor:
        """The tensor of which this one is a view of all elements: an index and its views are the same function."""
        return self._origin or self

    @property
    def may_repeat(self) -> frozenset[int]:
        """The dimensions along which elements may be equal by more than chance; found when a rule first asks."""
        return frozenset[int]().union(*(ask() for ask in self.asked_for_repeats))

    def follow(self, source: TypedTensor) -> None:
        """Say that this tensor holds the elements of `source`, all of them in the same order."""
        self._origin = None if source.origin is self else source.origin

    @property
    def is_integral(self) -> bool:
        return not (self.dtype.is_floating_point or self.dtype.is_complex) and self.dtype is not torch.bool

    def axis(self, dim: int) -> Axis:
        if dim == VALUE:
            if self.value is None:
                raise ConflictError(f"the values of {self.name}, of shape {self.shape}, number no axis")
            return self.value
        return self.dims[dim]


@lru_cache(maxsize=4096)
def matching_dims(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The shortest runs of dimensions of two shapes that hold equally many indices, in order."""
    runs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(left) or j < len(right):
        a: list[int] = []
        b: list[int] = []
        product_a = product_b = 1
        while (not a and not b) or product_a != product_b:
            if i < len(left) and (product_a <= product_b or j == len(right)):
                a.append(i)
                product_a *= left[i]
                i += 1
            elif j < len(right):
                b.append(j)
                product_b *= right[j]
                j += 1
            else:
                raise ConflictError(f"cannot view {left} as {right}")
        runs.append((tuple(a), tuple(b)))
    return tuple(runs)


class Loose(NamedTuple):
    """A family whose sum must be told by another dimension.

    Attributes:
        family: the axis.
        within: the families of which it is a member, by their indices, and the part at which it is one.
    """

    family: Axis
    within: tuple[tuple[Index, int], ...]


def loose_families(
    axes: Axes,
    axis: Axis,
    provided: frozenset[Index] = frozenset(),
    within: tuple[tuple[Index, int], ...] = (),
) -> Iterator[Loose]:
    """The families in an axis whose sum is not in the same product: they need it in another dimension."""
    if not axes.contains_family(axis):
        return
    axis = axes.resolve(axis)
    if axis.kind is Kind.PRODUCT:
        factors = axes.factors(axis)
        provided |= {f.index.find() for f in factors if f.kind is Kind.SUM and f.index is not None}
        for factor in factors:
            yield from loose_families(axes, factor, provided, within)
        return
    family = axis.index.find() if axis.kind is Kind.FAMILY and axis.index is not None else None
    if family is not None and family not in provided:
        yield Loose(axis, within)
    for part, child in enumerate(axis.children):
        yield from loose_families(axes, child, provided, within if family is None else (*within, (family, part)))


def provides(axes: Axes, axis: Axis, loose: Loose) -> bool:
    """Whether a family in another dimension can tell its member by this axis.

    A sum that lies within one part of another tells the members of a family that is a member at that very part.
    """
    assert loose.family.index is not None
    index = loose.family.index.find()
    parts = {outer.find(): part for outer, part in loose.within}
    stack = axes.factors(axis)
    while stack:
        factor = stack.pop()
        if factor.kind is not Kind.SUM or factor.index is None:
            continue
        if factor.index.find() is index:
            return True
        if factor.index.find() in parts:
            stack.extend(axes.factors(factor.children[parts[factor.index.find()]]))
    return False
