"""Run every operator's rule over a typed graph until nothing changes.

A rule states constraints on the types of its tensors. To state one again is harmless, but may say more than before:
what part of an axis is seen depends on types (a family is restricted to a member, an index tensor numbers an axis),
and a family has to collapse where a later operator shows that nothing tells its members apart. So all rules are run in
turn, a *visit*, and again until the types are at rest.

**Why this ends.** Call what the types leave open the set of permutations of all tensors that they allow. Unifying,
cutting, pinning and the collapse of a family can only make it smaller, and it is finite; so from some visit on it stays
the same. From then on each constraint that a rule stated is met (what has been unified stays so), and a visit can only
change how the same is written: pinned axes that are linked, indices of equal sums that are merged, parts that are made
anew where a sum of pinned parts has become one pinned atom and lost its cuts. The exits of `run_until_stable` are

1. *no families*: what was said once holds for good, for nothing that a rule reads of types can change its meaning;
2. *no change* in a whole visit: another one would be the same;
3. *the same form*: `SAME_VISITS` visits in a row after which all types are equal but for names, and for how what stays
   put is made up (`Axes.form`). Nothing was said that was not known: idle changes are no progress. One visit would not
   do, since tensors inside an operator are in no form and may carry something over to the next;
4. *giving up*, where 3 has not come about in `MAX_VISITS` visits: an axis that is a shifted copy of itself is cut at
   one more index each time, and would come to rest only after as many visits as it has indices. From then on nothing
   is cut that was not cut already (`Axes.may_cut`): what would be, is pinned. If that has not led to rest after as
   many visits again, each call that still changes anything has all its tensors pinned. Such a visit pins one more
   index of some tensor, of which there are finitely many, or it is like the one before, which is exit 3.

Within one visit, what a rule may start is bounded by the depth to which refinements may need one another
(`permgraph.algebra.limits`), and not by Python's stack, which would give other types where the caller's is deeper.
`settle` does all this at most `MAX_RUNS` times: where a run has cut factors that a view had made whole, the next one
makes them cut from the start, so that their neighbours are families (`Factors`). Any run is sound by itself; the last
one only knows most.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from typing import Any

from permgraph.algebra import Axes, Axis, Cuts, FactorKey, Kind, TooIntricateError
from permgraph.algebra.limits import OUT_OF_TIME, RESTLESS, TOO_INTRICATE
from permgraph.capture.record import Limits
from permgraph.errors import ConflictError
from permgraph.inference.ends import pin_ends
from permgraph.inference.facts import GraphFacts
from permgraph.inference.limits import MAX_RUNS, MAX_VISITS, QUICK_VISITS, SAME_VISITS
from permgraph.inference.predicted_cuts import PLACEHOLDER, foreseen_cuts
from permgraph.inference.ranked import pin_mirrored, pin_unsorted
from permgraph.inference.solution import Solution, axes_of
from permgraph.inference.typing import type_graph
from permgraph.rules import find_rule
from permgraph.rules.call import Call
from permgraph.rules.registry import Rule
from permgraph.rules.typed_tensor import loose_families, provides


def settle(facts: GraphFacts, limits: Limits | None = None) -> Solution:
    """Type a graph and run its rules; again with what was cut made so from the start, until that is nothing new.

    Raises `ConflictError`, naming the operator and its place in the source, where a rule ties axes of different sizes.
    """
    cuts: Mapping[FactorKey, Cuts] = foreseen_cuts(facts.nodes, facts.operators, facts.for_shape)
    for number in range(MAX_RUNS):
        solution = type_graph(facts, cuts)
        solution.limits = limits
        run_until_stable(solution)
        # What is foreseen makes families before anything is known of cuts inside them.
        seen = _cuts_seen(solution, within=number == 0)
        if seen == cuts or solution.out_of_time():
            break
        cuts = seen
    return solution


def run_until_stable(solution: Solution) -> None:
    """Run all rules over and over, until the types are at rest; see the head of this file."""
    axes = solution.axes
    rules: dict[Any, Rule | None] = {}
    settled: dict[Call, tuple[Axis, ...] | None] = {}
    forms: deque[list[object]] = deque(maxlen=SAME_VISITS)
    pin_ends(solution)
    for visit in itertools.count():
        axes.may_cut = visit < MAX_VISITS
        before = axes.changes
        for call in solution.calls:
            if visit == 0 or not _is_settled(settled.get(call)):
                if visit > 0:
                    call.ledger.clear()
                unchanged = axes.changes
                if solution.out_of_time():
                    call.pin_all([*call.tensors, *call.results], OUT_OF_TIME)
                    continue
                _apply(call, rules)
                if visit >= 2 * MAX_VISITS and axes.changes != unchanged:
                    call.pin_all([*call.tensors, *call.results], RESTLESS)
                if axes.has_families and axes.changes == unchanged:  # else it is looked at again, or never
                    settled[call] = _atoms_of(axes, call)
        pin_ends(solution)  # once more: only the rules have said which axes the values of tensors number
        pin_mirrored(solution)
        pin_unsorted(solution)
        if not axes.has_families:
            return
        _collapse_families(solution)
        if axes.changes == before:
            return
        if visit >= QUICK_VISITS:
            forms.append(axes.form(axis for tensor in solution.tensors() for axis in axes_of(tensor)))
            if len(forms) == SAME_VISITS and all(form == forms[0] for form in forms):
                return


def _is_settled(seen: tuple[Axis, ...] | None) -> bool:
    """Whether the axes that a call saw last are what they were: to say the same of them again is nothing new."""
    return seen is not None and all(axis.link is None for axis in seen)


def _atoms_of(axes: Axes, call: Call) -> tuple[Axis, ...] | None:
    """The axes of a call's tensors with the atoms in them; None if any has a family, which may have to collapse."""
    found: list[Axis] = []
    for tensor in (*call.tensors, *call.results):
        for axis in axes_of(tensor):
            axis = axes.resolve(axis)
            found.append(axis)
            if axis.kind is not Kind.ATOM:
                if axes.contains_family(axis):
                    return None
                found.extend(axes.atoms(axis))
    return tuple(found)


