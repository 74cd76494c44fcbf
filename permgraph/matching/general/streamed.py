"""Weight matching over the whole group of a general spec, with tensors read when a step needs them.

`match_general` holds both models without their gains and balanced, and B as it stands. Here nothing is kept but the
gains, what balances each model, the element that stands between them, and a cache of bounded size: each step reads the
parameters of its own group, takes the gains out, balances, lets the element act, and adds to a Gram matrix. Large
parameters are seen in pieces along a dimension on which nothing acts, such as a vocabulary.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching import tuned
from permgraph.matching.general.acting import Element, composed
from permgraph.matching.general.ascent import Climb, State
from permgraph.matching.general.balancing import COARSE, balance_read
from permgraph.matching.general.gauge import SMALL, between, compact_part, evidence, notes_on_gains
from permgraph.matching.general.pieces import acting_on, in_pieces
from permgraph.matching.general.standing import Step
from permgraph.matching.general.weights import as_transformation, frozen_groups, tolerance_of
from permgraph.matching.matcher import NOTHING_TO_PERMUTE, MatchResult, Progress, Sweep
from permgraph.matching.problem.moves import Move, Plan
from permgraph.matching.problem.objective import ADVICE, dot
from permgraph.matching.streamed import LoadedOnAccess, Store
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict, require_finite

if TYPE_CHECKING:
    from permgraph.matching.streamed import StreamedWeightMatching

ONE_START = (
    "streamed, so that one ascent was made, where in memory the best of several is kept: what the permutations alone "
    "reach is another start, init="
)


def match_streamed(
    settings: StreamedWeightMatching,
    a: StateDict,
    b: StateDict,
    spec: PermutationSpec,
    seed: int,
    progress: Progress | None,
) -> MatchResult:
    """The element of a general spec that `StreamedWeightMatching` with these settings chooses for B."""
    started = time.perf_counter()
    if settings.workers is not None:
        raise PermgraphError("several processes match over permutations alone: take spec.permutations(), or no workers")
    frozen = frozen_groups(spec, settings)
    gauge = StreamedGauge(settings, a, b, spec)
    plan = Plan(gauge.acting.plain, gauge.pieces, frozen)
    gauge.tell(0, len(plan.moves), "objective")
    before = gauge.inner(gauge.pieces)

    def climb(start: Element, unknown: Sequence[str] = ()) -> StreamedClimb:
        return StreamedClimb(gauge, plan, start, unknown, None if start.groups() else before, settings, started)

    init, unknown = settings.init, [name for name in gauge.acting.of_group if name not in frozen]
    if isinstance(init, (Permutation, Transformation)):
        run = climb(gauge.start(init, reached=settings.done > 0))
    else:
        run = climb(Element(), unknown if init == "barycentre" else ())
    run.climb(settings.max_sweeps, progress, done=settings.done)
    runs = [run.objective]
    outcome = run.outcome
    bound = isinstance(init, (Permutation, Transformation)) and bool(frozen)  # to what the identity breaks
    if run.objective < before and not bound:
        run = climb(Element())
        if outcome != "interrupted":
            # A run that did not begin at the identity can end below it. One that does cannot.
            run.keep = None
            run.climb(settings.max_sweeps, progress)
            runs.append(run.objective)
            outcome = run.outcome
    found = gauge.transformation(run.element)
    notes = [NOTHING_TO_PERMUTE] if not plan.moves else [ONE_START + "the permutation"] if init == "barycentre" else []
    notes += notes_on_gains(spec)
    if gauge.readings > 1:
        notes.append(
            f"scales or invertible maps that meet in one weight are balanced to {COARSE:g}, for which it was read "
            f"{gauge.readings} times"
        )
    return MatchResult(
        permutation=found.permutation,
        transformation=found,
        objective=run.objective,
        objective_before=before,
        outcome=outcome,
        history=tuple(run.history),
        runs=tuple(runs),
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


class StreamedGauge:
    """A and B as `Gauge` writes them, a piece at a time; both are read once beforehand, to check them.

    Attributes:
        acting: how the groups act on the pieces of the parameters that count.
        pieces: these.
        dtype: of the products: as `match_general` chooses it.
        into: for each model what balances it.
        gains: for each model its gains, and `factors` what they multiply with.
        readings: how often weights were read in order to balance.

    Raises:
        MismatchError: a tensor is not floating point or has no data, or a gain has a zero.
        NonFiniteError: a tensor holds NaN or infinity.
    """

    def __init__(self, settings: StreamedWeightMatching, a: StateDict, b: StateDict, spec: PermutationSpec) -> None:
        self.settings, self.spec = settings, spec
        self.store = Store(a, b, spec, settings.cache)
        self.held: dict[str, tuple[str, Tensor]] = {}
        names = evidence(spec, settings.ignore)
        self.dtype = torch.float64 if sum(math.prod(spec.shapes[n]) for n in names) <= SMALL else torch.float32
        complex_ones = [name for at, name in enumerate(names) if self._checked(name, at, len(names))]
        self.device = torch.device(settings.device or (self._raw("A", names[-1]).device if names else "cpu"))
        self.pieces = in_pieces(spec, names)
        self.acting = acting_on(spec, self.pieces, complex_ones)
        wanted = [*spec.general_gains, *(name for name in self.acting.spec.axes if name not in self.pieces)]
        self.gains = {side: {name: self.store.get(side, name) for name in wanted} for side in "AB"}
        self.factors = {
            side: {n: gain.values(self.gains[side][n], side).cpu().numpy() for n, gain in spec.general_gains.items()}
            for side in "AB"
        }
        self.into = {side: Element() for side in "AB"}
        self.readings = 1
        for side in "AB":
            self.tell(0, 1, f"balancing {side}")
            self.into[side], readings = balance_read(self.acting, functools.partial(self._without_gains, side))
            self.readings = max(self.readings, readings)
        self._balances = {side: element.to(self.dtype) for side, element in self.into.items()}
        self.stand(Element())

    def tell(self, done: int, of: int, what: str) -> None:
        """Say what comes next."""
        if self.settings.watch is not None:
            self.settings.watch(done, of, what)

    def _checked(self, name: str, at: int, of: int) -> bool:
        """Whether a parameter, which must be finite, is complex."""
        self.tell(at, of, f"checking {name}")
        for side in "AB":
            tensor = self._raw(side, name)
            for part in torch.split(tensor.reshape(-1), tuned.STREAMED_PORTION):
                require_finite(part, name, side, ADVICE, tensor)
        if self._raw("A", name).ndim != self._raw("B", name).ndim:
            raise MismatchError(f"{name!r} is complex in one of the models only")
        return self._raw("A", name).ndim > len(self.spec.shapes[name])

    # --- reading ------------------------------------------------------------------------------------------------------

    def _raw(self, side: str, name: str) -> Tensor:
        """A parameter as it is, which stays at hand until another one of the model is asked for."""
        if self.held.get(side, ("",))[0] != name:
            self.held.pop(side, None)
            self.held[side] = name, self.store.get(side, name)
        return self.held[side][1]

    def _without_gains(self, side: str, key: str) -> Tensor:
        piece = self.pieces[key]
        raw = piece.of(self._raw(side, piece.parameter))
        tensor = raw.to(self.device, self.dtype).contiguous()
        return self.acting.folded(key, tensor, self.gains[side])

    def a(self, key: str) -> Tensor:
        """A piece of A in the gauge."""
        return self.acting.act(key, self._without_gains("A", key), self._balances["A"])

    def b(self, key: str) -> Tensor:
        """A piece of B in the gauge, where the element has brought it."""
        return self.acting.act(key, self._without_gains("B", key), self._moved, self._inverses)

    def inner(self, keys: Iterable[str]) -> float:
        """The sum of the inner products of some pieces of A with B's where they stand."""
        return sum(dot(self.a(key), self.b(key)) for key in keys)

    # --- elements -----------------------------------------------------------------------------------------------------

    def stand(self, element: Element) -> None:
        """Have B stand where an element, in float64, takes it."""
        moved = composed(self.acting, element, self.into["B"])
        self._moved = moved.to(self.dtype)
        inverses = self.acting.inverse_transposes(moved.matrices)
        self._inverses = {group: inverse.to(self.dtype) for group, inverse in inverses.items()}

    def start(self, init: Permutation | Transformation, *, reached: bool) -> Element:
        """Where a run begins.

        Args:
            init: an element from B's state dict to A's, of which the compact part is taken.
            reached: it is rather what another run has kept: one between the two in this gauge.
        """
        if isinstance(init, Permutation):
            init = as_transformation(init, self.spec)
        if not reached:
            into, out = (self.into[side].transformation(self.spec) for side in "BA")
            init = out @ init @ into.inverse()
        element = Element.of(init, self.device, torch.float64)
        return element if reached else compact_part(self.acting, element)

    def transformation(self, element: Element) -> Transformation:
        """What brings B's state dict to A's."""
        ends = {side: (self.into[side], self.factors[side]) for side in "AB"}
        return between(ends["B"], element.transformation(self.spec), ends["A"])


