"""`auto_spec`: every permutation symmetry of a module, from the module alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn

from permgraph.capture import Captured, capture
from permgraph.capture.counting import Outputs
from permgraph.capture.environment import gc_paused
from permgraph.capture.further import FurtherPasses, Tried
from permgraph.capture.joined import joined
from permgraph.capture.record import Limits
from permgraph.capture.result import check_outputs
from permgraph.capture.untied import sources_of_ties, untied
from permgraph.conventions.waiting import waits
from permgraph.errors import ConflictError, SpecError
from permgraph.inference.describe import describe
from permgraph.inference.ends import pin_unread
from permgraph.inference.facts import GraphFacts
from permgraph.inference.fibres import find_fibres
from permgraph.inference.fixpoint import run_until_stable, settle
from permgraph.inference.off_diagonal import with_off_diagonals
from permgraph.inference.siblings import with_siblings
from permgraph.inference.solution import Solution, StandIn
from permgraph.inference.unread import Policy, check_policy, pin_loose
from permgraph.inference.unseen import pin_unseen
from permgraph.spec.provenance import Pass
from permgraph.spec.spec import PermutationSpec

if TYPE_CHECKING:
    from permgraph.inference.modules import Found

log = logging.getLogger(__name__)

MAX_PASSES = 10
"""Most modules need two: as given, and with larger sizes in training mode. Those that read values need more."""

MAX_NODES = 200_000


@waits("finding symmetries")
def auto_spec(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    symmetry: Literal["permutation", "general"] = "permutation",
    untie: bool = False,
    modules: bool = False,
    vary: bool = True,
    unread: Policy = "note",
    max_passes: int = MAX_PASSES,
    max_nodes: int = MAX_NODES,
    max_seconds: float | None = None,
) -> PermutationSpec:
    """Infer the groups of hidden units that can be renumbered without changing what a module computes.

    The module's own forward runs on tensors without data; each operator that it calls has a rule that says which
    axes it ties together. It runs again on what a user may vary: larger sizes, training mode without dropout,
    further calls where one changed something, other numbers and flags among the arguments, optional tensors left
    out. What any pass ties or pins holds. `spec.passes` lists them, and `spec.notes` says what was not covered.
    Nothing of the module changes, no weight is read, and modules on the meta device work.

    Args:
        model: any `nn.Module`, `fx.GraphModule` or `ExportedProgram`.
        example_inputs: positional arguments of forward; found without being asked for if neither is given.
        example_kwargs: keyword arguments of forward.
        outputs: what of all that forward returns counts as its result, and so stays put. What does not count may move,
            and `spec.outputs` says how. ``"all"`` counts everything; ``"final"`` all but by-products: tensors from
            which others of the same result are computed by way of parameters, such as an encoder's states beside the
            logits; what a loss alone is computed from is none. A name or names count these alone: keys and fields,
            indices of a tuple as texts, with dots where results are nested. A function is given what forward returned,
            and gives the part of it that counts. By default, of a result whose class names its fields (a dataclass,
            such as transformers' outputs are, or a named tuple) by-products do not count, but for the first field that
            is no loss: such a class documents more than most callers read, and has first what they do read. Whoever
            returns a tuple, list or dictionary means to use all of it, and all of it counts.
        symmetry: ``"general"`` also finds, for each group, the largest structure that acts on its axis: scales, signs,
            rotations, any matrices (see the page on general symmetries).
        untie: find the symmetries that the model has once parameters which several of its modules share are each their
            own, such as a head that is the embedding's table; with ``"general"`` alone. What the spec's elements do to
            a state dict needs a model with untied weights (`untied`).
        modules: also find modules that can change places as wholes: experts and heads in a `ModuleList`, branches that
            are summed or put together, ensembles. They are groups like others, whose parameters `spec.stacks` lists.
        vary: False keeps to the inputs, in evaluation mode: the spec then holds for these sizes and branches alone.
        unread: what becomes of groups as long as an axis of a parameter that no pass reads and that may belong to
            them: `"note"` names them in `spec.unread` and in the notes, `"pin"` makes them stay put.
        max_passes: at most so many passes are looked at, the first one among them.
        max_nodes: a pass with more operators is given up.
        max_seconds: a first pass that takes longer is given up, no other is begun after so long, and while solving,
            what the operators that are left touch is pinned.

    Returns:
        The spec: groups, and for each parameter axis the expression that places them.

    Raises:
        SpecError: `symmetry` is neither of the two; `untie` goes with permutations alone; or `outputs` names what the
            model does not return.
        CaptureError: the module could not be run, or no example input was found; it says what was tried.
        ValueError: `unread` is neither of the two.

    >>> import torch, permgraph as pg
    >>> print(pg.auto_spec(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))).groups)
    {'0.weight': Group(name='0.weight', size=5, parents=(), fixed=False)}
    """
    if symmetry not in ("permutation", "general"):
        raise SpecError(f"symmetry is {symmetry!r}; it may be 'permutation' or 'general'")
    if untie and symmetry == "permutation":
        raise SpecError("untie=True finds no more permutations: it goes with symmetry='general'")
    if type(max_passes) is not int or max_passes < 1:
        raise ValueError(f"max_passes={max_passes!r} is no whole number from 1 on")
    check_policy(unread)
    check_outputs(outputs)
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        example_inputs = (example_inputs,)
    limits = Limits(max_nodes, max_seconds, time.monotonic())
    ties: dict[str, str] = {}
    if untie and isinstance(model, nn.Module):
        ties = sources_of_ties(model)
        model = untied(model, share=True)
    with gc_paused():
        captured = capture(
            model, example_inputs, example_kwargs, outputs=outputs, max_nodes=max_nodes, max_seconds=max_seconds
        )
        passes = FurtherPasses(model, captured, max_passes if vary else 1, limits)
        spec = spec_of_passes(passes, vary=vary, unread=unread, symmetry=symmetry, modules=modules)
    return _with_ties(spec, ties) if untie else spec


def _with_ties(spec: PermutationSpec, ties: Mapping[str, str]) -> PermutationSpec:
    """The spec of a model with these parameters untied, which says so."""
    ties = {name: source for name, source in ties.items() if name in spec.axes and source in spec.axes}
    said = [
        f"untied, {name} is no longer {source}: load the result in a model of untied weights"
        for name, source in ties.items()
    ]
    assert spec.general is not None
    notes = (*spec.notes, *(said or ["there is nothing to untie"]))
    return replace(spec, general=replace(spec.general, untied=ties), notes=notes)


def spec_of_passes(
    passes: FurtherPasses,
    *,
    vary: bool = True,
    unread: Policy = "note",
    symmetry: str = "permutation",
    modules: bool = False,
) -> PermutationSpec:
    """The spec of several passes, which lists them, and says what they do not cover."""
    captured = passes.passes[0]
    in_training = passes.in_training if symmetry == "general" else ()
    try:
        spec = _spec_of_all(passes.passes, in_training, passes.limits, unread, symmetry, modules=modules)
    except ConflictError as error:
        if len(passes.passes) + len(in_training) == 1:
            raise
        log.debug("passes of %s cannot be solved together", captured.model_class, exc_info=True)
        passes.keep_the_first(f"{type(error).__name__}: {error}")
        spec = _spec_of_all([captured], (), passes.limits, unread, symmetry, modules=modules)
    as_given = f"inferred from one pass, in evaluation mode, on {captured.inputs.describe()}"
    notes = passes.notes() if vary else (as_given,)
    # In training batches are counted, which no pass that was solved shows.
    unused = tuple(name for name in spec.unused if all(name in one.unused for one in passes.in_training))
    return replace(spec, unused=unused, notes=(*spec.notes, *notes), passes=tuple(map(_pass, passes.tried)))


def _spec_of_all(
    passes: Sequence[Captured],
    in_training: Sequence[Captured],
    limits: Limits | None,
    unread: Policy,
    symmetry: str,
    *,
    modules: bool,
) -> PermutationSpec:
    """The spec of several passes, with those in training for what is more than permutations.

    Which modules change places is read off the graph as it was captured: that of general symmetries is without turns.
    """
    families: Found | None = None
    if modules and symmetry == "general":
        from permgraph.inference.modules import find_families

        together, stand_ins = _joined(passes, whole=True)
        solution = solve(together.graph, limits=limits, unread=unread, stand_ins=stand_ins)
        families = find_families(solution, [one.unused for one in passes])
    together, stand_ins = _joined([*passes, *in_training], whole=modules and families is None)
    unused = [one.unused for one in passes]
    return spec_of(together, limits, unread, symmetry, stand_ins, modules=modules, families=families, unused=unused)


def _joined(passes: Sequence[Captured], *, whole: bool) -> tuple[Captured, tuple[StandIn, ...]]:
    """Several passes as one, and the parts that none of them reached but that stand in their siblings' places.

    What one of them did not reach, and another did, stands where its siblings do there: of layers of which as many run
    as there are steps, passes of one and of five steps show the first and the last.
    """
    if len(passes) == 1:
        return passes[0], ()
    unread = [set(one.unused) for one in passes]
    nowhere_read = set.intersection(*unread)
    filled: list[Captured] = []
    said: dict[str, StandIn] = {}
    for one, own in zip(passes, unread, strict=True):
        facts, stand_ins = (
            with_siblings(GraphFacts(list(one.graph.nodes)), unread) if own > nowhere_read else (None, ())
        )
        filled.append(one if facts is None or not stand_ins else replace(one, graph=facts.nodes[0].graph))
        said |= {part.part: part for part in stand_ins if any(n.startswith(f"{part.part}.") for n in nowhere_read)}
    return joined(filled, whole=whole), tuple(said.values())


def _pass(tried: Tried) -> Pass:
    variation = tried.variation
    mode = "training" if variation.training else "evaluation"
    called = f"{mode}, {variation.calls} calls" if variation.calls > 1 else mode
    inputs = variation.inputs.describe()
    return Pass(variation.name, tried.operators, tried.outcome, inputs, called, tried.says, tried.by_products)


def spec_of(
    captured: Captured,
    limits: Limits | None = None,
    unread: Policy = "note",
    symmetry: str = "permutation",
    stand_ins: Sequence[StandIn] = (),
    *,
    modules: bool = False,
    families: Found | None = None,
    unused: Sequence[Collection[str]] = (),
) -> PermutationSpec:
    """The spec of a captured graph, in which `stand_ins` stand in their siblings' places.

    With `modules` those that change places are groups too: these families, or else those of the solved graph, which is
    one of passes that did not read the `unused` weights.
    When the time is up, what operators touch that have no types yet is pinned.
    """
    with gc_paused():
        if symmetry == "general":
            from permgraph.inference.general import free_turns

            free_turns(captured.graph)
        solution = solve(captured.graph, limits=limits, unread=unread, stand_ins=stand_ins)
        fibres = find_fibres(solution)
        spec = describe(captured, solution, fibres)
        if symmetry == "general":
            from permgraph.inference.general import with_structures

            spec = with_structures(spec, solution, fibres)
        if modules:
            from permgraph.inference.modules import find_families, fold

            spec = fold(spec, families or find_families(solution, unused))
    log.info("%s: %d groups in %d operators", captured.model_class, len(spec.moving), len(solution.nodes))
    return spec


def solve(
    graph: fx.Graph,
    results: Sequence[fx.Node] = (),
    *,
    limits: Limits | None = None,
    unread: Policy = "note",
    stand_ins: Sequence[StandIn] = (),
) -> Solution:
    """Type every tensor of a captured graph; of one without an output node, `results` are the results.

    `stand_ins` are the parts that stand in their siblings' places already.

    Raises `ConflictError`, naming the operator and its place in the source, where a rule ties axes of different sizes.
    """
    graph = graph if results else with_off_diagonals(graph)
    facts, more = with_siblings(GraphFacts(list(graph.nodes), results))
    solution = settle(facts, limits)
    solution.stand_ins = (*stand_ins, *more)
    pin_unread(solution, run_until_stable)
    pin_unseen(solution, run_until_stable)
    if unread == "pin":
        pin_loose(solution, run_until_stable)
    return solution
