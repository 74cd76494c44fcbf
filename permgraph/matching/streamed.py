"""Weight matching for models that do not fit in memory: the same ascent, with tensors read when a step needs them.

`WeightMatching` keeps both models in float32, and Gram matrices between steps. Here nothing is kept but the permutation
and a cache of bounded size: each step reads the parameters of its own groups, in the precision of the files, and takes
products in portions. The price is that every step reads: a pass over the groups reads each tensor about once
for each group on it.
"""

from __future__ import annotations

import ctypes
import fnmatch
import logging
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from permgraph.assignment.solve import Solver
from permgraph.errors import MismatchError, NonFiniteError, PermgraphError
from permgraph.matching.ascent.paired import paired_values
from permgraph.matching.ascent.step import Scene, choose, outer_values
from permgraph.matching.matcher import MatchResult, Outcome, Progress, Sweep
from permgraph.matching.problem.limits import Frozen, choose_limited, limits_of
from permgraph.matching.problem.moves import Move, Place, Plan
from permgraph.matching.problem.order import informed_order
from permgraph.matching.problem.renumber import Arrays, act, compose
from permgraph.matching.workers import Share, Workers
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import STATISTICS, StateDict

log = logging.getLogger(__name__)

PORTION = 1 << 22  # elements that are in working precision at a time
RETURNED = 1 << 25  # bytes that are read between two times that free memory is given back
DEPTH = 1024  # products that are summed at a time, at least: fewer, and adding them to a large matrix takes over


@dataclass(frozen=True)
class StreamedWeightMatching:
    """Weight matching that reads tensors when a step needs them, for models larger than memory.

    Give it mappings that load a tensor on access, such as `permgraph.io.open_checkpoint` returns. In memory are, at a
    time, the tensors of one parameter in both models in the precision of the files (B's twice), a portion of them in
    float32, the Gram matrices of one group, and the cache; with nested groups, one parameter in float32 as well. A run
    depends on the seed alone, not on the size of the cache.

    Args:
        max_sweeps: stop after so many passes over the groups.
        init: "barycentre" or "identity" as in `WeightMatching`, or the `Permutation` that a run which was stopped had
            reached.
        done: how many sweeps that run had made: the orders of the coming ones follow from it, so that a run that goes
            on ends where an unbroken one would.
        keep: called after each sweep with its number and the permutation, to keep for such a case.
        watch: called before each piece of work with how many pieces of the present pass are done, how many there are,
            and what comes next, in words.
        ignore: patterns of names that are permuted, but are no evidence.
        solver: for the assignments, see `assign`.
        frozen, max_moves: groups and indices that stay as `init` has them, and how many may move, as in
            `WeightMatching`; a run that goes on needs the same ones.
        cache: bytes of tensors to keep in case the next steps need them again, shared equally among the workers, each
            of which needs its own share of the tensors only.
        device: where products are taken; None leaves them where the tensors are.
        workers: the processes that match together, each of which reads its share of the parameters and gives the same
            result. Where groups are chosen pair by pair, each values its share of the pairs, from all parameters.

    Example:
        >>> spec = PermutationSpec.parse('''
        ... 0.weight  3x2  hidden .
        ... 2.weight  1x3  . hidden
        ... groups: hidden 3
        ... ''')
        >>> a = {"0.weight": torch.tensor([[1.0, 0], [0, 1], [1, 1]]), "2.weight": torch.tensor([[1.0, 2, 3]])}
        >>> b = {"0.weight": torch.tensor([[0.0, 1], [1, 1], [1, 0]]), "2.weight": torch.tensor([[2.0, 3, 1]])}
        >>> StreamedWeightMatching().match(a, b, spec).permutation.arrays["hidden"].tolist()
        [2, 0, 1]

    References:
        Ainsworth, Hayase & Srinivasa 2022, section 3.2.
    """

    max_sweeps: int = 100
    init: Permutation | Literal["identity", "barycentre"] = "barycentre"
    done: int = 0
    keep: Callable[[int, Permutation], object] | None = field(default=None, compare=False)
    watch: Callable[[int, int, str], object] | None = field(default=None, compare=False)
    ignore: Sequence[str] = STATISTICS
    solver: Solver = "auto"
    cache: int = 1 << 29
    device: torch.device | str | None = None
    workers: Workers | None = field(default=None, compare=False)
    frozen: Frozen = ()
    max_moves: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.max_sweeps < 0 or self.cache < 0:
            raise PermgraphError(f"max_sweeps={self.max_sweeps} and cache={self.cache}: neither can be negative")
        if isinstance(self.init, str) and self.init not in ("identity", "barycentre"):
            raise PermgraphError(f"unknown init {self.init!r}; choose 'identity', 'barycentre' or a Permutation")

    def match(
        self, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int = 0, progress: Progress | None = None
    ) -> MatchResult:
        """Find the permutation of B that brings it to A.

        Args:
            a, b: state dicts that fit the spec, which may load a tensor on each access.
            spec: the group, and where it acts.
            seed: for the order of the groups.
            progress: called after each sweep.

        Raises:
            MismatchError: a tensor, or `init`, does not fit the spec.
            NonFiniteError: a weight is NaN or infinite.
        """
        started = time.perf_counter()
        if isinstance(self.init, Permutation) and self.init.spec != spec:
            raise MismatchError("init is a permutation of another spec than the one to match over")
        ascent = _Streamed(self, a, b, spec, seed, started)
        before = ascent.before
        ascent.climb(progress)
        bound = isinstance(self.init, Permutation) and (ascent.frozen or ascent.limits)  # to what the identity breaks
        if ascent.objective < before and ascent.outcome == "interrupted" and not bound:
            ascent.arrays, ascent.objective = {}, before
        elif ascent.objective < before and not bound:
            # A run that did not begin at the identity can end below it. One that does cannot.
            ascent = _Streamed(replace(self, init="identity", done=0, keep=None), a, b, spec, seed, started)
            ascent.climb(progress)
        return MatchResult(
            permutation=Permutation(spec, ascent.arrays),
            objective=ascent.objective,
            objective_before=before,
            outcome=ascent.outcome,
            history=tuple(ascent.history),
            runs=(ascent.objective,),
            seed=seed,
            seconds=time.perf_counter() - started,
            notes=()
            if ascent.plan.moves
            else ("nothing to permute: no group of the spec stands in a compared parameter",),
        )


