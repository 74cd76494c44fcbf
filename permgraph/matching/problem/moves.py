"""Moves: which groups one step of coordinate ascent renumbers together, and the Gram matrices that decide it.

A move has a root group and, where others are fibred over it, those too: what it is worth to put B's index j of the
root in the place of A's index i is the most that the groups inside can then agree, so each pair (i, j) holds an
assignment of its own. All other groups rest where they are. The Gram matrix of a group is summed over every place where
it stands; at each place it is one batched matrix product of A's block and B's, with the group's own axes (and its
ancestors' in the move) kept apart and all others contracted. Axes of parents at rest are batches: they have the same
index on both sides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from permgraph.matching import tuned
from permgraph.spec.blocks import Block, blocks_of
from permgraph.spec.spec import PermutationSpec

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """One place in a block where a group stands, as a move sees it.

    Attributes:
        block: the block.
        own: the axes that the move renumbers, from the root's to the group's.
        batch: the axes of the group's parents that rest.
    """

    block: Block
    own: tuple[int, ...]
    batch: tuple[int, ...]

    def gram(
        self, a: torch.Tensor, b: torch.Tensor, free: Collection[str] = (), into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """How well A's indices agree with B's here.

        Args:
            a, b: views of the block, or the same part of both along any axis that is not `own`; along the root's axis
                each may be another part.
            free: groups whose permutation is unknown: B is averaged over their axes, as if every permutation of them
                were equally likely.
            into: a Gram matrix to which to add this place's share; it is changed.

        Returns:
            A tensor (*batch, i, j, i', j', ...) with a pair of axes, A's and B's, for each of `own`; `into`, if given.
        """
        leaves = self.block.leaves
        rest = [axis for axis in range(len(leaves)) if axis not in self.own and axis not in self.batch]
        unknown = [axis for axis in rest if leaves[axis].group in free]
        if unknown:
            a, b = a.sum(unknown, keepdim=True), b.mean(unknown, keepdim=True)
        longest = max(rest, key=lambda axis: a.shape[axis], default=None)
        if len(self.own) == 1 and longest is not None and a.numel() > tuned.PORTION and not _is_matrix(a, self.own[0]):
            # Both sides are copied for the product: not all of them at a time.
            step = max(1, a.shape[longest] * tuned.PORTION // a.numel())
            for x, y in zip(torch.split(a, step, longest), torch.split(b, step, longest), strict=True):
                into = self._product(x, y, rest, into)
            assert into is not None
            return into
        return self._product(a, b, rest, into)

    def _product(self, a: torch.Tensor, b: torch.Tensor, rest: list[int], into: torch.Tensor | None) -> torch.Tensor:
        """`gram`, in one piece."""
        order = (*self.batch, *self.own, *rest)
        batch = [a.shape[axis] for axis in self.batch]
        rows, columns = [a.shape[axis] for axis in self.own], [b.shape[axis] for axis in self.own]
        depth = math.prod(a.shape[axis] for axis in rest)
        left = a.permute(order).reshape(math.prod(batch), math.prod(rows), depth)
        right = b.permute(order).reshape(math.prod(batch), math.prod(columns), depth)
        n, k = len(batch), len(rows)
        if into is not None and k == 1 and into.is_contiguous():
            # Adding inside the product spares a matrix, and a pass over it.
            into.view(len(left), *rows, *columns).baddbmm_(left, right.mT)
            return into
        gram = torch.matmul(left, right.mT).reshape(*batch, *rows, *columns)
        gram = gram.permute(*range(n), *(axis for pair in range(k) for axis in (n + pair, n + k + pair)))
        return gram if into is None else into.add_(gram)

    def known(self, free: Collection[str]) -> bool:
        """Whether what is seen here hangs on none of these groups."""
        return not any(leaf.group in free for axis, leaf in enumerate(self.block.leaves) if axis not in self.own)


@dataclass(frozen=True)
class Node:
    """A group in a move, and those that the move takes along inside it.

    Attributes:
        group: its name.
        chain: the groups of its axes in the move, from the root to itself.
        batch: its parents that rest.
        places: where it stands with no group of the move inside it.
        inner: the groups of the move that are fibred over it, next below.
    """

    group: str
    chain: tuple[str, ...]
    batch: tuple[str, ...]
    places: tuple[Place, ...]
    inner: tuple[Node, ...] = ()

    def nodes(self) -> Iterator[Node]:
        """This one and all inside it."""
        yield self
        for node in self.inner:
            yield from node.nodes()


@dataclass(frozen=True)
class Move:
    """What one step renumbers.

    Attributes:
        root: the tree of groups.
        groups: all of them.
        carried: groups fibred over the root that keep their order inside it.
        parameters: the parameters in which the root stands.
        quadratic: whether a group of the move occurs twice in some block, so that the objective is quadratic in it; its
            Gram matrices are then the slope at the present permutation.
        paired: whether the groups inside are chosen for each pair of the root's indices by an ascent of their own,
            because some of them meet in a block.
        then: the moves that choose what is inside the root, once the root has been renumbered.
    """

    root: Node
    groups: frozenset[str]
    carried: frozenset[str]
    parameters: tuple[str, ...]
    quadratic: bool
    paired: bool = False
    then: tuple[Move, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The root group's."""
        return self.root.group


