"""The order in which groups take their turns.

The first sweep from the barycentre decides most. A block of weights can be compared once all groups in it but one are
known, so it is evidence for the last of them only. On n indices whose Gram entries have a variance of E/n beyond
constants of rows and columns, the best assignment gains about sqrt(2 n log(n) E) over a random one, E being the
evidence so far. That grows with the root of E: evidence is best spread over groups, and a group that meets many
others should come early, so that each of those can see it, but not before it has evidence itself. Which order gains
most in total is found by moving one group at a time to its best place. In a chain of layers from either end to the
other no such move helps, though one end may have far more evidence than the other: so the search is made once more
from what it found, reversed. Later sweeps gain as much in this order as in random ones, with fewer solves. Where a
group stands matters to those it meets only, so a pass over the groups looks at each pair that meets, and no other.

Moves that do not meet may be taken together. `ranks` colours the moves so, for one order: taking them rank by rank
comes to the same, to the last bit, as taking them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from permgraph.matching import tuned
from permgraph.matching.problem.moves import Plan


def informed_order(plan: Plan, spread: Mapping[str, float], rng: np.random.Generator) -> list[int]:
    """An order of the plan's moves in which the first sweep from the barycentre is expected to gain most.

    Args:
        plan: the moves.
        spread: for each parameter the variance of its elements in A times that in B. What is constant tells indices
            apart no more than what is not there.
        rng: for where the search begins, which decides between orders that are as good.
    """
    evidence = _evidence(plan, spread)
    first = _improved(rng.permutation(len(plan.moves)), evidence, rng)
    turned = _improved(first[::-1], evidence, rng)
    best = turned if evidence.expected(turned) > evidence.expected(first) * (1 + 1e-9) else first
    return [int(number) for number in best]


def ranks(order: Sequence[int], neighbours: Sequence[Collection[int]]) -> list[list[int]]:
    """The moves of an order in sets of which no two are neighbours, each after all those neighbours that it was after.

    Args:
        order: numbers of moves, each at most once.
        neighbours: for each move those that see where its groups stand.

    Example:
        >>> ranks([1, 0, 2, 3], [{1}, {0, 2}, {1, 3}, {2}])  # a chain, from its second link
        [[1], [0, 2], [3]]
    """
    seen_by: dict[int, list[int]] = {}
    for move in order:
        for neighbour in neighbours[move]:
            seen_by.setdefault(neighbour, []).append(move)
    least: dict[int, int] = {}  # the rank that a move can have, by the neighbours that have theirs
    ranked: list[list[int]] = []
    for move in order:
        rank = least.get(move, 0)
        if rank == len(ranked):
            ranked.append([])
        ranked[rank].append(move)
        for neighbour in (*neighbours[move], *seen_by.get(move, ())):
            least[neighbour] = max(least.get(neighbour, 0), rank + 1)
    return ranked


@dataclass(frozen=True)
class _Evidence:
    """What tells the indices of each move apart.

    Attributes:
        scale: by what evidence is multiplied before its root is taken, for each move.
        alone: the evidence of each move that hangs on no other.
        met: for each move those it meets, ascending.
        shown: for each of them, what it shows the move once it is known.
        given: for each of them, what it is shown by the move.
    """

    scale: np.ndarray
    alone: np.ndarray
    met: Sequence[np.ndarray]
    shown: Sequence[np.ndarray]
    given: Sequence[np.ndarray]

    def known(self, position: np.ndarray) -> np.ndarray:
        """What each move sees when its turn comes, those before it being known."""
        pairs = zip(self.met, self.shown, strict=True)
        seen = [shown[position[met] < position[one]].sum() for one, (met, shown) in enumerate(pairs)]
        known: np.ndarray = self.alone + np.array(seen, dtype=float)
        return known

    def expected(self, order: np.ndarray) -> float:
        """What the first sweep in this order can be expected to gain."""
        return float(np.sqrt(self.scale * self.known(np.argsort(order))).sum())


def _improved(start: np.ndarray, evidence: _Evidence, rng: np.random.Generator) -> np.ndarray:
    """The order in which moving no single move to another place helps any more."""
    position = np.argsort(start)
    for _ in range(tuned.ORDER_PASSES):
        known = evidence.known(position)
        moved = False
        for one in rng.permutation(len(position)).tolist():
            old, new = int(position[one]), _best_place(one, position, known, evidence)
            met, given, shown = evidence.met[one], evidence.given[one], evidence.shown[one]
            known[met] -= np.where(position[met] > old, given, 0.0)
            if new != old:
                moved = True
                between = (position >= min(old, new)) & (position <= max(old, new))
                position[between] += 1 if new < old else -1
                position[one] = new
            known[met] += np.where(position[met] > new, given, 0.0)
            known[one] = evidence.alone[one] + shown[position[met] < new].sum()
        if not moved:
            break
    return np.argsort(position)


def _best_place(one: int, position: np.ndarray, known: np.ndarray, evidence: _Evidence) -> int:
    """Where among the others this move adds most to the expected gain: here, first of all, or right after one it meets.

    Args:
        one: the move.
        position: the present places of all.
        known: what each sees at present.
        evidence: what they can see.
    """
    met, scale = evidence.met[one], evidence.scale
    places = position[met] - (position[met] > position[one])  # with this move taken out
    order = np.argsort(places)
    met, places = met[order], places[order]
    given, shown = evidence.given[one][order], evidence.shown[one][order]
    unseen = np.maximum(known[met] - np.where(position[met] > position[one], given, 0.0), 0.0)
    without, after = np.sqrt(scale[met] * unseen), np.sqrt(scale[met] * (unseen + given))
    own = np.sqrt(scale[one] * (evidence.alone[one] + _sums(shown)))
    # Those before this move do not see it; those after it do.
    total = own + _sums(without) + _sums(after[::-1])[::-1]
    best, here = int(np.argmax(total)), int((places < position[one]).sum())
    if total[here] >= total[best] * (1 - 1e-12):
        return int(position[one])
    return int(places[best - 1]) + 1 if best else 0


def _sums(values: np.ndarray) -> np.ndarray:
    """The sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _evidence(plan: Plan, spread: Mapping[str, float]) -> _Evidence:
    count = len(plan.moves)
    alone = np.zeros(count)
    shared: list[dict[int, float]] = [{} for _ in range(count)]
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
                    shared[number][other] = shared[number].get(other, 0.0) + weight / len(others)
    sizes = [plan.spec.groups[move.name].size for move in plan.moves]
    meeting = [sorted(seen) for seen in shared]  # whoever sees another is seen by it
    return _Evidence(
        scale=np.array([2 * n * math.log(max(2, n)) for n in sizes]),
        alone=alone,
        met=[np.array(others, dtype=np.int64) for others in meeting],
        shown=[np.array([shared[one][n] for n in others], dtype=float) for one, others in enumerate(meeting)],
        given=[np.array([shared[n][one] for n in others], dtype=float) for one, others in enumerate(meeting)],
    )