class _Store:
    """The compared tensors of both models in their own precision, with the last ones kept within a number of bytes."""

    def __init__(self, a: StateDict, b: StateDict, spec: PermutationSpec, room: int) -> None:
        self.sides = {"A": a, "B": b}
        self.spec, self.room, self.taken, self.read = spec, room, 0, 0
        self.aliases: dict[str, list[str]] = {}
        for alias, canonical in spec.aliases.items():
            self.aliases.setdefault(canonical, []).append(alias)
        self.kept: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()

    def get(self, side: str, name: str) -> torch.Tensor:
        key = (side, name)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        state = self.sides[side]
        known = next((n for n in (name, *self.aliases.get(name, ())) if n in state), None)
        if known is None:
            raise MismatchError(f"{side} has no {name!r}, of shape {self.spec.shapes[name]}")
        tensor = state[known].detach()
        self.read += tensor.nbytes
        if self.read >= RETURNED:
            self.read = 0
            _give_back()
        self.spec.check_entry(name, tensor)
        if not tensor.dtype.is_floating_point or tensor.is_meta:
            raise MismatchError(f"{name!r} of {side} is {tensor.dtype} on {tensor.device}: there is nothing to compare")
        if tensor.dtype.itemsize == 1:  # exact, and eight-bit floats can hardly be computed with
            tensor = tensor.to(torch.bfloat16)
        if tensor.nbytes <= self.room:
            self.kept[key] = tensor
            self.taken += tensor.nbytes
            while self.taken > self.room:
                self.taken -= self.kept.popitem(last=False)[1].nbytes
        return tensor


