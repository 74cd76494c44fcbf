"""Several ascents side by side, for networks so small that a step costs less than calling what makes it.

A small trained network has many local optima, within a percent of each other, and which of them an ascent ends in is
chance: what raises the objective is to try batched. Here they all take the same group at a time, so that their Gram
matrices are one batched product and their assignments one call. Nothing is kept between steps.

`explore` spends on this what is little next to anything else that one does with a network. It starts from random
permutations, and from the best so far with some indices of each group shuffled: an optimum near a good one is often
better (iterated local search; Lourenço, Martin & Stützle 2003). Which indices are shuffled is drawn among A's in the
order of their norms, and where they go among the places that they have in the best so far: so what comes out does not
hang on how either network is numbered.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from permgraph.assignment.solve import Solver
from permgraph.matching import tuned
from permgraph.matching.ascent.step import choose
from permgraph.matching.matcher import Progress, Sweep
from permgraph.matching.problem.moves import Move, Plan
from permgraph.matching.problem.objective import Pair
from permgraph.matching.problem.renumber import Arrays
from permgraph.matching.threads import look_again


@dataclass(frozen=True)
class _Meeting:
    """One block in which a group meets another, as the group sees it.

    Attributes:
        other: the group that it meets.
        a: A's block, (own, other times what is left).
        b: B's block, (other, what is left times own), so that it is renumbered along `other` by copying long rows.
        first: whether the block counts here where blocks are to count once.
    """

    other: str
    a: torch.Tensor
    b: torch.Tensor
    first: bool

    def gram(self, stands: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """`start`, (n, n) or (runs, n, n), and the share of this block where the other group `stands` (runs, size)."""
        runs, (n, depth) = len(stands), self.a.shape
        b = self.b.index_select(0, stands.reshape(-1)).view(runs, depth, n)
        return torch.baddbmm(start, self.a.expand(runs, n, depth), b)


@dataclass(frozen=True)
class Ascended:
    """Where one of several ascents ended.

    Attributes:
        arrays: where the groups stand that move.
        objective: there, as it is reported.
        history: its sweeps.
        converged: whether no step raises the objective any more.
        interrupted: whether Ctrl-C ended it.
    """

    arrays: Arrays
    objective: float
    history: tuple[Sweep, ...]
    converged: bool
    interrupted: bool


class BatchedAscent:
    """The Gram matrices of all groups, for many permutations at a time."""

    def __init__(self, plan: Plan, compared: Pair, solver: Solver = "auto") -> None:
        self.plan, self.compared, self.solver = plan, compared, solver
        self.sizes = {move.name: plan.spec.groups[move.name].size for move in plan.moves}
        self.alone: dict[str, torch.Tensor] = {}
        self.meetings: dict[str, list[_Meeting]] = {}
        self.by_norm: dict[str, np.ndarray] = {}
        """A's indices of each group, by the norm of what is theirs."""
        like = next(iter(compared.a.values()))
        seen = set()
        for move in plan.moves:
            n = self.sizes[move.name]
            self.alone[move.name] = torch.zeros(n, n, dtype=like.dtype, device=like.device)
            self.meetings[move.name] = []
            norms = torch.zeros(n, dtype=torch.float64, device=like.device)
            for place in move.root.places:
                block, own = place.block, place.own[0]
                a, b = (block.view(tensors[block.parameter]) for tensors in (compared.a, compared.b))
                norms += a.double().square().movedim(own, 0).reshape(n, -1).sum(dim=1)
                others = [axis for axis, leaf in enumerate(block.leaves) if axis != own and leaf.group in self.sizes]
                if not others:
                    place.gram(a, b, into=self.alone[move.name])
                    continue
                (other,) = others
                rest = [axis for axis in range(a.ndim) if axis not in (own, other)]
                group = block.leaves[other].group
                assert group is not None
                self.meetings[move.name].append(
                    _Meeting(
                        group,
                        a.permute(own, other, *rest).reshape(n, -1),
                        b.permute(other, *rest, own).reshape(b.shape[other], -1),
                        block not in seen,
                    )
                )
                seen.add(block)
            self.by_norm[move.name] = np.argsort(norms.cpu().numpy(), kind="stable")

    @staticmethod
    def fits(plan: Plan) -> bool:
        """Whether every group moves by itself, and meets at most one other in a block."""
        moving = {move.name for move in plan.moves}
        return bool(plan.moves) and all(
            len(move.groups) == 1
            and not move.quadratic
            and not move.root.batch
            and not move.carried
            and all(sum(leaf.group in moving for leaf in place.block.leaves) <= 2 for place in move.root.places)
            for move in plan.moves
        )

    def climb(
        self,
        starts: Sequence[Mapping[str, np.ndarray]],
        rng: np.random.Generator,
        max_sweeps: int,
        progress: Progress | None = None,
        started: float | None = None,
    ) -> list[Ascended]:
        """Take each of these permutations to where no step raises the objective, or for so many sweeps.

        Args:
            starts: an array for each group that moves.
            rng: for the order of the groups, which is drawn for each sweep and is the same for all.
            max_sweeps: stop after so many.
            progress: called after each sweep, with what it did to the one that is best.
            started: what the seconds in the records are counted from.
        """
        began = time.perf_counter() if started is None else started
        device = next(iter(self.alone.values())).device
        stands = {
            name: torch.tensor(np.stack([np.asarray(start[name]) for start in starts]), device=device)
            for name in self.sizes
        }
        values = self.values(stands)
        histories: list[list[Sweep]] = [[] for _ in starts]
        stale = np.ones((len(starts), len(self.plan.moves)), dtype=bool)
        interrupted = False
        try:
            for number in range(1, max_sweeps + 1):
                busy = np.flatnonzero(stale.any(axis=1))
                if not len(busy):
                    break
                before = {name: stand.clone() for name, stand in stands.items()}
                gains = [dict[str, float]() for _ in starts]
                for move in rng.permutation(len(self.plan.moves)).tolist():
                    self._step(move, stands, stale, values, gains)
                moved = {name: (stands[name] != before[name]).sum(dim=1).tolist() for name in stands}
                seconds = time.perf_counter() - began
                for run in busy.tolist():
                    changed = {name: int(counts[run]) for name, counts in moved.items() if counts[run]}
                    scaled = {name: gain * self.compared.scale for name, gain in gains[run].items()}
                    reached = self.compared.reported(float(values[run]))
                    histories[run].append(Sweep(number, reached, changed, scaled, seconds))
                look_again()
                if progress is not None:
                    progress(histories[max(busy.tolist(), key=lambda run: values[run])][-1])
        except KeyboardInterrupt:
            interrupted = True
        arrays = {name: stand.cpu().numpy() for name, stand in stands.items()}
        return [
            Ascended(
                {name: array[run] for name, array in arrays.items()},
                self.compared.reported(float(values[run])),
                tuple(history),
                not stale[run].any(),
                interrupted,
            )
            for run, history in enumerate(histories)
        ]

    def _step(
        self,
        number: int,
        stands: dict[str, torch.Tensor],
        stale: np.ndarray,
        values: np.ndarray,
        gains: list[dict[str, float]],
    ) -> None:
        """Give one group its turn, in those runs where it may help."""
        move = self.plan.moves[number]
        runs = np.flatnonzero(stale[:, number])
        if not len(runs):
            return
        everywhere = len(runs) == len(stale)
        here = slice(None) if everywhere else torch.from_numpy(runs).to(stands[move.name].device)
        gram = self._gram(move, stands, here)
        stand = stands[move.name][here]
        worth = gram.gather(2, stand.unsqueeze(1).expand(-1, stand.shape[1], -1))
        columns, _ = choose(worth, self.solver, move.name)
        stale[runs, number] = False
        moved = (columns != np.arange(columns.shape[1])).any(axis=1)
        if not moved.any():
            return
        chosen = torch.from_numpy(columns).to(stand.device)
        taken = worth.gather(2, chosen.unsqueeze(2)).squeeze(2) - worth.diagonal(dim1=1, dim2=2)
        gained = taken.double().sum(dim=1).tolist()
        stands[move.name][here] = stand.gather(1, chosen)
        others = list(self.plan.neighbours[number])
        for at in np.flatnonzero(moved).tolist():
            run = int(runs[at])
            stale[run, others] = True
            values[run] += gained[at]
            gains[run][move.name] = gained[at]

    def _gram(self, move: Move, stands: Mapping[str, torch.Tensor], here: slice | torch.Tensor) -> torch.Tensor:
        """(runs, n, n): what A's indices of a group are worth with B's, which are not renumbered."""
        gram = self.alone[move.name]
        for meeting in self.meetings[move.name]:
            gram = meeting.gram(stands[meeting.other][here], gram)
        return gram if gram.ndim == 3 else gram.expand(len(stands[move.name][here]), -1, -1)

    def shuffled(self, arrays: Mapping[str, np.ndarray], part: float, rng: np.random.Generator) -> Arrays:
        """Permutations in which this part of each group's indices, at least two, have changed places at random."""
        out: Arrays = {}
        for name, n in self.sizes.items():
            chosen = self.by_norm[name][rng.choice(n, min(n, max(2, round(part * n))), replace=False)]
            out[name] = np.array(arrays[name])
            out[name][chosen] = arrays[name][rng.permutation(chosen) if part == 1.0 else np.roll(chosen, 1)]
        return out

    def values(self, stands: Mapping[str, torch.Tensor]) -> np.ndarray:
        """The sum of inner products in each run, float64."""
        found: list[np.ndarray] = []
        for name, stand in stands.items():
            worth = self.alone[name].expand(len(stand), -1, -1)
            for meeting in self.meetings[name]:
                if meeting.first:
                    worth = meeting.gram(stands[meeting.other], worth)
            found.append(worth.gather(2, stand.unsqueeze(2)).double().sum(dim=(1, 2)).cpu().numpy())
        return np.asarray(np.sum(found, axis=0))


