"""Gram matrices kept between steps, and amended only by what has moved.

When a group k moves on m of its n indices, the Gram matrix of a group that shares a parameter with it changes by one
product of A's slices there with the difference of B's: m/n of the work of computing that parameter's share anew, and
late in a run m is small. Without this every step recomputes all that its neighbours touched, which is most of the time
of a run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch

from permgraph.matching.blocks import Block
from permgraph.matching.moves import Move, Place


class Kept:
    """The Gram matrices (*batch, n, n) of moves that hold one group each, within a number of bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
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

    def worth_amending(
        self, moves: Iterable[Move], parameters: Collection[str], fraction: float
    ) -> dict[Block, list[tuple[Move, Place]]]:
        """Where the kept Gram matrices of `moves` must be amended once this fraction of `parameters` has changed.

        One for which that is more work, with what was amended since it was last used, than computing it anew is
        forgotten instead.
        """
        found: dict[Block, list[tuple[Move, Place]]] = {}
        for move in moves:
            if move.name not in self.grams:
                continue
            touched = [place for place in move.root.places if place.block.parameter in parameters]
            whole = sum(place.block.size for place in move.root.places)
            self.debt[move.name] += fraction * sum(place.block.size for place in touched) / whole
            if self.debt[move.name] >= 1.0:
                self.drop(move)
                continue
            for place in touched:
                found.setdefault(place.block, []).append((move, place))
        return found

    def amend(self, move: Move, place: Place, a: torch.Tensor, difference: torch.Tensor) -> None:
        """Add what one place contributes once B's block there has changed by `difference`.

        `a` and `difference` are views of the block, or both the same portion of it outside of which nothing changed.
        """
        self.grams[move.name] += place.gram(a, difference)
