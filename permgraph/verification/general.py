"""The proof of a spec with general symmetries: random elements keep the function, and nothing larger does.

Random weights and float64 are as for permutations, see `permgraph.verification.model`, and so is the first control: a
group that acts on all of its axes but one must change the output. The second one asks whether a structure could be
larger. Near the identity a larger one would be a direction in which the weights can move, index by index, without any
effect: so the output is differentiated along what single indices of each axis can do (index i is scaled; index j is
added to index i), and the combinations without effect are counted. There are as many as the structure says, or else it
is not the largest. Signs have no directions; where a group stands in few places, all their combinations are tried.

`FurtherRuns` then repeats the move, null directions included, on other inputs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from permgraph.capture.passes import Variation
from permgraph.capture.subject import unwrap
from permgraph.errors import CaptureError
from permgraph.spec.binding import Occurrence
from permgraph.spec.general import Action, NullDirection
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation, Where
from permgraph.verification.directions import NEGLIGIBLE, Index, free_combinations
from permgraph.verification.further import LEAST_SECONDS, FurtherRuns
from permgraph.verification.report import Control, GroupReport, Run, Verification
from permgraph.verification.trial import Trial, distance, is_floating, seeded_generator

SCALES = (1.0, 0.7, 0.5, 0.3, 0.05)
STEP = 1e-5
MAX_SIGNS = 7
ENOUGH = 3
"""So many outputs for each direction are needed to tell that some combination has no effect."""
TRIES = 5
"""So many indices are tried before a direction counts as free."""


@dataclass(frozen=True, repr=False)
class GeneralVerification(Verification):
    """What `verify` says of a spec with general symmetries.

    Besides what `Verification` has, `beyond` says for each group whose structure could be larger in what way, and
    `inert` names the places that can be scaled without influence on the output, such as the keys' bias under a softmax.
    Neither makes a verification fail: what is claimed holds. `null_errors` says for each null direction how far the
    output moves when a random multiple of it is added, which must be within the tolerance.
    """

    beyond: Mapping[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    null_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def maximal(self) -> bool:
        """Whether no larger structure was found for any group that was looked at."""
        return not self.beyond

    def __str__(self) -> str:
        lines = [super().__str__()]
        lines += [f"  {name}: {what}" for name, what in self.beyond.items()]
        wrong = [what for what, error in self.null_errors.items() if not error <= self.tolerance]
        lines += [f"  no null direction: {what}" for what in wrong]
        if self.inert:
            lines.append(f"  without influence: {', '.join(self.inert)}")
        return "\n".join(lines)


def verify_general(
    model: nn.Module,
    spec: PermutationSpec,
    first: Variation,
    seed: int,
    tolerance: float,
    controls: Literal["one", "all", "none"],
    further: float,
    max_seconds: float | None,
) -> Verification:
    """Check a spec with general symmetries; the arguments are those of `verify`, with inputs to run on."""
    if not spec.acting and not spec.null_directions:
        return GeneralVerification(True, 0.0, tolerance, {}, note="nothing to move: the spec has no groups")
    started = time.monotonic()
    trial = Trial(model, spec.permutations(), first, seed, whole=spec)
    reference, scale = _reference(trial, tolerance)
    if reference is None:
        name = type(unwrap(model).core).__name__
        raise CaptureError(f"{name} gives nothing finite to compare on random weights; pass inputs on which it does")
    run_seconds = trial.run_seconds
    scrutiny = _Scrutiny(trial, spec, reference)
    null_errors = scrutiny.null_errors(seed, tolerance)
    elements = [spec.random(seed + i, every_group=True) for i in range(2)]
    max_error = max(scrutiny.change(element) for element in elements)
    ok = max_error <= tolerance
    threshold = max(1e-10, 100 * max_error) if ok else tolerance
    reports: dict[str, GroupReport] = {}
    beyond: dict[str, str] = {}
    inert: dict[str, None] = {}
    untried = []
    order = [list(spec.acting)[i] for i in torch.randperm(len(spec.acting), generator=seeded_generator(seed)).tolist()]
    for name in order:
        alone = elements[0].restricted_to([name])
        error = max_error if ok else scrutiny.change(alone)
        tried: list[Control] = []
        late = max_seconds is not None and time.monotonic() - started > max_seconds
        if late and controls != "none":
            untried.append(name)
        elif controls != "none":
            tried = list(scrutiny.controls(alone, name, threshold, every=controls == "all"))
            if ok:
                found, silent = scrutiny.beyond(name, threshold)
                inert.update(dict.fromkeys(silent))
                if found:
                    beyond[name] = found
        reports[name] = GroupReport(name, spec.groups[name].size, error, tuple(tried), error <= tolerance)
    reports = {name: reports[name] for name in spec.acting}
    ok = ok and all(error <= tolerance for error in null_errors.values())
    passed = ok and all(report.passed for report in reports.values())
    failed = tuple(name for name, report in reports.items() if not report.passed)
    verified = GeneralVerification(
        passed,
        max_error,
        tolerance,
        reports,
        len(reference),
        note=trial.compared.note(),
        untried=tuple(untried),
        runs=(Run(first.name, first.inputs.describe(), max_error, failed=failed),),
        beyond=beyond,
        inert=tuple(inert),
        null_errors=null_errors,
    )
    seconds = time.monotonic() - started
    if further <= 0 or not ok or (max_seconds is not None and seconds > max_seconds):
        return verified
    scales = sorted(SCALES, key=lambda other: other != scale)
    budget = max(LEAST_SECONDS, further * seconds)
    runs = FurtherRuns(
        trial, model, elements[0], tolerance, scales, budget, run_seconds, scrutiny.move(elements[0], seed)
    )
    return verified.with_runs(runs(first))


def _reference(trial: Trial, tolerance: float) -> tuple[list[Tensor] | None, float]:
    """What the model returns on random weights of the largest scale at which it is finite and not chaotic."""
    for scale in SCALES:
        reference = trial.randomise(scale, False)
        if reference is None or not any(is_floating(t) and t.numel() for t in reference):
            continue
        if trial.rounding(reference) <= tolerance / 100:
            return reference, scale
    return None, 0.0


class _Scrutiny:
    """Runs a model under elements of a group, and along single directions of what could be one."""

    def __init__(self, trial: Trial, spec: PermutationSpec, reference: Sequence[Tensor]) -> None:
        self.trial, self.spec, self.reference = trial, spec, reference
        self.weights = {name: tensor.clone() for name, tensor in trial.weights().items() if name in spec.axes}

    def change(self, element: Transformation, exclude: Sequence[tuple[str, int]] = ()) -> float:
        """How far the output moves when an element acts on all axes but these."""
        return distance(self.reference, self.trial.outputs(element, exclude))

    def controls(self, alone: Transformation, name: str, threshold: float, every: bool) -> Iterator[Control]:
        """A group on all of its axes but one; where that shows nothing, what it moves is scaled at random."""
        uses = self.spec.uses(name)
        changed = False
        for parameter, dim in uses if len(uses) > 1 else ():
            change = self.change(alone, exclude=[(parameter, dim)])
            passed = not change <= threshold  # an output that is no longer finite has changed as well
            yield Control(name, parameter, dim, change, passed)
            changed |= passed
            if changed and not every:
                return
        for parameter, dim in () if changed else uses:
            change = distance(self.reference, self.trial.outputs_scaled(alone, parameter))
            passed = not change <= threshold
            yield Control(name, parameter, dim, change, passed, scaled=True)
            if passed:
                return

    def move(self, element: Transformation, seed: int) -> Callable[[], list[Tensor]]:
        """What makes the model run with null directions added to its weights as they are then, under an element."""

        def outputs() -> list[Tensor]:
            weights = self.trial.weights()
            weights |= self._with_nulls(self.spec.null_directions, weights, seed)
            names = [name for name in self.spec.axes if name in weights]
            moved = {name: element.apply_to(name, weights[name], weights) for name in names}
            return self.trial.outputs_with(moved, under=element)

        return outputs

    def null_errors(self, seed: int, tolerance: float) -> dict[str, float]:
        """How far the output moves when random multiples of null directions are added.

        They are added all at once, and each by itself only where that moves it.
        """
        directions = self.spec.null_directions
        together = self._added(directions, seed) if directions else 0.0
        if together <= tolerance:
            return {str(direction): together for direction in directions}
        return {str(direction): self._added([direction], seed) for direction in directions}

    def _added(self, directions: Sequence[NullDirection], seed: int) -> float:
        return distance(self.reference, self.trial.outputs_with(self._with_nulls(directions, self.weights, seed)))

    @staticmethod
    def _with_nulls(directions: Sequence[NullDirection], weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The weights to which random multiples of null directions are added."""
        moved: dict[str, Tensor] = {}
        for number, direction in enumerate(directions):
            old = moved.get(direction.parameter, weights[direction.parameter])
            more = direction.random(old.shape, seeded_generator(seed + number)).to(old.device)
            moved[direction.parameter] = old + more
        return moved

    def beyond(self, name: str, threshold: float) -> tuple[str, list[str]]:
        """What a larger structure of a group could do, and the places that have no influence."""
        structure = self.spec.groups[name].structure
        if any(name in group.parents for group in self.spec.groups.values()):
            return "", []  # what acts on it may be part of what acts on those that are fibred over it
        places = self._places(name)
        if any(self.weights[parameter].is_complex() for parameter, _, _ in places):
            return "", []  # of complex parameters nothing but permutations is offered
        real = structure.linear in ("R", "R2")
        gains = sum(1 for _, _, action in places if structure.linear and not real and action == Action())
        n = self.spec.groups[name].size
        scaled = [self._derivative(place) for place in places]
        size = max((float(np.abs(column).max()) for column in scaled), default=0.0)
        loud: list[int] = []
        silent = []
        for i, column in enumerate(scaled):
            place = f"{places[i][0]}[{places[i][1].dim}]"
            if np.abs(column).max() <= NEGLIGIBLE * size:
                silent.append(place)
            elif other := next((j for j in loud if self._add_up(places[i], places[j], column, scaled[j])), None):
                silent.append(f"{place} against {places[other][0]}")
            else:
                loud.append(i)
        places = [places[i] for i in loud]
        if not places or 2 * len(places) * ENOUGH > scaled[0].size:
            return "", silent
        found = []
        expected = (structure.scales if not structure.linear else int(structure.linear == "GL")) + gains
        free = self._fewest(places, [[(i, i)] for i in range(min(n, TRIES))], expected)
        if free > expected:
            found.append(f"{free} independent scales leave the output as it is, not {expected}")
        if n > 1 and not ((structure.linear == "O1" or structure.is_paired) and n == 2):
            expected = {"GL": 2, "O": 1}.get(structure.linear, 0)
            # Of pairs that have a factor each, indices of two of them are mixed: no neighbours where they make a pair.
            pairs = [[(i, j), (j, i)] for i in range(min(n, TRIES)) if (j := (i + 1 + structure.is_paired) % n) != i]
            if structure.is_paired and n == 4:
                pairs = [[(i, j), (j, i)] for i, j in ([(0, 1)] if structure.linear in ("T", "R") else [(0, 2)])]
            free = self._fewest(places, pairs, expected) if pairs else expected
            if free > expected:
                found.append(f"{free} ways to mix two indices leave the output as it is, not {expected}")
        if structure.is_paired:
            whole = [
                (i, i + n // 2) if structure.linear in ("T", "R") else (2 * i, 2 * i + 1)
                for i in range(min(n // 2, TRIES))
            ]
            expected = 1 if real else 2
            tries = [[(i, i), (j, j)] if real else [(i, i), (i, j), (j, i), (j, j)] for i, j in whole]
            free = self._fewest(places, tries, expected)
            if free > expected:
                found.append(f"{free} ways to mix the two of a pair leave the output as it is, not {expected}")
        if len(places) <= MAX_SIGNS and not real:
            signs = (int(structure.linear in ("GL", "O")) if structure.linear else structure.signs) + gains
            count = sum(self._flipped(chosen) <= threshold for chosen in _subsets(places))
            if count > 2**signs:
                found.append(f"{count} choices of signs leave the output as it is, not {2**signs}")
        return "; ".join(found), silent

    def _add_up(self, one: Any, other: Any, column: Any, known: Any) -> bool:
        """Whether two vectors of weights are added to one another, so that what one gains the other may lose."""
        vectors = all(max(self.spec.shapes[p], default=0) == np.prod(self.spec.shapes[p]) for p, _, _ in (one, other))
        cosine = float(column @ known) / (float(np.linalg.norm(column) * np.linalg.norm(known)) or 1.0)
        return bool(vectors) and 1 - abs(cosine) < NEGLIGIBLE**2 * 100

    def _fewest(
        self, places: Sequence[tuple[str, Occurrence, Action]], tries: Sequence[Sequence[Index]], expected: int
    ) -> int:
        """How many directions are free, no fewer than expected; see `free_combinations`."""

        def effect(place: int, at: Index, amount: float) -> Any:
            return self._outputs(self._along(places, {place: {at: amount}}))

        def step(amounts: Mapping[int, Mapping[Index, float]]) -> float:
            return distance(self.reference, self.trial.outputs_with(self._along(places, amounts)))

        return free_combinations(expected, len(places), tries, effect, step, STEP)

    def _along(
        self, places: Sequence[tuple[str, Occurrence, Action]], amounts: Mapping[int, Mapping[Index, float]]
    ) -> dict[str, Tensor]:
        """The weights that change when index j is added to index i at some places, at the first of their parents."""
        moved: dict[str, Tensor] = {}
        for number, entries in amounts.items():
            parameter, where = places[number][0], self._where(places[number])
            matrix = np.zeros((where.size, where.size))
            for at, amount in entries.items():
                matrix[at] += amount
            matrix = torch.linalg.matrix_exp(torch.from_numpy(matrix)).numpy()
            new = moved.get(parameter, self.weights[parameter]).clone()
            where.multiply(new, where.at_first_parents(matrix))
            moved[parameter] = new
        return moved

    def _outputs(self, weights: Mapping[str, Tensor]) -> Any:
        """The real numbers that the model returns with these weights, in one vector."""
        parts = [t.flatten() for t in self.trial.outputs_with(weights) if is_floating(t)]
        whole = torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.double() for p in parts])
        return torch.nan_to_num(whole, posinf=0.0, neginf=0.0).numpy()

    def _places(self, name: str) -> list[tuple[str, Occurrence, Action]]:
        assert self.spec.general is not None
        found = []
        for parameter in dict.fromkeys(parameter for parameter, _ in self.spec.uses(name)):
            occurrences = self.spec.occurrences(parameter)
            actions = self.spec.general.actions.get(parameter, (Action(),) * len(occurrences))
            found += [(parameter, o, a) for o, a in zip(occurrences, actions, strict=True) if o.group == name]
        return found

    def _where(self, place: tuple[str, Occurrence, Action]) -> Where:
        return Where(self.spec, self.spec.layout(self.spec.axes[place[0]]), place[1])

    def _derivative(self, place: tuple[str, Occurrence, Action]) -> Any:
        """How the output changes when the first index of one place grows."""
        ends = [self._outputs(self._along([place], {0: {(0, 0): amount}})) for amount in (STEP, -STEP)]
        return (ends[0] - ends[1]) / (2 * STEP)

    def _flipped(self, places: Sequence[tuple[str, Occurrence, Action]]) -> float:
        """How far the output moves when the sign of index 0 changes at these places."""
        moved: dict[str, Tensor] = {}
        for place in places:
            where, parameter = self._where(place), place[0]
            factor = np.ones((*where.parent_sizes, where.size))
            factor[(*(0 for _ in where.parent_sizes), 0)] = -1
            old = moved.get(parameter, self.weights[parameter])
            moved[parameter] = old * torch.from_numpy(where.spread(factor))
        return distance(self.reference, self.trial.outputs_with(moved))


def _subsets(places: Sequence[Any]) -> itertools.chain[tuple[Any, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(places, k) for k in range(len(places) + 1))