def batch_width(plan: Plan) -> int:
    """How many ascents `explore` runs side by side.

    None where a network is too large for any, where groups are fibred or meet themselves, or where none meets another,
    so that one step for each finds the best there is.
    """
    if not BatchedAscent.fits(plan) or not any(plan.neighbours):
        return 0
    seconds = tuned.WORTH / tuned.EXPLORING_SWEEPS - tuned.CALL_SECONDS * len(plan.moves)
    return max(0, min(tuned.WIDTH, int(seconds / _sweep_seconds(plan))))


def worth_relaxing(plan: Plan, sweeps: int) -> bool:
    """Whether an ascent that took so many sweeps should be followed by one from where `FrankWolfe` ends.

    That is where many sweeps say that there are local optima, where `explore` has few ascents to look for better ones,
    and where the relaxation takes no more than some two seconds.
    """
    if sweeps < tuned.LONG or not BatchedAscent.fits(plan) or not any(plan.neighbours):
        return False
    return batch_width(plan) < tuned.WIDTH // 2 and tuned.RELAXATION_SWEEPS * _sweep_seconds(plan) < tuned.RELAXING


def _sweep_seconds(plan: Plan) -> float:
    """What a sweep of one ascent can be expected to take, without what is called."""
    seconds = 1e-12
    for move in plan.moves:
        n = plan.spec.groups[move.name].size
        products = n * sum(place.block.size for place in move.root.places)
        seconds += tuned.CUBE_SECONDS * n**3 + tuned.PRODUCT_SECONDS * products
    return seconds