def _apply(call: Call, rules: dict[Any, Rule | None]) -> None:
    call.axes.start_node(call.number)
    target = call.node.target
    if target not in rules:
        rules[target] = find_rule(str(target))
    rule = rules[target]
    try:
        if rule is None:
            call.unknown()
        else:
            rule(call)
        call.pin_unfollowed_values()
    except TooIntricateError:  # an axis that is cut again and again, as by a view that skews a padded matrix
        call.pin_all([*call.tensors, *call.results], TOO_INTRICATE)
    except Exception as error:
        place = call.node.meta.get("source") or "an unknown line"
        shapes = ", ".join(str(t.shape) for t in call.tensors)
        raise ConflictError(
            f"the rule of {call.node.target} in module {call.node.meta.get('module', '')!r} ({place}) "
            f"failed on tensors of shape {shapes}: {error}"
        ) from error


def _collapse_families(solution: Solution) -> None:
    """Collapse each family whose members nothing tells apart: no one other dimension has its sum, or they hold it."""
    for tensor in solution.tensors():
        for d, axis in enumerate(tensor.dims) if 0 not in tensor.shape else ():
            for family in list(solution.axes.families_within_themselves(axis)):
                solution.axes.collapse(family)
            for loose in list(loose_families(solution.axes, axis)):
                givers = [k for k, other in enumerate(tensor.dims) if k != d and provides(solution.axes, other, loose)]
                if len(givers) != 1:
                    solution.axes.collapse(loose.family)
        if tensor.value is not None:
            for family, _ in list(loose_families(solution.axes, tensor.value)):
                solution.axes.collapse(family)


def _cuts_seen(solution: Solution, *, within: bool) -> dict[FactorKey, Cuts]:
    """Where axes were cut, see `Factors.cuts_seen`; of a placeholder's, those of which a part was taken."""
    taken = {id(tensor) for call in solution.calls for tensor in call.ledger.taken}
    numbers = {n for n, node in enumerate(solution.nodes) if id(solution.values.get(node)) in taken}
    cuts = solution.axes.named.cuts_seen(solution.axes, within=within)
    return {key: points for key, points in cuts.items() if key[0] != PLACEHOLDER or key[1] in numbers}
