"""`auto_spec`: every permutation symmetry of a module, from the module alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from permgraph.capture import Captured, capture
from permgraph.capture.environment import gc_paused
from permgraph.capture.further import FurtherPasses
from permgraph.inference.describe import Writer
from permgraph.inference.fixpoint import solve
from permgraph.spec.spec import PermutationSpec

log = logging.getLogger(__name__)


def auto_spec(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    max_passes: int = 1,
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
        limits: `max_nodes` and `max_seconds`, at which the capture gives up.

    Returns:
        The spec: groups, and for each parameter axis the expression that places them.

    Raises:
        CaptureError: the module could not be run, or no example input was found; it says what was tried.

    >>> import torch, permgraph as pg
    >>> print(pg.auto_spec(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))).groups)
    {'0.weight': Group(name='0.weight', size=5, parents=(), fixed=False)}
    """
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        example_inputs = (example_inputs,)
    captured = capture(model, example_inputs, example_kwargs, **limits)
    if max_passes == 1:
        return spec_of(captured)
    passes = FurtherPasses(model, captured, max_passes, **limits)
    spec = spec_of(passes.joined())
    return replace(spec, notes=(*spec.notes, *passes.notes()))


def spec_of(captured: Captured) -> PermutationSpec:
    """The spec of a captured graph."""
    with gc_paused():
        return _spec_of(captured)


def _spec_of(captured: Captured) -> PermutationSpec:
    solution = solve(captured.graph)
    placeholders = {node.meta["names"][0]: node for node in captured.graph.nodes if _is_weight(node)}
    number = {node: i for i, node in enumerate(captured.graph.nodes)}
    first_use = {name: min((number[user] for user in node.users), default=None) for name, node in placeholders.items()}
    used = sorted((name for name, at in first_use.items() if at is not None), key=lambda name: first_use[name] or 0)
    unread = frozenset(name for name, at in first_use.items() if at is None)
    writer = Writer(solution, used, unread)
    notes = []
    if captured.mode == "real":
        notes.append(f"inferred on real tensors, for the branch that they took, because {captured.fallback_reason}")
    spec = PermutationSpec(
        groups=writer.groups(),
        axes=writer.expressions(),
        shapes={name: tensor.shape for name, tensor in writer.parameters.items()},
        aliases={alias: node.meta["names"][0] for node in placeholders.values() for alias in node.meta["names"][1:]},
        pins=writer.pins(),
        unknown_ops=writer.unknown_ops(),
        unused=tuple(dict.fromkeys((*captured.unused, *unread))),
        model_class=captured.model_class,
        notes=tuple(notes),
        constraints=writer.constraints(),
    )
    log.info("%s: %d groups in %d operators", captured.model_class, len(spec.moving), len(number))
    return spec


def _is_weight(node: torch.fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer")