def explore(
    batched: BatchedAscent,
    best: Mapping[str, np.ndarray],
    objective: float,
    count: int,
    rng: np.random.Generator,
    max_sweeps: int,
    progress: Progress | None = None,
    started: float | None = None,
) -> list[Ascended]:
    """Try `count` ascents at a time for better local optima, in two rounds; all that were found, in order.

    Half of the first round begins at random, the other half at `best` with half of the indices of each group shuffled;
    the second where the best so far is, with a quarter of them shuffled.

    Args:
        batched: the two models.
        best: where the groups stand in the best optimum so far.
        objective: what it is worth.
        count: of ascents side by side, see `batch_width`.
        rng: for where they begin, and the order of the groups.
        max_sweeps, progress, started: as in `BatchedAscent.climb`.
    """
    stand = {name: best[name] for name in batched.sizes}
    found: list[Ascended] = []
    for parts in ([1.0] * (count // 2) + [0.5] * (count - count // 2), [0.25] * count):
        starts = [batched.shuffled(stand, part, rng) for part in parts]
        ascents = batched.climb(starts, rng, max_sweeps, progress, started)
        found += ascents
        top = max(ascents, key=lambda ascent: ascent.objective)
        if top.objective > objective:
            stand, objective = top.arrays, top.objective
        if top.interrupted:
            break
    return found
