"""Gram matrices kept between steps, and updated only by what has moved.

When a group k moves on m of its n indices, the Gram matrix of a group that shares a parameter with it changes by one
product of A's slices there with the difference of B's: m/n of the work of computing that parameter's share anew, and
late in a run m is small. Without this every step recomputes all that its neighbours touched, which is most of the time
of a run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch

from permgraph.matching import tuned
from permgraph.matching.problem.moves import Move, Place, Tensors
from permgraph.spec.blocks import Block


class GramCache:
    """The Gram matrices (*batch, n, n) of moves that hold one group each, within a number of bytes."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.grams: dict[str, torch.Tensor] = {}
        self.missing: dict[str, tuple[Place, ...]] = {}
        self.update_cost: dict[str, float] = {}

    def get(self, move: Move, a: Tensors, b: Tensors) -> torch.Tensor | None:
        """The Gram matrix at the present permutation, if it is kept; `a` and `b` are the models."""
        gram = self.grams.get(move.name)
        for place in self.missing.pop(move.name, ()):
            block = place.block
            place.gram(block.view(a[block.parameter]), block.view(b[block.parameter]), into=gram)
        return gram

    def fits(self, name: str, size: int) -> bool:
        """Whether there is room for the Gram matrix of a move, of so many bytes."""
        return name in self.grams or size <= self.free_bytes

    def keep(self, move: Move, gram: torch.Tensor, columns: np.ndarray, missing: Iterable[Place] = ()) -> None:
        """Keep a move's Gram matrix, as it becomes once the move's group has been renumbered by `columns`.

        Places that are `missing` in it are added when it is next used. The matrix given may be changed.
        """
        if not self.fits(move.name, gram.nbytes):
            return
        if move.name not in self.grams:
            self.free_bytes -= gram.nbytes
        if (columns != np.arange(columns.shape[-1])).any():
            index = torch.from_numpy(columns).to(gram.device)
            if index.ndim > 1:
                gram = gram.gather(-1, index.unsqueeze(-2).expand_as(gram))
            else:  # a few rows at a time, which needs no second matrix
                for rows in torch.split(gram, max(1, tuned.PORTION // gram.shape[-1])):
                    rows.copy_(rows.index_select(-1, index))
        self.grams[move.name] = gram
        self.missing[move.name] = tuple(missing)
        self.update_cost[move.name] = 0.0

    def drop(self, move: Move) -> None:
        """Forget a move's Gram matrix."""
        gram = self.grams.pop(move.name, None)
        self.missing.pop(move.name, None)
        self.free_bytes += 0 if gram is None else gram.nbytes

    def updates_for(
        self, moves: Iterable[Move], parameters: Collection[str], fraction: float
    ) -> dict[Block, list[tuple[Move, Place]]]:
        """Where the kept Gram matrices of `moves` must be updated once this fraction of `parameters` has changed.

        One for which that is more work, with what was updated since it was last used, than computing it anew is
        forgotten instead.
        """
        updates: dict[Block, list[tuple[Move, Place]]] = {}
        for move in moves:
            if move.name not in self.grams:
                continue
            missing = self.missing.get(move.name, ())
            touched = [p for p in move.root.places if p.block.parameter in parameters and p not in missing]
            whole = sum(place.block.size for place in move.root.places)
            self.update_cost[move.name] += fraction * sum(place.block.size for place in touched) / whole
            if self.update_cost[move.name] >= 1.0:
                self.drop(move)
                continue
            for place in touched:
                updates.setdefault(place.block, []).append((move, place))
        return updates

    def update(self, move: Move, place: Place, a: torch.Tensor, difference: torch.Tensor) -> None:
        """Add what one place contributes once B's block there has changed by `difference`.

        `a` and `difference` are views of the block, or both the same portion of it outside of which nothing changed.
        """
        place.gram(a, difference, into=self.grams[move.name])
