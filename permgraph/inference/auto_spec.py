"""`auto_spec`: every permutation symmetry of a module, from the module alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from permgraph.capture import Captured, capture
from permgraph.capture.environment import gc_paused
from permgraph.capture.further import FurtherPasses
from permgraph.inference.describe import describe
from permgraph.inference.ends import pin_unread
from permgraph.inference.facts import GraphFacts
from permgraph.inference.fibres import find_fibres
from permgraph.inference.fixpoint import run_until_stable, settle
from permgraph.inference.siblings import with_siblings
from permgraph.inference.solution import Solution
from permgraph.inference.unread import Policy, check_policy, pin_loose
from permgraph.inference.unseen import pin_unseen
from permgraph.spec.spec import PermutationSpec

log = logging.getLogger(__name__)


def auto_spec(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    max_passes: int = 1,
    unread: Policy = "note",
    **limits: Any,
) -> PermutationSpec:
    """Infer the groups of hidden units that can be renumbered without changing what a module computes.

    The module's own forward runs once on tensors without data; each operator that it calls has a rule that says which
    axes it ties together. Nothing of the module changes, no weight is read, and modules on the meta device work.

    Args:
        model: any `nn.Module`, `fx.GraphModule` or `ExportedProgram`.
        example_inputs: positional arguments of forward; found without being asked for if neither is given.
        example_kwargs: keyword arguments of forward.
        max_passes: up to so many passes that differ in what a user may vary are solved together: larger sizes,
            training mode without dropout, a second call, larger whole numbers among the arguments. What any of them
            ties or pins holds; the spec's `notes` say which ran.
        unread: what becomes of groups as long as an axis of a parameter that no pass reads and that may belong to
            them: `"note"` names them in `spec.unread` and in the notes, `"pin"` makes them stay put.
        limits: `max_nodes` and `max_seconds`, at which the capture gives up.

    Returns:
        The spec: groups, and for each parameter axis the expression that places them.

    Raises:
        CaptureError: the module could not be run, or no example input was found; it says what was tried.
        ValueError: `unread` is neither of the two.

    >>> import torch, permgraph as pg
    >>> print(pg.auto_spec(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))).groups)
    {'0.weight': Group(name='0.weight', size=5, parents=(), fixed=False)}
    """
    check_policy(unread)
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        example_inputs = (example_inputs,)
    captured = capture(model, example_inputs, example_kwargs, **limits)
    if max_passes == 1:
        return spec_of(captured, unread)
    passes = FurtherPasses(model, captured, max_passes, **limits)
    spec = spec_of(passes.joined(), unread)
    return replace(spec, notes=(*spec.notes, *passes.notes()))


def spec_of(captured: Captured, unread: Policy = "note") -> PermutationSpec:
    """The spec of a captured graph."""
    with gc_paused():
        solution = solve(captured.graph, unread=unread)
        fibres = find_fibres(solution)
        spec = describe(captured, solution, fibres)
    log.info("%s: %d groups in %d operators", captured.model_class, len(spec.moving), len(solution.nodes))
    return spec


def solve(graph: fx.Graph, results: Sequence[fx.Node] = (), *, unread: Policy = "note") -> Solution:
    """Type every tensor of a captured graph; of one without an output node, `results` are the results.

    Raises `ConflictError`, naming the operator and its place in the source, where a rule ties axes of different sizes.
    """
    facts, stand_ins = with_siblings(GraphFacts(list(graph.nodes), results))
    solution = settle(facts)
    solution.stand_ins = stand_ins
    pin_unread(solution, run_until_stable)
    pin_unseen(solution, run_until_stable)
    if unread == "pin":
        pin_loose(solution, run_until_stable)
    return solution