class StreamedClimb(Climb):
    """An ascent that reads what each step needs, and keeps nothing but the element, in float64.

    What a step adds to the objective is known from its Gram matrices, so that nothing is read for it again.

    Attributes:
        settled: where Ctrl-C leads back to, and the objective there.
        keep: told the number of each sweep but the last, and the element that it reached between both models in their
            gauge.
    """

    keeps_few = True

    def __init__(
        self,
        gauge: StreamedGauge,
        plan: Plan,
        start: Element,
        unknown: Collection[str],
        objective: float | None,
        settings: StreamedWeightMatching,
        started: float,
    ) -> None:
        self.gauge = gauge
        self.keep: Callable[[int, Transformation], object] | None = settings.keep
        a, b = LoadedOnAccess(gauge.pieces, gauge.a), LoadedOnAccess(gauge.pieces, gauge.b)
        super().__init__(
            gauge.acting, a, b, plan, start, unknown=unknown, solver=settings.solver, started=started,
            tolerance=tolerance_of(sum(math.prod(gauge.acting.spec.shapes[key]) for key in gauge.pieces)),
        )  # fmt: skip
        self._total = objective
        self.settled = start, self.objective

    def _begin(self, b: Mapping[str, Tensor]) -> None:
        self.b = b
        self.gauge.stand(self.element)

    def climb(self, max_sweeps: int, progress: Progress | None = None, tolerance: float = 0.0, done: int = 0) -> None:
        """Sweep over the moves until a whole sweep adds nothing; Ctrl-C leads back to the last step that is whole."""
        super().climb(max_sweeps, progress, tolerance, done)
        if self.outcome == "interrupted":
            self.element, self._total = self.settled
            self.gauge.stand(self.element)

    def _end_sweep(self, sweep: Sweep, last: bool) -> None:
        self.settled = self.element, sweep.objective
        self._forget()  # as a run that goes on from here knows nothing
        # A run that went on from after the last sweep would make one more.
        if self.keep is not None and not last:
            self.keep(sweep.number, self.element.transformation(self.gauge.spec))

    def _stand(self, element: Element, step: Step) -> None:
        self.element = element
        self.gauge.stand(element)

    def _go_back(self, kept: State) -> None:
        super()._go_back(kept)
        self.gauge.stand(self.element)

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, move: Move) -> bool:
        """Move the groups of one move to where they are worth most; false if that helps nothing."""
        self.gauge.tell(
            self.moves.index(move) if move in self.moves else 0, len(self.moves), f"Gram matrices, {move.name}"
        )
        known = not self.unknown
        moved = super().step(move)
        if moved and known and not self._is_ahead:
            self.settled = self.element, self.objective
        return moved

    def _gain_of(self, move: Move, hold: float) -> float:
        return self._paired(move) if move.paired else super()._gain_of(move, hold)

    def _paired(self, move: Move) -> float:
        """Where groups are chosen pair by pair, each pair by an ascent of its own: with their parameters in memory."""
        names = self.acting.touched([move.name])
        a, b = ({name: tensors[name] for name in names} for tensors in (self.a, self.b))
        local = Climb(self.acting, a, b, self.plan, Element(), unknown=self.unknown, solver=self.solver)
        before = local.objective
        if not local.step(move):
            return 0.0
        found = local.element.to(torch.float64)
        for group in found.groups():
            self._move_grams(Step(group, found, {}))
        self._stand(composed(self.acting, found, self.element), Step(None, found, {}))
        return local.objective - before

    def _as_exact(self, gram: Tensor) -> Tensor:
        return gram.double()