def _give_back() -> None:
    """Have malloc give the system what is free.

    glibc keeps the room of tensors that are gone wherever something lies behind it, and hardly finds it again for
    others: twice to four times what is in use, where measured.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and need none
        if trim is not None:
            trim(0)


class _Lazy(Mapping[str, torch.Tensor]):
    """A model as `Scene` wants it, each tensor made when it is asked for."""

    def __init__(self, names: Sequence[str], load: Callable[[str], torch.Tensor]) -> None:
        self.names, self.load = names, load

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Streamed:
    """One run: the present permutation, and which moves may still raise the objective."""

    def __init__(
        self, how: StreamedWeightMatching, a: StateDict, b: StateDict, spec: PermutationSpec, seed: int, started: float
    ) -> None:
        self.how, self.spec, self.seed, self.started = how, spec, seed, started
        self.store = _Store(a, b, spec, how.cache // (how.workers.size if how.workers else 1))
        names = [
            name
            for name in spec.axes
            if any(o.group in spec.moving for o in spec.occurrences(name))
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in how.ignore)
        ]
        # The smallest first, since whoever asks for any tensor takes the first.
        self.names = sorted(names, key=lambda name: math.prod(spec.shapes[name]))
        self.frozen, self.limits = limits_of(spec, how.frozen, how.max_moves, how.init)
        self.plan = Plan(spec, names, self.frozen)
        sizes = {name: math.prod(spec.shapes[name]) for name in self.names}
        self.mine = frozenset(names) if how.workers is None else how.workers.share(sizes)
        self.arrays: Arrays = {}
        self.free: set[str] = set()
        self.work = torch.float32
        self.spread: dict[str, float] = {}
        self.objective = self.before = self._objective(check=True)
        if isinstance(how.init, Permutation):
            self.arrays = dict(how.init.arrays)
            self.objective = self._objective()
        elif how.init == "barycentre":
            self.free = {name for move in self.plan.moves for name in move.groups}
        self.sequence = informed_order(self.plan, self.spread, np.random.default_rng(seed))
        self.stale = set(range(len(self.plan.moves)))
        self.neighbours = self.plan.neighbours
        self.history: list[Sweep] = []
        self.outcome: Outcome = "sweep limit"
        self.settled = self.arrays, self.objective  # where Ctrl-C leads back to; nan where nobody has computed it

    # --- the two models -----------------------------------------------------------------------------------------------

    def _a(self, name: str) -> torch.Tensor:
        return self.store.get("A", name)

    def _b(self, name: str, arrays: Arrays) -> torch.Tensor:
        tensor = self.store.get("B", name)
        return act(self.spec, arrays, name, tensor) if arrays else tensor

    def _scene(self, move: Move, arrays: Arrays) -> Scene:
        a = _Lazy(self.names, lambda name: self._placed(self._a(name)))
        b = _Lazy(self.names, lambda name: self._placed(self._b(name, arrays)))
        return Scene(self.spec, a, b, self.free - move.groups, self.how.solver, share=self._share())

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.how.device or tensor.device, self.work)

    def _share(self) -> Share | None:
        if self.how.workers is None:
            return None
        return Share(self.how.workers, self.mine, self.work, self.how.device or "cpu")

    def _objective(self, *, check: bool = False) -> float:
        return sum(self._inners(self.names, self.arrays, check=check).values())

    def _inners(self, names: Sequence[str], arrays: Arrays, *, check: bool = False) -> dict[str, float]:
        """The inner products of some parameters, in the order given; each process makes those of its share."""

        def work() -> dict[str, float]:
            found = {}
            for done, name in enumerate(names):
                if name in self.mine:
                    self._tell(done, len(names), f"objective, {name}")
                    found[name] = self._inner(name, arrays, check=check)
            return found

        if self.how.workers is None:
            return work()
        found = self.how.workers.merge(work)
        if check:
            self.spread = self.how.workers.merge(lambda: self.spread)
            exact = self.how.workers.merge(lambda: {f"{name}": self.work is torch.float64 for name in self.mine})
            self.work = torch.float64 if any(exact.values()) else torch.float32
        return {name: found[name] for name in names}

    def _tell(self, done: int, of: int, what: str) -> None:
        if self.how.watch is not None:
            self.how.watch(done, of, what)

    def _inner(self, name: str, arrays: Arrays, *, check: bool = False) -> float:
        """The inner product of one parameter of A with B's, renumbered by `arrays`."""
        one, other = self._a(name), self._b(name, arrays)
        if check and one.dtype == other.dtype == torch.float64:
            self.work = torch.float64
        total, moments = 0.0, np.zeros((2, 2))
        portions = zip(torch.split(one.reshape(-1), PORTION), torch.split(other.reshape(-1), PORTION), strict=True)
        for x, y in portions:
            x, y = self._placed(x), self._placed(y)
            if check:
                _require_finite(x, one, name, "A")
                _require_finite(y, other, name, "B")
                moments += [[float(z.sum(dtype=torch.float64)), float(z.square().sum())] for z in (x, y)]
            total += float((x * y).sum(dtype=torch.float64))
        if check:
            mean, square = moments.T / max(1, one.numel())
            self.spread[name] = float(np.prod(np.maximum(square - mean**2, 0.0)))
        return total

    def _gain(self, step: Arrays, arrays: Arrays, parameters: Sequence[str]) -> tuple[float, float]:
        """What taking a step from `arrays` would add to the objective, and what it was on these parameters."""
        after = {**arrays, **compose(self.spec, step, arrays)}
        old = sum(self._inners(parameters, arrays).values())
        return sum(self._inners(parameters, after).values()) - old, old

    # --- the ascent ---------------------------------------------------------------------------------------------------

    def climb(self, progress: Progress | None) -> None:
        """Sweep until no move helps, or the limit, or Ctrl-C."""
        try:
            while self.stale and self.how.done + len(self.history) < self.how.max_sweeps:
                self._sweep()
                log.debug("%s", self.history[-1])
                if progress is not None:
                    progress(self.history[-1])
                if self.how.keep is not None:
                    self.how.keep(self.history[-1].number, Permutation(self.spec, self.arrays))
            if not self.stale:
                self.outcome = "converged"
        except KeyboardInterrupt:
            self.outcome = "interrupted"
            self.arrays, self.objective = self.settled
            if math.isnan(self.objective):
                self.objective = self._objective()

    def _sweep(self) -> None:
        number = self.how.done + len(self.history) + 1
        before, unknown = dict(self.arrays), bool(self.free)
        gains: dict[str, float] = {}
        for done, at in enumerate(self.sequence):
            if at in self.stale:
                move = self.plan.moves[at]
                gain = self._step(at, move, done)
                gains[move.name] = gains.get(move.name, 0.0) + gain
                # What a step seems to gain while groups are unknown is not what it gains.
                self.objective = math.nan if unknown else self.objective + gain
                self.settled = self.arrays, self.objective
        if unknown:
            self.objective = self._objective()
            self.settled = self.arrays, self.objective
        moved = {name: _differing(now, before.get(name)) for name, now in self.arrays.items()}
        self.history.append(
            Sweep(
                number,
                self.objective,
                {name: count for name, count in moved.items() if count},
                {} if unknown else {name: gain for name, gain in gains.items() if gain},
                time.perf_counter() - self.started,
            )
        )

    def _step(self, at: int, move: Move, done: int) -> float:
        """Take one move if it raises the objective; what it gained."""
        self._tell(done, len(self.plan.moves), f"Gram matrices, {move.name}")
        if move.paired:
            step, gain = self._paired(move)
        elif len(move.groups) == 1 and not move.bent:
            gram = self._gram(move)
            self._tell(done, len(self.plan.moves), f"assignment, {move.name}")
            columns, gain = self._choose(gram, move)
            step = {move.name: columns} if _differing(columns, None) else {}
        else:
            worth = outer_values(self._scene(move, self.arrays), move.root)
            step, gain = self._nested(move, worth)
        if self.how.workers is not None:
            step, gain = self.how.workers.agree((step, gain))
        self.stale.discard(at)
        self.free -= move.groups
        if not step:
            return 0.0
        self.arrays = {**self.arrays, **compose(self.spec, step, self.arrays)}
        self.stale |= self.neighbours[at]
        if move.bent or move.paired:
            self.stale.add(at)
        return gain

    def _gram(self, move: Move) -> torch.Tensor:
        """The Gram matrix of a move of one group, one parameter at a time and in portions."""
        total: torch.Tensor | None = None
        free = self.free - move.groups
        places: dict[str, list[Place]] = {}
        for place in move.root.places:
            places.setdefault(place.block.parameter, []).append(place)
        for name in move.parameters:
            if name in places and name in self.mine:
                total = self._gram_in(name, places[name], free, total)
        share = self._share()
        if share is not None:
            batch = [self.spec.groups[name].size for name in move.root.batch]
            size = self.spec.groups[move.name].size
            return share.sum(total, (*batch, size, size))
        assert total is not None, f"{move.name} stands nowhere"
        return total

    def _gram_in(self, name: str, places: Sequence[Place], free: set[str], total: torch.Tensor | None) -> torch.Tensor:
        """What one parameter adds to a Gram matrix; apart, so that its tensors go before the next ones come."""
        one, other = self._a(name), self._b(name, self.arrays)
        for place in places:
            for a, b in _portions(place, place.block.view(one), place.block.view(other), free):
                total = place.gram(self._placed(a), self._placed(b), free, total)
        assert total is not None
        return total

    def _choose(self, worth: torch.Tensor, move: Move) -> tuple[np.ndarray, float]:
        return choose_limited(worth, self.how.solver, move.name, self.limits, self.arrays)

    def _nested(self, move: Move, worth: torch.Tensor) -> tuple[Arrays, float]:
        """The step of a root and what is inside it, with more and more weight on staying until the objective rises."""
        if self.free:
            columns, gain = self._choose(worth, move)
            return self._follow(move, columns, self.arrays), gain
        diagonal = worth.diagonal(dim1=-2, dim2=-1)
        pull = 0.0
        for _ in range(8 if move.bent else 1):
            columns, promised = self._choose(worth, move)
            step = self._follow(move, columns, self.arrays)
            if not step:
                break
            gain, old = self._gain(step, self.arrays, move.parameters)
            if gain > 16 * torch.finfo(worth.dtype).eps * abs(old):
                return step, gain
            pull = 2 * pull if pull else 0.5 * promised / max(1, _differing(columns, None))
            diagonal += pull
        return {}, 0.0

    def _follow(self, move: Move, columns: np.ndarray, arrays: Arrays) -> Arrays:
        """The step that renumbers the root so, and then chooses the best inside it."""
        step: Arrays = {move.name: columns} if _differing(columns, None) else {}
        for inner in move.then:
            here = {**arrays, **compose(self.spec, step, arrays)}
            chosen, _ = choose(outer_values(self._scene(move, here), inner.root), self.how.solver, inner.name)
            step = {**step, **compose(self.spec, self._follow(inner, chosen, here), step)}
        return step

    def _paired(self, move: Move) -> tuple[Arrays, float]:
        """The step of a root and of what each of its pairs has chosen inside."""
        blocks = tuple(self.plan.standing[move.name])
        worth, inside = paired_values(self._scene(move, self.arrays), move, blocks)
        columns, _ = self._choose(worth, move)
        step: Arrays = {move.name: columns}
        for name, chosen in inside.items():
            step[name] = np.take_along_axis(chosen, columns[..., None, None], axis=-2)[..., 0, :]
        step = {name: array for name, array in step.items() if _differing(array, None)}
        if not step:
            return {}, 0.0
        gain, old = self._gain(step, self.arrays, move.parameters)
        if gain > 16 * torch.finfo(worth.dtype).eps * abs(old) or self.free:
            return step, gain
        return {}, 0.0


