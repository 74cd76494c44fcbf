"""Matching of networks whose groups differ in size: every group is filled up with zeros to the greater of the two.

A group of matrices, such as a stream between norms, is embedded in the wider one by an isometry instead, and the polar
factor of the Gram matrix turns it from there: together a rectangular one.

An index of A that falls to one of the added zeros of B has no partner, and so has an index of B beyond A's. Between one
and the other the assignment is the rectangular one: which of the wider network's indices stay alone is part of what is
chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from permgraph.conventions.choices import require_choice
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.waiting import waits
from permgraph.errors import MismatchError
from permgraph.matching.general.widening import Norms, embedded, factor_of
from permgraph.matching.matcher import MatchResult, Progress, SupportsMatch
from permgraph.matching.weight_matching import WeightMatching
from permgraph.spec.binding import IntArray
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Product, Ref, Sum, size_of
from permgraph.spec.general import General
from permgraph.spec.permutation import Permutation, old_parents
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import Network, as_state_dict


@dataclass(frozen=True, repr=False)
class PartialMatch(Displayed):
    """B brought to A, where groups may differ in size.

    Attributes:
        spec: the common specification, in which each group has the greater of the two sizes.
        permutation: of B as filled up, an element of the common spec's group.
        state_dict: B filled up with zeros and renumbered. Where no group of B is wider than A's it has A's shapes.
        partners: for each moving group, integers (*sizes of A's parents, size in A): B's index that was matched to A's,
            or -1 where there is none. Groups of matrices have none.
        result: what the matcher reported of the common problem.
        transformation: over general symmetries the element of which the permutation is a part.
        factors: for each group of matrices that is narrower in B, what its stream was multiplied with.
    """

    spec: PermutationSpec
    permutation: Permutation
    state_dict: dict[str, torch.Tensor]
    partners: Mapping[str, IntArray]
    result: MatchResult
    transformation: Transformation | None = None
    factors: Mapping[str, float] = field(default_factory=dict)


@waits("matching")
def match_widths(
    a: Network,
    b: Network,
    spec_a: PermutationSpec,
    spec_b: PermutationSpec,
    matcher: SupportsMatch | None = None,
    *,
    norms: Norms | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PartialMatch:
    """Match two networks of one architecture and different widths, channel by channel as far as there are partners.

    The added indices read and write zeros, so that B as filled up computes what it did wherever a unit without inputs
    or outputs is without effect. That is so between linear layers and convolutions, and for BatchNorm; it is not where
    a norm or a mean runs over the group itself, as LayerNorm's over a residual stream does, nor where the code takes a
    factor from a size, as attention does from that of a head.

    Over general symmetries, groups on which orthogonal matrices act are embedded isometrically instead, and B as
    embedded computes what it did with norms over them too; the result has A's gains.

    Args:
        a, b: the two state dicts, or modules.
        spec_a, spec_b: what `auto_spec` finds for each; they must have the same groups and axes but for sizes.
        matcher: `WeightMatching()` by default, or any that needs nothing but weights. One that knows permutations alone
            is given these of general specs.
        norms: how the norms over a group of orthogonal matrices add squares up: by their "mean", as LayerNorm and
            RMSNorm do, so that a stream grows with the root of its width; or by their "sum", as cosine similarity and
            inner products of a stream do, so that it stays. Not in a spec; by default "mean" where the norms have gains
            or take the mean off.
        seed, progress: as in `align`.

    Raises:
        MismatchError: the two differ in more than the sizes of groups; the message names the first difference. Or
            groups of rotary pairs differ in size, or a gain is zero between which matrices act.

    Example:
        >>> text = "w 3x2 h . | v 1x3 . h | groups: h 3".replace(" | ", chr(10))
        >>> wide = PermutationSpec.parse(text)
        >>> narrow = PermutationSpec.parse(text.replace("3", "2"))
        >>> a = {"w": torch.tensor([[1.0, 0], [0, 1], [5, 5]]), "v": torch.tensor([[1.0, 2, 3]])}
        >>> b = {"w": torch.tensor([[5.0, 5], [1, 0]]), "v": torch.tensor([[3.0, 1]])}
        >>> match_widths(a, b, wide, narrow).partners["h"].tolist()
        [1, -1, 0]
    """
    matcher = WeightMatching() if matcher is None else matcher
    a, b = as_state_dict(a), as_state_dict(b)
    spec_a, spec_b = spec_a.modules_in_place(), spec_b.modules_in_place()
    if not getattr(matcher, "general", False):
        spec_a, spec_b = spec_a.permutations(), spec_b.permutations()
    spec = common_spec(spec_a, spec_b)
    wide_a, wide_b = fill_up(a, spec_a, spec), fill_up(b, spec_b, spec)
    factors: dict[str, float] = {}
    if spec.general is not None:
        if norms is not None:
            require_choice("norms", norms, "mean", "sum")
        of_a, factors = (
            {n: factor_of(own, spec, n, norms) for n, g in own.groups.items() if g.size != spec.groups[n].size}
            for own in (spec_a, spec_b)
        )
        wide_a, wide_b = embedded(wide_a, spec_a, spec, of_a), embedded(wide_b, spec_b, spec, factors)
    result = matcher.match(wide_a, wide_b, spec, seed, progress)
    partners = {
        name: _partners(result.permutation, name, spec_a, spec_b)
        for name, group in spec.moving.items()
        if not group.structure.linear
    }
    factors = {name: factor for name, factor in factors.items() if spec.groups[name].structure.linear}
    return PartialMatch(
        spec, result.permutation, result.element.apply(wide_b), partners, result, result.transformation, factors
    )


def common_spec(spec_a: PermutationSpec, spec_b: PermutationSpec) -> PermutationSpec:
    """The specification of which both are parts: the same groups and axes, each group with the greater size.

    Raises:
        MismatchError: the two differ in more than the sizes of groups.
    """
    if spec_a.symmetry != spec_b.symmetry:
        raise MismatchError("one of the specs is of general symmetries and the other of permutations alone")
    if list(spec_a.groups) != list(spec_b.groups):
        different = sorted(set(spec_a.groups) ^ set(spec_b.groups)) or "the order of their names"
        raise MismatchError(f"A and B have different groups, so that there is nothing to match by size: {different}")
    groups = {}
    for name, ours in spec_a.groups.items():
        theirs = spec_b.groups[name]
        if replace(ours, size=theirs.size) != theirs or (ours.fixed and ours.size != theirs.size):
            raise MismatchError(
                f"group {name!r} is {ours} in A but {theirs} in B: only the size of a moving one may differ"
            )
        groups[name] = replace(ours, size=max(ours.size, theirs.size))
    for name, axes in spec_a.axes.items():
        other = spec_b.axes.get(name)
        if other != axes:
            in_b = "is not there" if other is None else f"has axes {' '.join(map(str, other))}"
            raise MismatchError(f"{name!r} has axes {' '.join(map(str, axes))} in A, but {in_b} in B")
    for name in spec_b.axes:
        if name not in spec_a.axes:
            raise MismatchError(f"A has no {name!r}, which B has with shape {spec_b.shapes[name]}")
    if spec_a.general is None or spec_b.general is None:
        return PermutationSpec(groups, spec_a.axes, aliases=spec_a.aliases, model_class=spec_a.model_class)
    for name in (*spec_a.general.actions, *spec_b.general.actions):
        if spec_a.general.actions.get(name) != spec_b.general.actions.get(name):
            raise MismatchError(f"the symmetries of A act on {name!r} otherwise than those of B")
    return PermutationSpec(
        groups, spec_a.axes, aliases=spec_a.aliases, model_class=spec_a.model_class,
        general=General(spec_a.general.actions, spec_a.general.reasons, gains_that_stay=spec_a.general.gains_that_stay),
    )  # fmt: skip


def fill_up(
    state: Mapping[str, torch.Tensor], spec: PermutationSpec, wider: PermutationSpec
) -> dict[str, torch.Tensor]:
    """A state dict of `spec` with zeros at the indices that only `wider` has; entries that stay as they are, shared.

    Raises:
        MismatchError: the state dict does not fit its spec.
    """
    spec.check(state)
    out: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = spec.aliases.get(key, key)
        if key != name and name in state and name in out:
            out[key] = out[name]
        elif name not in spec.axes or spec.shapes[name] == wider.shapes[name]:
            out[key] = tensor
        else:
            filled = tensor.new_zeros(wider.shapes[name])
            places = [_places(axis, spec, wider) for axis in spec.axes[name]]
            index = np.ix_(*places)
            filled[tuple(torch.from_numpy(at).to(tensor.device) for at in index)] = tensor.detach()
            out[key] = filled
    return out


def _places(axis: Axis, spec: PermutationSpec, wider: PermutationSpec) -> IntArray:
    """Where each index of an axis of `spec` lies in that of `wider`."""
    match axis:
        case Fixed(size):
            return np.arange(size)
        case Ref(group):
            return np.arange(spec.groups[group].size)
        case Label(_, expr):
            return _places(expr, spec, wider)
        case Product(factors):
            at = np.zeros(1, dtype=np.int64)
            for factor in factors:
                inside = _places(factor, spec, wider)
                at = (at[:, None] * size_of(factor, wider.groups) + inside).reshape(-1)
            return at
        case Sum(parts):
            found, start = [], 0
            for part in parts:
                found.append(_places(part, spec, wider) + start)
                start += size_of(part, wider.groups)
            return np.concatenate(found)
        case Family(_, members):
            first, *others = (_places(member, spec, wider) for member in members)
            if not all(np.array_equal(first, other) for other in others):
                raise MismatchError(f"the members of {axis} would be filled up at different places")
            return first


def _partners(permutation: Permutation, name: str, spec_a: PermutationSpec, spec_b: PermutationSpec) -> IntArray:
    """For each of A's indices the one of B's in its place, -1 where that is an added one, or inside one."""
    arrays, groups = permutation.arrays, permutation.spec.groups
    sizes = tuple(spec_a.groups[g].size for g in (*groups[name].parents, name))
    partners = arrays[name][tuple(map(slice, sizes))].copy()
    alone = partners >= spec_b.groups[name].size
    for parent, old in zip(groups[name].parents, old_parents(groups, arrays, name, sizes[:-1]), strict=True):
        if parent in arrays:
            alone |= (old >= spec_b.groups[parent].size)[..., None]
    partners[alone] = -1
    return partners
