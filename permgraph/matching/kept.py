"""Gram matrices kept between steps, and amended only by what has moved.

When a group k moves on m of its n indices, the Gram matrix of a group that shares a parameter with it changes by one
product of A's slices there with the difference of B's: m/n of the work of computing that parameter's share anew, and
late in a run m is small. Without this every step recomputes all that its neighbours touched, which is most of the time
of a run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from permgraph.matching.moves import Move, Place
from permgraph.matching.renumber import Arrays
from permgraph.spec import PermutationSpec


class Kept:
    """The Gram matrices (*batch, n, n) of moves that hold one group each, within a number of bytes."""

    def __init__(self, spec: PermutationSpec, a: Mapping[str, torch.Tensor], room: int) -> None:
        self.spec, self.a, self.room = spec, a, room
        self.grams: dict[str, torch.Tensor] = {}
        self.debt: dict[str, float] = {}

    def get(self, move: Move) -> torch.Tensor | None:
        """The Gram matrix at the present permutation, if it is kept."""
        return self.grams.get(move.name)

    def keep(self, move: Move, gram: torch.Tensor, columns: np.ndarray) -> None:
        """Keep a move's Gram matrix, as it becomes once the move's group has been renumbered by `columns`."""
        if move.name not in self.grams:
            if gram.nbytes > self.room:
                return
            self.room -= gram.nbytes
        if (columns != np.arange(columns.shape[-1])).any():
            index = torch.from_numpy(columns).to(gram.device)
            gram = gram.gather(-1, index.unsqueeze(-2).expand_as(gram)) if index.ndim > 1 else gram[:, index]
        self.grams[move.name] = gram
        self.debt[move.name] = 0.0

    def drop(self, move: Move) -> None:
        """Forget a move's Gram matrix."""
        gram = self.grams.pop(move.name, None)
        self.room += 0 if gram is None else gram.nbytes

    def amend(self, move: Move, step: Arrays, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
        """Bring a move's kept Gram matrix up to date after another move has taken `step`, from `old` to `new` B."""
        gram = self.grams.get(move.name)
        if gram is None:
            return
        changed = changed_indices(self.spec, step)
        touched = [place for place in move.root.places if place.block.parameter in new]
        portions = [_portion(place, changed) for place in touched]
        # Amending twice what could be computed once would be no saving.
        whole = sum(place.block.size for place in move.root.places)
        work = sum(
            place.block.size * (1.0 if part is None else len(part[1]) / place.block.leaves[part[0]].size)
            for place, part in zip(touched, portions, strict=True)
        )
        self.debt[move.name] += work / whole
        if move.name in step or self.debt[move.name] > 1.0:
            self.drop(move)
            return
        for place, part in zip(touched, portions, strict=True):
            name = place.block.parameter
            a, before, after = (place.block.view(tensor[name]) for tensor in (self.a, old, new))
            if part is not None:
                axis, indices = part
                where = torch.from_numpy(indices).to(a.device)
                a, before, after = (view.index_select(axis, where) for view in (a, before, after))
            gram += place.gram(a, after - before)


def changed_indices(spec: PermutationSpec, step: Arrays) -> dict[str, np.ndarray]:
    """For each outermost group of a step, the indices at which it, or a group of the step inside it, moves."""
    found: dict[str, np.ndarray] = {}
    for name, array in step.items():
        if any(parent in step for parent in spec.groups[name].parents):
            continue
        moves = np.zeros(array.shape[-1], dtype=bool)
        for inner, rows in step.items():
            over = (*spec.groups[inner].parents, inner)
            if name in over:
                differs = rows != np.arange(rows.shape[-1])
                moves |= differs.any(axis=tuple(axis for axis in range(rows.ndim) if over[axis] != name))
        found[name] = np.flatnonzero(moves)
    return found


def _portion(place: Place, changed: Mapping[str, np.ndarray]) -> tuple[int, np.ndarray] | None:
    """The axis and indices outside of which a block has not changed; None if no single axis says it."""
    moved = [axis for axis, leaf in enumerate(place.block.leaves) if leaf.group in changed]
    if len(moved) != 1 or moved[0] in place.own or moved[0] in place.batch:
        return None
    group = place.block.leaves[moved[0]].group
    assert group is not None
    return moved[0], changed[group]