def _portions(
    place: Place, a: torch.Tensor, b: torch.Tensor, free: set[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same part of both blocks at a time, along an axis over which products are summed."""
    leaves = place.block.leaves
    summed = [
        axis
        for axis in range(len(leaves))
        if axis not in place.own and axis not in place.batch and leaves[axis].group not in free
    ]
    longest = max(summed, key=lambda axis: a.shape[axis], default=None)
    size = max(PORTION, DEPTH * math.prod(a.shape[axis] for axis in (*place.batch, *place.own)))
    if longest is None or a.numel() <= size:
        yield a, b
        return
    length = max(1, a.shape[longest] * size // a.numel())
    yield from zip(torch.split(a, length, longest), torch.split(b, length, longest), strict=True)


def _require_finite(portion: torch.Tensor, whole: torch.Tensor, name: str, model: str) -> None:
    # A finite sum needs one pass and no second tensor; only a sum that is not finite is worth looking into.
    if not bool(torch.isfinite(portion.sum())) and not bool(torch.isfinite(portion).all()):
        bad = int((~torch.isfinite(whole)).sum())
        raise NonFiniteError(
            f"{name!r} of {model} holds NaN or infinity in {bad} of its {whole.numel()} elements; "
            f"repair it, or name it in ignore="
        )


def _differing(now: np.ndarray, before: np.ndarray | None) -> int:
    return int((now != (np.arange(now.shape[-1]) if before is None else before)).sum())
