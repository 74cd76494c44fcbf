"""Activation matching over the whole group of a general spec."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permgraph.matching.general.acting import Acting, Element
from permgraph.matching.general.ascent import Climb
from permgraph.matching.general.gauge import Gauge, notes_on_gains
from permgraph.matching.general.weights import best_climb
from permgraph.matching.matcher import MatchResult, Progress
from permgraph.matching.problem.moves import Plan
from permgraph.matching.problem.objective import dot
from permgraph.spec.expressions import Axis, Fixed, refs
from permgraph.spec.general import Action, General
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import StateDict

if TYPE_CHECKING:
    from permgraph.matching.activation_matching import ActivationMatching, Observed, SeenSite


def match_observed(
    settings: ActivationMatching,
    observed: Observed,
    a: StateDict,
    b: StateDict,
    spec: PermutationSpec,
    seed: int,
    progress: Progress | None,
    started: float,
) -> MatchResult:
    """The element for which B's activations agree most with A's; see `ActivationMatching`.

    As over permutations, Gram matrices become parameters: with A the Gram matrix and with B the identity, an element g
    is worth the inner product of the two after g. Both are written in the models' common gauge first.
    """
    gauge = Gauge(spec, a, b)
    ours: dict[str, Tensor] = {}
    actions: dict[str, tuple[Action, ...]] = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    for name, site in observed.sites.items():
        own = _actions(spec, site)
        linear = any(spec.groups[group].structure.linear for group in refs(site.axis))
        gram = observed.gram_of_vectors(name) if linear else observed.gram(name, settings.measure)
        key = f"output of {name}"
        axes[key], ours[key] = (site.axis, Fixed(len(gram))), gram.to(gauge.device, gauge.dtype)
        if own is not None:
            actions[key] = own
    gains = {gain.name: spec.axes[gain.name] for own in actions.values() for action in own for gain, _ in action.gains}
    acting = Acting(PermutationSpec(dict(spec.groups), {**axes, **gains}, general=General(actions)), ours)
    for key in actions:
        for state, element in ((gauge.state_a, gauge.of_a), (gauge.state_b, gauge.of_b)):
            ours[key] = acting.act(key, acting.folded(key, ours[key], state), element).mT.contiguous()
    theirs = {name: torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for name, gram in ours.items()}
    plan, groups = Plan(acting.plain, ours), list(acting.of_group)

    def climb(start: Element, unknown: Sequence[str]) -> Climb:
        return Climb(
            acting, ours, theirs, plan, start, unknown=unknown, solver=settings.matcher.solver, started=started
        )

    starts = [("nothing known", Element(), groups), ("the identity", Element(), [])]
    best, _, interrupted = best_climb(starts, climb, settings.matcher.max_sweeps, progress)
    if best is None:
        best = climb(Element(), ())
    found = gauge.transformation(best.element)
    unseen = sorted(set(spec.acting) - set(groups))
    notes = (*observed.notes, *notes_on_gains(spec))
    if unseen:
        notes = (*notes, f"no tensor that was compared carries {', '.join(unseen)}, so they stay as they are")
    return MatchResult(
        permutation=found.permutation,
        transformation=found,
        objective=best.objective,
        objective_before=sum(dot(gram, theirs[name]) for name, gram in ours.items()),
        outcome="interrupted" if observed.interrupted or interrupted else best.outcome,
        history=tuple(best.history),
        runs=(best.objective,),
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def _actions(spec: PermutationSpec, site: SeenSite) -> tuple[Action, ...] | None:
    """How the groups of a site's axis act on its units; None where they only permute them."""
    assert spec.general is not None
    watched = site.watched
    if watched is None:
        return None
    if watched.gain and watched.parameter in spec.general_gains:
        gain = spec.general_gains[watched.parameter]
        return (Action((1,), (), ((gain, 1),)),)
    actions = spec.general.actions.get(watched.parameter)
    if actions is None:
        return None
    dims, occurrences = {*range(watched.above), watched.of}, spec.occurrences(watched.parameter)
    return tuple(action for action, place in zip(actions, occurrences, strict=True) if place.dim in dims)
