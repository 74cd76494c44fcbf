"""The order in which groups take their turns.

The first sweep from the barycentre decides most. A block of weights can be compared once all groups in it but one are
known, so it is evidence for the last of them only. On n indices whose Gram entries have a variance of E/n beyond
constants of rows and columns, the best assignment gains about sqrt(2 n log(n) E) over a random one, E being the
evidence so far. That grows with the root of E: evidence is best spread over groups, and a group that meets many
others should come early, so that each of those can see it, but not before it has evidence itself. Which order gains
most in total is found by moving one group at a time to its best place. In a chain of layers from either end to the
other no such move helps, though one end may have far more evidence than the other: so the search is made once more
from what it found, reversed. Later sweeps gain as much in this order as in
random ones, with fewer solves.

Moves that do not meet may be taken together. `ranks` colours the moves so, for one order: taking them rank by rank
comes to the same, to the last bit, as taking them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from permgraph.matching.moves import Plan

PASSES = 20


def informed_order(plan: Plan, spread: Mapping[str, float], rng: np.random.Generator) -> list[int]:
    """An order of the plan's moves in which the first sweep from the barycentre is expected to gain most.

    Args:
        plan: the moves.
        spread: for each parameter the variance of its elements in A times that in B. What is constant tells indices
            apart no more than what is not there.
        rng: for where the search begins, which decides between orders that are as good.
    """
    alone, shared = _evidence(plan, spread)
    sizes = [plan.spec.groups[move.name].size for move in plan.moves]
    scale = np.array([2 * n * math.log(max(2, n)) for n in sizes])
    found = _improved(rng.permutation(len(sizes)).tolist(), alone, shared, scale, rng)
    other = _improved(found[::-1], alone, shared, scale, rng)
    gains = [_expected(order, alone, shared, scale) for order in (found, other)]
    return other if gains[1] > gains[0] * (1 + 1e-9) else found


def ranks(order: Sequence[int], neighbours: Sequence[Collection[int]]) -> list[list[int]]:
    """The moves of an order in sets of which no two are neighbours, each after all those neighbours that it was after.

    Args:
        order: numbers of moves, each at most once.
        neighbours: for each move those that see where its groups stand.

    Example:
        >>> ranks([1, 0, 2, 3], [{1}, {0, 2}, {1, 3}, {2}])  # a chain, from its second link
        [[1], [0, 2], [3]]
    """
    rank: dict[int, int] = {}
    found: list[list[int]] = []
    for one in order:
        before = [at for other, at in rank.items() if other in neighbours[one] or one in neighbours[other]]
        rank[one] = 1 + max(before, default=-1)
        if rank[one] == len(found):
            found.append([])
        found[rank[one]].append(one)
    return found


def _improved(
    start: list[int], alone: np.ndarray, shared: np.ndarray, scale: np.ndarray, rng: np.random.Generator
) -> list[int]:
    """The order in which moving no single move to another place helps any more."""
    order = list(start)
    for _ in range(PASSES):
        before = list(order)
        for one in rng.permutation(len(order)).tolist():
            order.remove(one)
            order.insert(_best_place(one, np.array(order, dtype=np.int64), alone, shared, scale), one)
        if order == before:
            break
    return order


def _expected(order: list[int], alone: np.ndarray, shared: np.ndarray, scale: np.ndarray) -> float:
    """What the first sweep in this order can be expected to gain."""
    at = np.array(order, dtype=np.int64)
    known = alone[at] + np.tril(shared[np.ix_(at, at)], -1).sum(axis=1)
    return float(np.sqrt(scale[at] * known).sum())


def _best_place(one: int, rest: np.ndarray, alone: np.ndarray, shared: np.ndarray, scale: np.ndarray) -> int:
    """Where in the order `rest` of the others this move adds most to the expected gain."""
    among = shared[np.ix_(rest, rest)]
    known = alone[rest] + np.tril(among, -1).sum(axis=1)
    without = np.sqrt(scale[rest] * known)
    after = np.sqrt(scale[rest] * (known + shared[rest, one]))
    own = np.sqrt(scale[one] * (alone[one] + np.concatenate([[0.0], np.cumsum(shared[one, rest])])))
    # Those before this move do not see it; those after it do.
    total = own + np.concatenate([[0.0], np.cumsum(without)]) + np.concatenate([np.cumsum(after[::-1])[::-1], [0.0]])
    return int(np.argmax(total))


def _evidence(plan: Plan, spread: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """For each move the evidence that hangs on no other, and for each two what one becomes once the other is known."""
    count = len(plan.moves)
    alone, shared = np.zeros(count), np.zeros((count, count))
    owners: dict[str, list[int]] = {}
    for number, move in enumerate(plan.moves):
        for group in move.groups:
            owners.setdefault(group, []).append(number)
    for name, blocks in plan.blocks.items():
        for block in blocks:
            met = {leaf.group for leaf in block.leaves if leaf.group in owners}
            if not met:
                continue
            weight = block.size * spread[name]
            numbers = {number for group in met if group is not None for number in owners[group]}
            for number in numbers:
                others = numbers - {n for group in met & plan.moves[number].groups for n in owners[group or ""]}
                if not others:
                    alone[number] += weight
                for other in others:
                    shared[number, other] += weight / len(others)
    return alone, shared
