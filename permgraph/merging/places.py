"""Where the indices of two networks lie in one that has more of them, and what each of its weights is made of.

Of a group of n units in which k pairs are merged, the wider network has 2n - k: the first n stand in A's order, merged
or of A alone, and those of B alone follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permgraph.errors import MismatchError, SpecError
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Product, Ref, Sum, size_of
from permgraph.spec.spec import PermutationSpec


@dataclass(frozen=True)
class Places:
    """For each index of a dimension of the wider network that of A and that of B, -1 where it has none of them.

    Attributes:
        a, b: integers, (size in the wider network,).
    """

    a: Tensor
    b: Tensor

    @classmethod
    def same(cls, size: int) -> Places:
        """Those of a dimension that both networks share."""
        return cls(torch.arange(size), torch.arange(size))

    @classmethod
    def of_group(cls, merged: Tensor) -> Places:
        """Those of a group, of which a mask (size,) says which pairs are merged."""
        both, alone = torch.arange(len(merged)), torch.nonzero(~merged).flatten()
        none = torch.full_like(alone, -1)
        return cls(torch.cat([both, none]), torch.cat([torch.where(merged, both, -1), alone]))

    @property
    def only_a(self) -> Tensor:
        """Which indices are A's alone."""
        return (self.a >= 0) & (self.b < 0)

    @property
    def only_b(self) -> Tensor:
        """Which indices are B's alone."""
        return (self.b >= 0) & (self.a < 0)

    def mix(self, a: Tensor, b: Tensor, dim: int, shares: tuple[float, float]) -> Tensor:
        """What A and B hold along a dimension, in the wider network's order: of merged indices the weighted mean."""
        shape = [1] * a.ndim
        shape[dim] = -1
        total = torch.zeros((), dtype=a.dtype, device=a.device)
        for x, at, alone, share in ((a, self.a, self.only_a, shares[0]), (b, self.b, self.only_b, shares[1])):
            factor = torch.where(alone, 1.0, share) * (at >= 0)
            total = total + x.index_select(dim, at.clamp(min=0).to(a.device)) * factor.to(a).view(shape)
        return total


def places_of(axis: Axis, spec: PermutationSpec, groups: Mapping[str, Places]) -> Places:
    """The places of an axis where some groups have those given, and all others stay as they are."""
    match axis:
        case Fixed() | Ref():
            known = groups.get(axis.group) if isinstance(axis, Ref) else None
            return known or Places.same(size_of(axis, spec.groups))
        case Label(expr=expr):
            return places_of(expr, spec, groups)
        case Product(factors):
            at = [torch.zeros(1, dtype=torch.long)] * 2
            for factor in factors:
                inside, size = places_of(factor, spec, groups), size_of(factor, spec.groups)
                at = [_inside(outer, inner, size) for outer, inner in zip(at, (inside.a, inside.b), strict=True)]
            return Places(*at)
        case Sum(parts):
            start, found = 0, []
            for part in parts:
                one = places_of(part, spec, groups)
                found.append(Places(*(torch.where(at < 0, at, at + start) for at in (one.a, one.b))))
                start += size_of(part, spec.groups)
            return Places(torch.cat([one.a for one in found]), torch.cat([one.b for one in found]))
        case Family(members=members):
            return Places.same(size_of(members[0], spec.groups))


def _inside(outer: Tensor, inner: Tensor, size: int) -> Tensor:
    """Places in a product: an index that either factor lacks is lacking."""
    pairs = outer[:, None] * size + inner
    return torch.where((outer[:, None] < 0) | (inner < 0), -1, pairs).reshape(-1)


def combined(a: Tensor, b: Tensor, places: Sequence[Places], read: Set[int], shares: tuple[float, float]) -> Tensor:
    """A tensor of the wider network, from those of A and B.

    What is written to a merged unit is the mean of both, to which each network contributes what it reads; what is
    written to a unit of one network alone is that network's, and reads merged units as its own.

    Args:
        a, b: of one shape.
        places: those of each dimension.
        read: the dimensions that index what is read, see `dimensions_read`.
        shares: how much A and B count in a mean.
    """
    total = torch.zeros((), dtype=a.dtype)
    for tensor, share, own in zip((a, b), shares, ("a", "b"), strict=True):
        part = tensor.detach()
        kept = torch.tensor(share, dtype=a.dtype)
        for dim, where in enumerate(places):
            shape = [1] * a.ndim
            shape[dim] = -1
            at = where.a if own == "a" else where.b
            part = part.index_select(dim, at.clamp(min=0).to(part.device)) * (at >= 0).to(part).view(shape)
            if dim not in read:
                alone = where.only_a if own == "a" else where.only_b
                kept = torch.where(alone.view(shape), torch.ones((), dtype=a.dtype), kept)
        total = total.to(part.device) + part * kept.to(part)
    return total


def indices_of(axis: Axis, spec: PermutationSpec, group: str) -> Tensor:
    """For each index of an axis the index of the group that it stands for, -1 for none."""
    none = torch.full((size_of(axis, spec.groups),), -1)
    match axis:
        case Ref(name):
            return torch.arange(len(none)) if name == group else none
        case Label(expr=expr):
            return indices_of(expr, spec, group)
        case Product(factors):
            at = torch.full((1,), -1)
            for factor in factors:
                inside = indices_of(factor, spec, group)
                at = torch.where(inside >= 0, inside, at[:, None]).reshape(-1)
            return at
        case Sum(parts):
            return torch.cat([indices_of(part, spec, group) for part in parts])
        case _:
            return none


def may_widen(spec: PermutationSpec) -> list[str]:
    """The groups of which some indices can be kept apart: of permutations, not per another one, in no family."""
    in_families = {node.group for axes in spec.axes.values() for axis in axes for node in _inside_families(axis)}
    return [
        name for name, group in spec.moving.items()
        if not group.parents and name not in in_families and group.structure.is_plain
    ]  # fmt: skip


def _inside_families(axis: Axis, inside: bool = False) -> list[Ref]:
    match axis:
        case Ref():
            return [axis] if inside else []
        case Label(expr=expr):
            return _inside_families(expr, inside)
        case Product(inner) | Sum(inner):
            return [ref for each in inner for ref in _inside_families(each, inside)]
        case Family(members=members):
            return [ref for each in members for ref in _inside_families(each, True)]
        case _:
            return []


def widened(spec: PermutationSpec, groups: Mapping[str, Places]) -> PermutationSpec:
    """The spec of the wider network."""
    sizes = {n: replace(g, size=len(groups[n].a)) if n in groups else g for n, g in spec.groups.items()}
    try:
        return PermutationSpec(sizes, spec.axes, aliases=spec.aliases, model_class=spec.model_class)
    except SpecError as error:
        raise MismatchError(f"the groups {', '.join(groups)} cannot become wider: {error}") from error
