"""A network of a general spec embedded in wider groups: isometries into streams, zeros elsewhere.

A stream of width m between norms that take the mean of squares becomes one of width n by an isometry E and a factor
c = sqrt(n / m): the squares of c E x have the mean of those of x, so that a norm gives c E times what it gave, and what
reads it is divided by c. Where E takes the vector of ones to a multiple of that vector, LayerNorm's mean goes along
too. So the wider network computes the same, to the eps of its norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from permgraph.errors import MismatchError
from permgraph.matching.general.acting import Acting, Element
from permgraph.matching.general.compact import mirror_of_ones
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import as_real

Norms: TypeAlias = Literal["mean", "sum"]


def factor_of(spec: PermutationSpec, wider: PermutationSpec, group: str, norms: Norms | None) -> float:
    """What a group of matrices is multiplied with as it is widened: `norms` says how squares are added up over it.

    By default they are averaged where a norm has gains or takes the mean off, and summed elsewhere.
    """
    structure = spec.groups[group].structure
    sizes = wider.groups[group].size, spec.groups[group].size
    if structure.linear not in ("O", "O1") or sizes[0] == sizes[1]:
        return 1.0
    if norms is None:
        norms = "mean" if structure.linear == "O1" or gains_of(spec, group) else "sum"
    return math.sqrt(sizes[0] / sizes[1]) if norms == "mean" else 1.0


def gains_of(spec: PermutationSpec, group: str) -> dict[str, float]:
    """The gains between which the matrices of a group act, each with what is added to it."""
    assert spec.general is not None
    return {
        gain.name: gain.added
        for name, actions in spec.general.actions.items()
        for action, occurrence in zip(actions, spec.occurrences(name), strict=True)
        if occurrence.group == group
        for gain, _ in action.gains
    }


def embedded(
    filled: Mapping[str, Tensor],
    spec: PermutationSpec,
    wider: PermutationSpec,
    factors: Mapping[str, float],
) -> dict[str, Tensor]:
    """A state dict of `wider`, from one that was filled up with zeros: streams embedded isometrically, gains of one.

    Args:
        filled: the state dict with zeros at the indices that only `wider` has.
        spec, wider: the spec of the network, and the common one.
        factors: for each group of matrices what it is multiplied with; see `factor_of`.

    Raises:
        MismatchError: a gain of the network is zero or is read elsewhere, or groups of pairs differ in size.
    """
    groups = [n for n, g in spec.groups.items() if g.structure.linear and g.size != wider.groups[n].size]
    for name in groups:
        if spec.groups[name].structure.is_paired:
            raise MismatchError(
                f"the group {name!r} is of rotary pairs, {spec.groups[name].size} in one network and "
                f"{wider.groups[name].size} in the other: their frequencies differ, so that they have no partners"
            )
    if not groups:
        return dict(filled)
    state = {wider.aliases.get(key, key): tensor for key, tensor in filled.items()}
    old, new = dict(state), dict(state)
    gains: set[str] = set()
    for group in groups:
        for name, added in gains_of(spec, group).items():
            if spec.general is not None and name in spec.general.gains_that_stay:
                raise MismatchError(
                    f"{name!r} is a gain that more reads than what could take it up, so that it cannot be made longer; "
                    "take spec.permutations() for such networks"
                )
            # What is added to zeros has no gain: one, so that it can be undone. And what the old gains were is taken
            # up by what reads them, where nothing else does.
            old[name] = state[name].clone()
            old[name].view(-1)[spec.groups[group].size :] = 1 - added
            new[name] = torch.full_like(state[name], 1 - added) if name in wider.general_gains else old[name]
            gains.add(name)
    names = [n for n in wider.axes if n not in gains and any(o.group in groups for o in wider.occurrences(n))]
    acting = Acting(wider, {name: as_real(state[name]).double() for name in names})
    element, inverses = Element(), {}
    for group in groups:
        sizes, matrix = acting.parents(group), _isometry(spec.groups[group].structure.linear, spec, wider, group)
        element.matrices[group] = (factors[group] * matrix).expand(*sizes, *matrix.shape)
        inverses[group] = (matrix / factors[group]).expand(*sizes, *matrix.shape)
    for name in names:
        moved = acting.folded(name, as_real(state[name]).double(), old)
        moved = acting.act(name, moved, element, inverses)
        moved = acting.unfolded(name, moved, new).to(as_real(state[name]).dtype)
        new[name] = torch.view_as_complex(moved.contiguous()) if state[name].is_complex() else moved
    return {key: new[wider.aliases.get(key, key)] for key in filled}


def _isometry(structure: str, spec: PermutationSpec, wider: PermutationSpec, group: str) -> Tensor:
    """An orthogonal matrix that takes the first indices into the wider group as that group's structure asks for."""
    n = wider.groups[group].size
    if structure != "O1":
        return torch.eye(n, dtype=torch.float64)
    own = spec.groups[group].size
    narrow = torch.eye(n, dtype=torch.float64)
    narrow[:own, :own] = mirror_of_ones(torch.empty(own, dtype=torch.float64))
    return mirror_of_ones(torch.empty(n, dtype=torch.float64)) @ narrow
