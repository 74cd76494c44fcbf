"""Permutations chosen on top of a continuous part that is kept.

Matchers that relax or train permutations alone take general symmetries so: B is first brought to A by weight matching
over the whole group; then both stand in A's gauge, balanced, and what is left to choose are permutations of the groups
that no matrices act on. What comes out is the one after the other, an element of the whole group.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from permgraph.errors import MismatchError
from permgraph.matching.general.gauge import Written
from permgraph.matching.general.weights import as_transformation, frozen_groups
from permgraph.matching.matcher import MatchResult, runs_networks
from permgraph.matching.weight_matching import WeightMatching
from permgraph.spec.expressions import Axis, Fixed, Ref, substitute
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict

NOTE = "the matrices, scales and signs are those with which it began: what was searched for are permutations"


@dataclass(frozen=True)
class Kept:
    """A and B in one gauge after the part that is kept, and what is left to choose.

    Attributes:
        a: A, balanced, which computes what A does.
        b: B after the kept part, in the same gauge.
        spec: the permutations of the groups on which no matrices act.
        start: the kept part, from B's state dict to A's.
        into: from A's state dict to `a`.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    spec: PermutationSpec
    start: Transformation
    into: Transformation

    def result(self, found: MatchResult, started: float) -> MatchResult:
        """What was found on top, with the kept part: an element that brings B to A, in A's own gauge."""
        general = self.start.spec
        arrays = dict(found.permutation.arrays)
        on_top = Transformation(general, Permutation(general.permutations(), arrays), {}, {}, {})
        whole = self.into.inverse() @ on_top @ self.into @ self.start
        return replace(
            found,
            permutation=whole.permutation,
            transformation=whole,
            notes=(*found.notes, NOTE),
            seconds=time.perf_counter() - started,
        )


def kept_part(
    matcher: WeightMatching,
    init: Permutation | Transformation | None,
    a: StateDict,
    b: StateDict,
    spec: PermutationSpec,
    seed: int,
    models: tuple[nn.Module, nn.Module] | None = None,
) -> Kept | MatchResult:
    """Bring B to A by `init`, or else by weight matching over the whole group, and both into A's gauge, balanced.

    Where Ctrl-C ends the weight matching, its result is returned: that is then the best so far.
    """
    if init is None:
        if models is not None and runs_networks(matcher):
            matcher = matcher.with_models(*models)
        plain = matcher.match(a, b, spec, seed)
        if plain.outcome == "interrupted":
            return replace(plain, notes=(*plain.notes, "interrupted in weight matching, whose objective this is"))
        assert plain.transformation is not None
        start = plain.transformation
    else:
        start = as_transformation(init, spec) if isinstance(init, Permutation) else init
    into = Written(spec, a, "A", ignore=matcher.ignore, dtype=matcher.dtype).into.transformation(spec)
    return Kept(into.apply(a), (into @ start).apply(b), without_matrices(spec), start, into)


def without_matrices(spec: PermutationSpec) -> PermutationSpec:
    """The permutations of a general spec, in which groups on which matrices act stay put."""
    still = {name for name, group in spec.groups.items() if group.structure.linear}
    permutations = spec.permutations()
    over = {parent for group in permutations.groups.values() for parent in group.parents}
    groups = {
        name: replace(group, fixed=True) if name in still else group
        for name, group in permutations.groups.items()
        if name not in still or name in over
    }

    def stay(name: str) -> Axis:
        return Ref(name) if name in groups else Fixed(permutations.groups[name].size)

    axes = {name: tuple(substitute(axis, stay) for axis in own) for name, own in permutations.axes.items()}
    return PermutationSpec(groups, axes, permutations.shapes, permutations.aliases)


def on_top(matcher: WeightMatching, spec: PermutationSpec, kept: Kept) -> WeightMatching:
    """The same weight matching for what is left to choose."""
    frozen = frozen_groups(spec, matcher)
    init = matcher.init if isinstance(matcher.init, str) else "identity"
    return replace(
        matcher, init=init, loader=None, models=None, frozen=[name for name in frozen if name in kept.spec.moving]
    )


def permutation_of(init: Permutation | Transformation) -> Permutation:
    """A starting point over permutations alone.

    Raises:
        MismatchError: it is one of a general spec.
    """
    if isinstance(init, Transformation):
        raise MismatchError("init is a transformation, of another spec than the permutations to match over")
    return init