def _is_matrix(tensor: torch.Tensor, axis: int) -> bool:
    """Whether a tensor is a matrix with `axis` for its rows as it lies in memory, so that none must be made."""
    return tensor.ndim == 2 or (axis == 0 and tensor.is_contiguous())


class Plan:
    """The blocks of the parameters that count, and the moves that reach every element of the spec's group."""

    def __init__(self, spec: PermutationSpec, parameters: Iterable[str], frozen: Collection[str] = ()) -> None:
        self.spec = spec
        self.blocks = {name: blocks_of(spec, name) for name in parameters}
        # A frozen group is like an axis that stays put: no move has it.
        self.blocks_with: dict[str, list[Block]] = {name: [] for name in spec.moving if name not in frozen}
        for block in itertools.chain.from_iterable(self.blocks.values()):
            for group in dict.fromkeys(leaf.group for leaf in block.leaves):
                if group in self.blocks_with:
                    self.blocks_with[group].append(block)
        self._inside: dict[str, list[str]] = {}
        for name in spec.moving:
            if self.blocks_with.get(name):
                for parent in spec.groups[name].parents:
                    self._inside.setdefault(parent, []).append(name)
        roots = [name for name, held in self.blocks_with.items() if held]
        self.moves = tuple(itertools.chain.from_iterable(map(self._moves, roots)))
        self.meeting = tuple(self._meeting(move) for move in self.moves)
        """For each move the groups that stand where its groups do, those included."""
        self.neighbours = self._neighbours()
        """For each move those others whose Gram matrices depend on where its groups stand: the coupling graph."""

    def _meeting(self, move: Move) -> frozenset[str]:
        blocks = (block for name in move.groups for block in self.blocks_with[name])
        return frozenset(leaf.group for block in blocks for leaf in block.leaves if leaf.group is not None)

    def _neighbours(self) -> tuple[frozenset[int], ...]:
        owners: dict[str, set[int]] = {}
        for number, move in enumerate(self.moves):
            for group in move.groups | move.carried:
                owners.setdefault(group, set()).add(number)
        return tuple(
            frozenset(other for group in groups for other in owners.get(group, ()) if other != number)
            for number, groups in enumerate(self.meeting)
        )

    def entries(self, move: Move) -> int:
        """How many entries the Gram matrix of a move's root has."""
        return math.prod(self.spec.groups[name].size for name in (*move.root.batch, move.name, move.name))

    def inside(self, group: str) -> tuple[str, ...]:
        """The moving groups fibred over `group`, each after its parents."""
        return tuple(sorted(self._inside.get(group, ()), key=lambda name: len(self.spec.groups[name].parents)))

    def _moves(self, root: str) -> Iterator[Move]:
        """The moves with this root: together they take every group inside it along at least once.

        Two groups that meet in a block, neither inside the other, cannot both be chosen by one nested assignment.
        """
        left = list(self.inside(root))
        clashing = any(self._clash(root, *two) for two in itertools.combinations_with_replacement(left, 2))
        if clashing and all(len(block.axes_of(root)) == 1 for block in self.blocks_with[root]):
            own = {root, *self.spec.groups[root].parents}
            yield self.pair([name for name in left if set(self.spec.groups[name].parents) == own], root)
            return
        while True:
            taken: list[str] = []
            for name in sorted(self.inside(root), key=lambda name: name not in left):
                above = [p for p in self.spec.groups[name].parents if p in self.inside(root)]
                if all(p in taken for p in above) and not any(self._clash(root, name, other) for other in taken):
                    taken.append(name)
            taken.sort(key=lambda name: len(self.spec.groups[name].parents))
            yield self.move(root, taken)
            left = [name for name in left if name not in taken]
            if not left or not taken:
                return

    def pair(self, taken: Collection[str], root: str) -> Move:
        """The move of `root` in which the groups directly inside it are chosen pair by pair."""
        parents = self.spec.groups[root].parents
        return Move(
            Node(root, (root,), parents, ()),
            frozenset((root, *taken)),
            frozenset(self.inside(root)) - frozenset(taken),
            self._parameters(root),
            quadratic=False,
            paired=True,
        )

    def _parameters(self, root: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.parameter for block in self.blocks_with[root]))

    def _clash(self, root: str, first: str, second: str) -> bool:
        if first in self.spec.groups[second].parents or second in self.spec.groups[first].parents:
            return False
        return any(
            axis != other and _over(block, axis, root) & _over(block, other, root)
            for block in self.blocks_with[root]
            for axis in block.axes_of(first)
            for other in block.axes_of(second)
        )

    def move(self, root: str, taken: Collection[str]) -> Move:
        """The move of `root` with the groups `taken` inside it."""
        groups = frozenset((root, *taken))
        quadratic = False
        places: dict[str, list[Place]] = {name: [] for name in groups}
        for block in self.blocks_with[root]:
            starts = block.axes_of(root)
            quadratic = quadratic or len(starts) > 1
            for start in starts:
                # The innermost group of the move that stands over this axis of the root decides the Gram.
                below = [
                    axis
                    for axis, leaf in enumerate(block.leaves)
                    if leaf.group in groups and leaf.group != root and start in _over(block, axis, root)
                ]
                ends = [axis for axis in below if not any(axis in block.leaves[other].parents for other in below)]
                quadratic = quadratic or len(ends) > 1
                for end in ends or [start]:
                    leaf = block.leaves[end]
                    assert leaf.group is not None
                    parents = dict(zip(self.spec.groups[leaf.group].parents, leaf.parents, strict=True))
                    own = tuple(axis for group, axis in parents.items() if group in groups)
                    batch = tuple(axis for group, axis in parents.items() if group not in groups)
                    places[leaf.group].append(Place(block, (*own, end), batch))
        tree = self._tree(root, groups, places)
        then = tuple(
            self.move(node.group, [n.group for n in node.nodes() if n.group != node.group]) for node in tree.inner
        )
        return Move(
            tree,
            groups,
            frozenset(self.inside(root)) - groups,
            self._parameters(root),
            quadratic or any(move.quadratic for move in then),
            then=then,
        )

    def _tree(self, group: str, groups: frozenset[str], places: Mapping[str, list[Place]]) -> Node:
        parents = self.spec.groups[group].parents
        below = [
            name
            for name in self.inside(group)
            if name in groups and [p for p in self.spec.groups[name].parents if p in groups][-1] == group
        ]
        return Node(
            group,
            (*(p for p in parents if p in groups), group),
            tuple(p for p in parents if p not in groups),
            tuple(places[group]),
            tuple(self._tree(name, groups, places) for name in below),
        )


def _over(block: Block, axis: int, root: str) -> frozenset[int]:
    """The axes of `root` that this axis is over: itself, or its parent."""
    leaf = block.leaves[axis]
    if leaf.group == root:
        return frozenset((axis,))
    return frozenset(parent for parent in leaf.parents if block.leaves[parent].group == root)
