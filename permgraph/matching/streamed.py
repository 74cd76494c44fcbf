"""Weight matching for models that do not fit in memory: the same ascent, with tensors read when a step needs them.

`WeightMatching` keeps both models in float32, and Gram matrices between steps. Here nothing is kept but the permutation
and a cache of bounded size: each step reads the parameters of its own groups, in the precision of the files, and takes
products in portions. The price is that every step reads: a pass over the groups reads each tensor about once
for each group on it.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from permgraph.assignment.solve import Solver
from permgraph.conventions.choices import require_choice
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import tuned
from permgraph.matching.ascent.climb import Climb, Trial, differing
from permgraph.matching.ascent.step import Scene
from permgraph.matching.matcher import NOTHING_TO_PERMUTE, Matcher, MatchResult, Progress
from permgraph.matching.problem.limits import Frozen, limits_of
from permgraph.matching.problem.moves import Move, Place, Plan
from permgraph.matching.problem.objective import ADVICE, comparable, compared_names, with_real_parts
from permgraph.matching.problem.order import informed_order
from permgraph.matching.problem.renumber import Arrays, act
from permgraph.matching.threads import on_free_cores
from permgraph.matching.workers import Share, Workers
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import STATISTICS, StateDict, require_finite


@dataclass(frozen=True)
class StreamedWeightMatching(Matcher):
    """Weight matching that reads tensors when a step needs them, for models larger than memory.

    Give it mappings that load a tensor on access, such as `permgraph.io.open_checkpoint` returns. In memory are, at a
    time, the tensors of one parameter in both models in the precision of the files (B's twice), a portion of them in
    float32, the Gram matrices of one group, and the cache; with nested groups, one parameter in float32 as well. A run
    depends on the seed alone, not on the size of the cache.

    Of a spec with general symmetries the whole group is matched: each step takes the gains out of what it reads,
    balances it, and lets the element that stands act on it. In memory are beside the tensors at work the element, in
    float64, with a matrix of n² numbers for a stream of n (two models' balance, and while the result is put together
    eight times as much), and a step's Gram matrices, in one piece; where groups are chosen pair by pair, as queries of
    grouped heads are, all parameters of that step. One ascent is made, where `WeightMatching` keeps the best of
    several; where scales or invertible maps meet in one weight, as in networks of ReLU alone, they are balanced more
    coarsely. Notes say so. Else a run ends where one of `WeightMatching` from the same start does, but for rounding.

    Args:
        max_sweeps: stop after so many passes over the groups.
        init: "barycentre" or "identity" as in `WeightMatching`, or a `Permutation`, or of general symmetries a
            `Transformation`: where to begin, or what `keep` was given by a run which was stopped.
        done: how many sweeps that run had made: the orders of the coming ones follow from it, so that a run that goes
            on ends where an unbroken one would.
        keep: called after each sweep with its number and the permutation, to keep for such a case. Of general
            symmetries, after each but the last, with a `Transformation` between the models as they are compared,
            without gains and balanced: `init` of a run with `done`, and not to be applied to state dicts.
        watch: called before each piece of work with how many pieces of the present pass are done, how many there are,
            and what comes next, in words.
        ignore: patterns of names that are permuted, but are no evidence.
        solver: for the assignments, see `assign`.
        frozen, max_moves: groups and indices that stay as `init` has them, and how many may move, as in
            `WeightMatching`; a run that goes on needs the same ones.
        cache: bytes of tensors to keep in case the next steps need them again, shared equally among the workers, each
            of which needs its own share of the tensors only.
        device: where products are taken; None leaves them where the tensors are.
        workers: over permutations alone, the processes that match together, each of which reads its share of the
            parameters and gives the same result. Where groups are chosen pair by pair, each values its share of the
            pairs, from all parameters.

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

    general: ClassVar[bool] = True

    max_sweeps: int = 100
    init: Permutation | Transformation | Literal["identity", "barycentre"] = "barycentre"
    done: int = 0
    keep: Callable[[int, Any], object] | None = field(default=None, compare=False)
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
        require_choice("init", self.init, "identity", "barycentre", or_a="Permutation")

    @on_free_cores
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
        self.require_fit(spec)
        if spec.general is not None:
            from permgraph.matching.general.streamed import match_streamed

            return match_streamed(self, a, b, spec, seed, progress)
        models = _Models(self, a, b, spec)
        climb = StreamedClimb(self, models, seed, started)
        climb.climb(progress)
        bound = isinstance(self.init, Permutation) and (models.frozen or models.limits)  # to what the identity breaks
        if climb.objective < models.before and climb.outcome == "interrupted" and not bound:
            climb.settled = {}, models.before
        elif climb.objective < models.before and not bound:
            # A run that did not begin at the identity can end below it. One that does cannot.
            climb = StreamedClimb(replace(self, init="identity", done=0, keep=None), models, seed, started)
            climb.climb(progress)
        arrays, objective = climb.settled
        return MatchResult(
            permutation=Permutation(spec, arrays),
            objective=objective,
            objective_before=models.before,
            outcome=climb.outcome,
            history=tuple(climb.history),
            runs=(objective,),
            seed=seed,
            seconds=time.perf_counter() - started,
            notes=() if climb.plan.moves else (NOTHING_TO_PERMUTE,),
        )


class Store:
    """The compared tensors of both models in their own precision, with the last ones kept within a number of bytes."""

    def __init__(self, a: StateDict, b: StateDict, spec: PermutationSpec, cache: int) -> None:
        self.sides = {"A": a, "B": b}
        self.spec, self.cache, self.taken, self.read = spec, cache, 0, 0
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
        tensor = state[known]
        self.read += tensor.nbytes
        if self.read >= tuned.RETURNED:
            self.read = 0
            return_free_memory()
        self.spec.check_entry(name, tensor)
        tensor = comparable(tensor, name, side)
        if tensor.dtype.itemsize == 1:  # exact, and eight-bit floats can hardly be computed with
            tensor = tensor.to(torch.bfloat16)
        if tensor.nbytes <= self.cache:
            self.kept[key] = tensor
            self.taken += tensor.nbytes
            while self.taken > self.cache:
                self.taken -= self.kept.popitem(last=False)[1].nbytes
        return tensor


def return_free_memory() -> None:
    """Have malloc give the system what is free.

    glibc keeps the room of tensors that are gone wherever something lies behind it, and hardly finds it again for
    others: twice to four times what is in use, where measured.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and need none
        if trim is not None:
            trim(0)


class LoadedOnAccess(Mapping[str, torch.Tensor]):
    """A model whose tensors are made when they are asked for."""

    def __init__(self, names: Iterable[str], load: Callable[[str], torch.Tensor]) -> None:
        self.names, self.load = dict.fromkeys(names), load

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.load(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Models:
    """Both models: read whole once, to check them and to learn what the ascent must know beforehand.

    Attributes:
        names: the compared parameters, the smallest first, since whoever asks for any tensor takes the first.
        mine: those that this process reads.
        given, spec: the spec, and with one more axis for each complex parameter.
        dtype: of the products: float64 where some parameter is in both models, else float32.
        spread: for each parameter, the variance of its elements in A times that in B.
        before: the objective of B as it is.
    """

    def __init__(self, settings: StreamedWeightMatching, a: StateDict, b: StateDict, spec: PermutationSpec) -> None:
        self.settings, self.given, self.spec, self.workers = settings, spec, spec, settings.workers
        self.frozen, self.limits = limits_of(spec, settings.frozen, settings.max_moves, settings.init)
        self.store = Store(a, b, spec, settings.cache // (self.workers.size if self.workers else 1))
        self.compared = compared_names(spec, settings.ignore)
        self.names = sorted(self.compared, key=lambda name: math.prod(spec.shapes[name]))
        sizes = {name: math.prod(spec.shapes[name]) for name in self.names}
        self.mine = frozenset(self.names) if self.workers is None else self.workers.share(sizes)
        self.dtype = torch.float32
        self.spread: dict[str, float] = {}
        self._complex: set[str] = set()
        inner = self.inners(self.names, self._checked)
        self.spread = self._of_all(self.spread)
        exact = self._of_all({name: True for name in self.mine if self.dtype is torch.float64})
        self.dtype = torch.float64 if exact else torch.float32
        self.spec = with_real_parts(spec, sorted(self._of_all(dict.fromkeys(self._complex))))
        self.before = sum(inner.values())

    def _of_all(self, mine: Mapping[str, float | bool | None]) -> dict[str, float]:
        return dict(mine) if self.workers is None else self.workers.merge(lambda: mine)  # type: ignore[arg-type]

    def inners(self, names: Sequence[str], inner: Callable[[str], float]) -> dict[str, float]:
        """The inner products of some parameters, in the order given; each process makes those of its share."""

        def work() -> dict[str, float]:
            made = {}
            for done, name in enumerate(names):
                if name in self.mine:
                    self.tell(done, len(names), f"objective, {name}")
                    made[name] = inner(name)
            return made

        made = work() if self.workers is None else self.workers.merge(work)
        return {name: made[name] for name in names}

    def tell(self, done: int, of: int, what: str) -> None:
        if self.settings.watch is not None:
            self.settings.watch(done, of, what)

    def a(self, name: str) -> torch.Tensor:
        return self.store.get("A", name)

    def b(self, name: str, arrays: Arrays) -> torch.Tensor:
        tensor = self.store.get("B", name)
        return act(self.spec, arrays, name, tensor) if arrays else tensor

    def placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor where products are taken, and in their dtype."""
        return tensor.to(self.settings.device or tensor.device, self.dtype)

    def inner(self, name: str, arrays: Arrays) -> float:
        """The inner product of one parameter of A with B's, renumbered by `arrays`."""
        return sum(float((x * y).sum(dtype=torch.float64)) for x, y in self._parts(self.a(name), self.b(name, arrays)))

    def _checked(self, name: str) -> float:
        """`inner` of B as it is; what else there is to know of the parameter is noted."""
        a, b = self.a(name), self.b(name, {})
        if a.ndim != b.ndim:
            raise MismatchError(f"{name!r} is complex in one of the models only")
        if a.ndim > len(self.spec.shapes[name]):
            self._complex.add(name)
        if a.dtype == b.dtype == torch.float64:
            self.dtype = torch.float64
        total, moments = 0.0, np.zeros((2, 2))
        for x, y in self._parts(a, b):
            require_finite(x, name, "A", ADVICE, a)
            require_finite(y, name, "B", ADVICE, b)
            moments += [[float(z.sum(dtype=torch.float64)), float(z.square().sum())] for z in (x, y)]
            total += float((x * y).sum(dtype=torch.float64))
        mean, square = moments.T / max(1, a.numel())
        self.spread[name] = float(np.prod(np.maximum(square - mean**2, 0.0)))
        return total

    def _parts(self, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Both tensors a portion at a time, in working precision."""
        both = (torch.split(tensor.reshape(-1), tuned.STREAMED_PORTION) for tensor in (a, b))
        for x, y in zip(*both, strict=True):
            yield self.placed(x), self.placed(y)


class StreamedClimb(Climb):
    """A run that reads what each step needs, and keeps nothing but where the groups stand."""

    def __init__(self, settings: StreamedWeightMatching, models: _Models, seed: int, started: float) -> None:
        plan = Plan(models.spec, models.compared, models.frozen)
        super().__init__(plan, settings.solver, models.limits, settings.max_sweeps, started, settings.done)
        self.settings, self.models, self.workers = settings, models, settings.workers
        self.share: Share | None = None
        if self.workers is not None:
            self.share = Share(self.workers, models.mine, models.dtype, settings.device or "cpu")
        self._arrays: Arrays = {}
        self.objective = models.before
        if isinstance(settings.init, Permutation):
            self._arrays = dict(settings.init.arrays)
            self.objective = self.computed_objective()
        elif settings.init == "barycentre":
            self.free = {name for move in plan.moves for name in move.groups}
        self.sequence = informed_order(plan, models.spread, np.random.default_rng(seed))
        self.settled = self.arrays, self.objective
        """Where Ctrl-C leads back to, and the objective there; NaN where nobody has computed it."""

    def climb(self, progress: Progress | None = None) -> None:
        """Sweep until no move helps, or the limit, or Ctrl-C."""
        try:
            super().climb(progress)
        except KeyboardInterrupt:
            self.outcome = "interrupted"
            self._arrays, self.objective = self.settled
            if math.isnan(self.objective):
                self.objective = self.computed_objective()
            self.settled = self.arrays, self.objective

    def end_sweep(self) -> None:
        if self.settings.keep is not None:
            self.settings.keep(self.history[-1].number, Permutation(self.models.given, self.arrays))

    def note_progress(self) -> None:
        self.settled = self.arrays, self.objective

    @property
    def arrays(self) -> Arrays:
        return self._arrays

    def order(self) -> Iterable[int]:
        return self.sequence

    def take(self, numbers: Sequence[int]) -> Iterator[tuple[int, float]]:
        for number in numbers:
            yield number, self.step(number)

    def scene(self, move: Move, trial: Trial) -> Scene:
        models, arrays = self.models, self.arrays_after(trial)
        a = LoadedOnAccess(models.names, lambda name: models.placed(models.a(name)))
        b = LoadedOnAccess(models.names, lambda name: models.placed(models.b(name, arrays)))
        return Scene(self.spec, a, b, self.free - move.groups, self.solver, share=self.share)

    def after(self, trial: Trial, move: Move, step: Arrays) -> Trial:
        return Trial(self.extended(trial, step))

    def gain(self, trial: Trial, move: Move) -> tuple[float, float]:
        now, then = (self._inner_sum(move.parameters, arrays) for arrays in (self.arrays, self.arrays_after(trial)))
        return then - now, now

    def computed_objective(self) -> float:
        return self._inner_sum(self.models.names, self.arrays)

    def _inner_sum(self, names: Sequence[str], arrays: Arrays) -> float:
        return sum(self.models.inners(names, lambda name: self.models.inner(name, arrays)).values())

    def apply(self, number: int, trial: Trial) -> None:
        self._arrays = self.arrays_after(trial)

    def agree(self, trial: Trial, gain: float) -> tuple[Trial, float]:
        if self.workers is None:
            return trial, gain
        step, gain = self.workers.agree((trial.step, gain))
        return Trial(step), gain

    def best(self, move: Move, known: bool) -> tuple[Trial, float]:
        of = len(self.plan.moves)
        self.models.tell(self.turns, of, f"Gram matrices, {move.name}")
        if len(move.groups) > 1 or move.quadratic:
            return super().best(move, known)
        gram = self._gram(move)
        self.models.tell(self.turns, of, f"assignment, {move.name}")
        columns, gain = self.choose(gram, move)
        return Trial({move.name: columns} if differing(columns) else {}), gain

    def _gram(self, move: Move) -> torch.Tensor:
        """The Gram matrix of a move of one group, one parameter at a time and in portions."""
        total: torch.Tensor | None = None
        free = self.free - move.groups
        places: dict[str, list[Place]] = {}
        for place in move.root.places:
            places.setdefault(place.block.parameter, []).append(place)
        for name in move.parameters:
            if name in places and name in self.models.mine:
                total = self._gram_in(name, places[name], free, total)
        if self.share is not None:
            batch = [self.spec.groups[name].size for name in move.root.batch]
            size = self.spec.groups[move.name].size
            return self.share.sum(total, (*batch, size, size))
        assert total is not None, f"{move.name} stands nowhere"
        return total

    def _gram_in(self, name: str, places: Sequence[Place], free: set[str], total: torch.Tensor | None) -> torch.Tensor:
        """What one parameter adds to a Gram matrix; apart, so that its tensors go before the next ones come."""
        whole_a, whole_b = self.models.a(name), self.models.b(name, self.arrays)
        for place in places:
            for a, b in _portions(place, place.block.view(whole_a), place.block.view(whole_b), free):
                total = place.gram(self.models.placed(a), self.models.placed(b), free, total)
        assert total is not None
        return total


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
    gram = math.prod(a.shape[axis] for axis in (*place.batch, *place.own))
    size = max(tuned.STREAMED_PORTION, tuned.STREAMED_DEPTH * gram)
    if longest is None or a.numel() <= size:
        yield a, b
        return
    length = max(1, a.shape[longest] * size // a.numel())
    yield from zip(torch.split(a, length, longest), torch.split(b, length, longest), strict=True)
