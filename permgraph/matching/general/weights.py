"""Weight matching over the whole group of a general spec."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permgraph.errors import PermgraphError
from permgraph.matching.general.acting import Element
from permgraph.matching.general.ascent import ROUGHLY, TOLERANCE, Climb
from permgraph.matching.general.gauge import Gauge, notes_on_gains
from permgraph.matching.matcher import NOTHING_TO_PERMUTE, MatchResult, Progress
from permgraph.matching.problem.limits import groups_named
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import dot, weight_of
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict

if TYPE_CHECKING:
    from permgraph.matching.streamed import StreamedWeightMatching
    from permgraph.matching.weight_matching import WeightMatching


STARTS = 3
"""Where runs begin without data: with nothing known, at the identity, at the best permutation."""

ONE_START_ABOVE = 2**24
"""Of networks with more elements, the first start alone is made where nothing else is asked for."""

ENOUGH = 2e-4
"""Of these networks an ascent ends where a whole sweep adds less than this: what later ones add, no barrier shows."""


def match_general(
    settings: WeightMatching,
    a: StateDict,
    b: StateDict,
    spec: PermutationSpec,
    seed: int,
    progress: Progress | None,
) -> MatchResult:
    """The element of a general spec that `WeightMatching` with these settings chooses for B."""
    started = time.perf_counter()
    gauge = Gauge(spec, a, b, ignore=settings.ignore, dtype=settings.dtype)
    weighted, scale, offset = weighted_by(settings, gauge)
    frozen = frozen_groups(spec, settings)
    plan = Plan(gauge.acting.plain, gauge.a, frozen)
    notes = [*([] if plan.moves else [NOTHING_TO_PERMUTE]), *notes_on_gains(spec)]
    elements = sum(map(Tensor.numel, gauge.a.values()))
    before = scale * sum(dot(weighted[name], gauge.b[name]) for name in weighted) + offset

    def climb(start: Element, unknown: Sequence[str]) -> Climb:
        return Climb(
            gauge.acting, weighted, gauge.b, plan, start, unknown=unknown, solver=settings.solver, started=started,
            tolerance=tolerance_of(elements),
        )  # fmt: skip

    starts = itertools.islice(_starts(settings, gauge, a, b, spec, seed, frozen), _how_many(settings, elements))
    best, reached, interrupted = best_climb(starts, climb, settings.max_sweeps, progress)
    runs = {begun: scale * objective + offset for begun, objective in reached.items()}
    if best is None or best.objective * scale + offset < before:
        best = climb(Element(), ())
    found = gauge.transformation(best.element)
    return MatchResult(
        permutation=found.permutation,
        transformation=found,
        objective=scale * best.objective + offset,
        objective_before=before,
        outcome="interrupted" if interrupted else best.outcome,
        history=tuple(best.history),
        runs=tuple(runs.values()),
        details={f"from {begun}": objective for begun, objective in runs.items()},
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def best_climb(
    starts: Iterable[tuple[str, Element, Sequence[str]]],
    climb: Callable[[Element, Sequence[str]], Climb],
    max_sweeps: int,
    progress: Progress | None = None,
) -> tuple[Climb | None, dict[str, float], bool]:
    """The best of the climbs from several starts, what each reached, and whether Ctrl-C ended them.

    All end where a sweep adds little, or where they would not reach the best before them, which goes on to its end.

    Args:
        starts: where climbs begin, in words and as an element, each with the groups that are unknown there.
        climb: makes one.
        max_sweeps: of each.
        progress: called after each sweep.
    """
    best: Climb | None = None
    reached: dict[str, float] = {}
    ahead = ""
    try:
        for begun, start, unknown in starts:
            run = climb(start, unknown)
            if best is None:
                best, ahead = run, begun
            else:
                run.goal = best.objective
            run.climb(max_sweeps, progress, ROUGHLY)
            reached[begun] = run.objective
            if run.objective > best.objective:
                best, ahead = run, begun
            if run.outcome == "interrupted":
                return best, reached, True
        if best is not None and not best.is_over:
            best.climb(max_sweeps, progress)
            reached[ahead] = best.objective
    except KeyboardInterrupt:
        return best, reached, True
    return best, reached, best is not None and best.outcome == "interrupted"


def _how_many(settings: WeightMatching, elements: int) -> int | None:
    """How many starts to make; None for all of them."""
    if settings.restarts is not None or settings.loader is not None:
        return settings.restarts
    return starts_of(elements)


def starts_of(elements: int) -> int:
    """How many starts are made, without data, for networks of which so many weights are compared."""
    return STARTS if elements <= ONE_START_ABOVE else 1


def tolerance_of(elements: int) -> float:
    """What a whole sweep adds, relative to the objective, where an ascent over so many weights has converged."""
    return TOLERANCE if elements <= ONE_START_ABOVE else ENOUGH


def _starts(
    settings: WeightMatching,
    gauge: Gauge,
    a: StateDict,
    b: StateDict,
    spec: PermutationSpec,
    seed: int,
    frozen: set[str],
) -> Iterator[tuple[str, Element, Sequence[str]]]:
    """Where runs begin, in words and as an element, and which groups are unknown there."""
    init = settings.init
    if isinstance(init, Transformation):
        yield "init", gauge.element(init), ()
        return
    groups = [name for name in gauge.acting.of_group if name not in frozen]
    if init == "identity":
        yield "the identity", Element(), ()
        return
    if isinstance(init, Permutation):
        yield "init", gauge.element(as_transformation(init, spec)), ()
        return
    yield "nothing known", Element(), groups
    yield "the identity", Element(), ()
    from permgraph.matching.weight_matching import WeightMatching

    permuted = WeightMatching(
        max_sweeps=settings.max_sweeps,
        weights=settings.weights,
        ignore=settings.ignore,
        solver=settings.solver,
        dtype=settings.dtype,
        frozen=[name for name in frozen if name in spec.permutations().moving],
    ).match(a, b, spec.permutations(), seed)
    yield "permutations", gauge.element(as_transformation(permuted.permutation, spec)), ()
    if settings.loader is not None and settings.models is not None:
        from permgraph.matching.activation_matching import ActivationMatching

        activations = ActivationMatching(settings.loader, models=settings.models).match(a, b, spec, seed)
        assert activations.transformation is not None
        yield "activations", gauge.element(activations.transformation), ()


def as_transformation(permutation: Permutation, spec: PermutationSpec) -> Transformation:
    """A permutation of `spec.permutations()` as an element of the whole group: of matrices, permutation matrices."""
    arrays, matrices = {}, {}
    for name, array in permutation.arrays.items():
        if spec.groups[name].structure.linear:
            matrices[name] = torch.eye(array.shape[-1], dtype=torch.float64)[torch.from_numpy(array.copy())].numpy()
        else:
            arrays[name] = array
    return Transformation(spec, Permutation(spec.permutations(), arrays), matrices, {}, {})


def frozen_groups(spec: PermutationSpec, settings: WeightMatching | StreamedWeightMatching) -> set[str]:
    """The groups that a matcher's settings freeze.

    Raises:
        PermgraphError: single indices are limited, or no group has such a name.
    """
    if settings.max_moves is not None:
        raise PermgraphError("max_moves counts indices, which rotations have not: take spec.permutations() with it")
    given = settings.frozen if isinstance(settings.frozen, Mapping) else dict.fromkeys(settings.frozen)
    for pattern, indices in given.items():
        if indices is not None:
            raise PermgraphError(f"frozen: of {pattern!r} single indices: take spec.permutations() with them")
    return {name for pattern in given for name in groups_named(spec.acting, pattern, "frozen")}


def weighted_by(settings: WeightMatching, gauge: Gauge) -> tuple[dict[str, Tensor], float, float]:
    """A's parameters with weights, and the scale and the offset of the objective that is reported."""
    weighted = dict(gauge.a)
    offset = 0.0
    for name, tensor in gauge.a.items():
        if settings.objective == "l2":
            offset -= float(tensor.double().square().sum() + gauge.b[name].double().square().sum())
        if settings.objective == "cosine":
            norms = float(torch.linalg.vector_norm(tensor)) * float(torch.linalg.vector_norm(gauge.b[name]))
            weighted[name] = tensor / norms if norms > 0 else tensor
        if settings.weights is not None:
            if settings.objective == "l2":
                raise PermgraphError("the objective 'l2' takes no weights; use 'inner'")
            weighted[name] = weighted[name] * weight_of(settings.weights, name, tensor, gauge.spec.shapes[name])
    return weighted, 2.0 if settings.objective == "l2" else 1.0, offset
