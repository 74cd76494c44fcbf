"""Steps in which groups that meet each other are chosen inside each pair of a root's indices.

In a grouped convolution the inputs and the outputs of a group meet in one weight; so do the queries and the channels of
a grouped-query head, or the units of a head with themselves in a recurrent one. No nested assignment chooses two such
groups at once. Here every pair (i, j) of the root's indices has its own small coordinate ascent over the groups inside:
each in turn by assignment, the others at what the pair has chosen so far; at first they are unknown, and averaged over.
The value of each pair is exact for what was chosen, if not always the best that could be.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from permgraph.assignment.solve import assign
from permgraph.matching import tuned
from permgraph.matching.ascent.step import Scene
from permgraph.matching.problem.moves import Move
from permgraph.spec.blocks import Block

States = dict[str, torch.Tensor]
"""For each group inside, what has been chosen for one i with every j: integers (n, size)."""


@dataclass(frozen=True)
class _Spot:
    """One block in which the root stands, cut to one index of the root's own parents."""

    a: torch.Tensor
    b: torch.Tensor
    root: int
    inner: tuple[tuple[int, str], ...]

    def row(self, i: int) -> torch.Tensor:
        return self.a.narrow(self.root, i, 1)

    def permuted(self, states: Mapping[str, torch.Tensor], keep: int | None = None) -> torch.Tensor:
        """B with the groups inside renumbered as chosen for each j, the axis `keep` left as it is."""
        b = self.b
        for axis, group in self.inner:
            if axis != keep and group in states:
                chosen = states[group]
                n, size = chosen.shape
                front = b.movedim((self.root, axis), (0, 1))
                flat = (chosen + torch.arange(n, device=b.device)[:, None] * size).reshape(-1)
                moved = front.reshape(n * size, -1).index_select(0, flat)
                b = moved.view(front.shape).movedim((0, 1), (self.root, axis))
        return b

    def gram(self, i: int, own: int, states: Mapping[str, torch.Tensor], free: frozenset[str]) -> torch.Tensor:
        """(n, size, size) for each j: how well A's indices of the axis `own` at i agree with B's at j."""
        a, b = self.row(i), self.permuted(states, keep=own)
        unknown = [axis for axis, group in self.inner if axis != own and group in free]
        if unknown:
            a, b = a.sum(unknown, keepdim=True), b.mean(unknown, keepdim=True)
        rest = [axis for axis in range(a.ndim) if axis not in (self.root, own)]
        size, n = a.shape[own], b.shape[self.root]
        left = a.permute(self.root, own, *rest).reshape(size, -1)
        right = b.permute(self.root, own, *rest).reshape(n * size, -1)
        return (left @ right.mT).view(size, n, size).transpose(0, 1)

    def value(self, i: int, states: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(n,): the inner product of A at i with B at each j, as renumbered."""
        b = self.permuted(states).movedim(self.root, 0)
        return b.reshape(b.shape[0], -1) @ self.row(i).movedim(self.root, 0).reshape(-1)


def paired_values(scene: Scene, move: Move, blocks: tuple[Block, ...]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """What each pairing of the root's indices is worth, and what each pair chooses inside.

    Processes that match together read the same parameters here, and deal out A's indices of the root.

    Returns:
        The values (*sizes of the root's parents, n, n), and for each group inside, integers (*parents, n, n, size).
    """
    groups = scene.spec.groups
    n = groups[move.name].size
    sizes = tuple(groups[parent].size for parent in groups[move.name].parents)
    inside = sorted(move.groups - {move.name})
    like = next(iter(scene.a.values()))
    worth = torch.zeros((*sizes, n, n), dtype=like.dtype, device=like.device)
    chosen = {name: np.zeros((*sizes, n, n, groups[name].size), dtype=np.int64) for name in inside}
    workers = None if scene.share is None else scene.share.workers
    mine = range(n) if workers is None else range(workers.rank, n, workers.size)
    for at in itertools.product(*map(range, sizes)):
        spots = [_spot(scene, move, block, at) for block in blocks]
        # First those of which there is evidence that hangs on none of the others.
        evidence = dict.fromkeys(inside, 0)
        for spot in spots:
            if len(spot.inner) == 1:
                evidence[spot.inner[0][1]] += spot.a.numel()
        order = sorted(inside, key=lambda name: -evidence[name])
        for i in mine:
            states = _ascend(scene, spots, order, i)
            value = _total(spots, i, states)
            # To stay as it is must remain a choice, and wins ties.
            rest = {name: torch.arange(groups[name].size, device=like.device).expand(n, -1) for name in inside}
            stay = _total(spots, i, rest)
            if stay[i] >= value[i] - 16 * torch.finfo(like.dtype).eps * stay[i].abs():
                value[i] = stay[i]
                for name in inside:
                    states[name][i] = rest[name][i]
            worth[(*at, i)] = value
            for name in inside:
                chosen[name][(*at, i)] = states[name].cpu().numpy()
    if workers is not None:
        worth = workers.sum(worth)
        chosen = {name: workers.sum(torch.from_numpy(array)).numpy() for name, array in chosen.items()}
    return worth, chosen


def _spot(scene: Scene, move: Move, block: Block, at: tuple[int, ...]) -> _Spot:
    (root,) = block.axes_of(move.name)
    a, b = block.view(scene.a[block.parameter]), block.view(scene.b[block.parameter])
    for axis, index in zip(block.leaves[root].parents, at, strict=True):
        a, b = a.narrow(axis, index, 1), b.narrow(axis, index, 1)
    unknown = [axis for axis, leaf in enumerate(block.leaves) if leaf.group in scene.free]
    if unknown:
        a, b = a.sum(unknown, keepdim=True), b.mean(unknown, keepdim=True)
    inner = tuple((x, leaf.group) for x, leaf in enumerate(block.leaves) if leaf.group in move.groups and x != root)
    return _Spot(a, b, root, tuple((axis, group) for axis, group in inner if group is not None))


def _ascend(scene: Scene, spots: list[_Spot], order: list[str], i: int) -> States:
    """Coordinate ascent over the groups inside, for one i and all j at once."""
    states: States = {}
    for _ in range(tuned.PAIRED_ROUNDS):
        changed = False
        for name in order:
            free = frozenset(order) - frozenset(states)
            gram: torch.Tensor | None = None
            twice = False
            for spot in spots:
                axes = [axis for axis, group in spot.inner if group == name]
                twice = twice or len(axes) > 1
                for axis in axes:
                    term = spot.gram(i, axis, states, free)
                    gram = term if gram is None else gram + term
            assert gram is not None, f"{name} stands nowhere"
            best = assign(gram, maximise=True, solver=scene.solver, name=f"the Gram matrix of {name}").columns
            new = torch.from_numpy(best).to(gram.device)
            if name in states and twice:
                # Linear only at the present choice: take it for those pairs where it is better in truth.
                better = _total(spots, i, {**states, name: new}) > _total(spots, i, states)
                new = torch.where(better[:, None], new, states[name])
            changed = changed or name not in states or not torch.equal(new, states[name])
            states[name] = new
        if not changed:
            break
    return states


def _total(spots: list[_Spot], i: int, states: Mapping[str, torch.Tensor]) -> torch.Tensor:
    values = [spot.value(i, states) for spot in spots]
    return torch.stack(values).sum(dim=0)
