"""`auto_spec`: every permutation symmetry of a module, from the module alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from permgraph.capture import Captured, capture
from permgraph.capture.environment import gc_paused
from permgraph.capture.further import FurtherPasses
from permgraph.errors import SpecError
from permgraph.inference.describe import describe
from permgraph.inference.ends import pin_unread, pin_unseen
from permgraph.inference.facts import GraphFacts
from permgraph.inference.fibres import find_fibres
from permgraph.inference.fixpoint import run_until_stable, settle
from permgraph.inference.solution import Solution
from permgraph.spec.spec import PermutationSpec

log = logging.getLogger(__name__)


def auto_spec(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    max_passes: int = 1,
    symmetry: Literal["permutation", "general"] = "permutation",
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
        symmetry: ``"general"`` also finds, for each group, the largest structure that acts on its axis: scales, signs,
            rotations, any matrices (see the page on general symmetries).
        limits: `max_nodes` and `max_seconds`, at which the capture gives up.

    Returns:
        The spec: groups, and for each parameter axis the expression that places them.

    Raises:
        SpecError: `symmetry` is neither of the two.
        CaptureError: the module could not be run, or no example input was found; it says what was tried.

    >>> import torch, permgraph as pg
    >>> print(pg.auto_spec(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))).groups)
    {'0.weight': Group(name='0.weight', size=5, parents=(), fixed=False)}
    """
    if symmetry not in ("permutation", "general"):
        raise SpecError(f"symmetry is {symmetry!r}; it may be 'permutation' or 'general'")
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        example_inputs = (example_inputs,)
    captured = capture(model, example_inputs, example_kwargs, **limits)
    if max_passes == 1:
        return spec_of(captured, symmetry)
    passes = FurtherPasses(model, captured, max_passes, **limits)
    spec = spec_of(passes.joined(), symmetry)
    return replace(spec, notes=(*spec.notes, *passes.notes()))


def spec_of(captured: Captured, symmetry: str = "permutation") -> PermutationSpec:
    """The spec of a captured graph."""
    with gc_paused():
        solution = solve(captured.graph)
        fibres = find_fibres(solution)
        spec = describe(captured, solution, fibres)
        if symmetry == "general":
            from permgraph.inference.general import with_structures

            spec = with_structures(spec, solution, fibres)
    log.info("%s: %d groups in %d operators", captured.model_class, len(spec.moving), len(solution.nodes))
    return spec


def solve(graph: fx.Graph, results: Sequence[fx.Node] = ()) -> Solution:
    """Type every tensor of a captured graph; of one without an output node, `results` are the results.

    Raises `ConflictError`, naming the operator and its place in the source, where a rule ties axes of different sizes.
    """
    solution = settle(GraphFacts(list(graph.nodes), results))
    pin_unread(solution, run_until_stable)
    pin_unseen(solution)
    return solution
