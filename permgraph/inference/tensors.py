"""Which tensors of a forward pass carry the groups of a spec, and where: for matchers that compare activations."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import fx

from permgraph.capture import Captured
from permgraph.errors import MismatchError
from permgraph.inference.auto_spec import solve
from permgraph.inference.describe import Writer
from permgraph.inference.fibres import find_fibres
from permgraph.inference.unread import Policy
from permgraph.rules.registry import properties_of
from permgraph.spec import Axis, PermutationSpec
from permgraph.spec.expressions import refs, rename

_REARRANGED = frozenset(("same", "kept", "moved", "joined", "padded"))
"""What operators declare whose results, views or not, say nothing that their arguments did not."""


def computed_tensors(captured: Captured, spec: PermutationSpec) -> Iterator[tuple[int, fx.Node, tuple[Axis, ...]]]:
    """Each tensor that is computed from the inputs: the number of its node, the node, and its axes in groups of `spec`.

    Left out are tensors that only rearrange others, and those of which some factors that inference joined show alone.

    Raises:
        MismatchError: `spec` is not the one that inference gives for this pass.
    """
    for unread in get_args(Policy):
        solution = solve(captured.graph, unread=unread)
        writer = Writer(solution, find_fibres(solution))
        implied = PermutationSpec(writer.groups(), writer.expressions())
        names = _names(implied, spec)
        if names is not None and implied.rename(names).fingerprint == spec.fingerprint:
            break
    else:
        difference = next(iter(spec.diff(implied)), "their order")
        raise MismatchError(
            f"the spec is not the one that inference gives for {captured.model_class} on these inputs, so what "
            f"acts on the tensors inside is not known: {difference}"
        )
    fed: set[fx.Node] = set()
    for index, node in enumerate(solution.nodes):
        if node.op == "placeholder" and node.meta["kind"] == "input":
            fed.add(node)
        elif node.op == "call_function" and any(source in fed for source in node.all_input_nodes):
            fed.add(node)
            tensor = solution.values.get(node)
            if not _is_evidence(node) or tensor is None or isinstance(tensor, (list, tuple)):
                continue
            # Factors that inference joined are one group; a tensor with them in separate dimensions shows none.
            joined = [writer.fused.keys() & set(writer.axes.atoms(axis)) for axis in tensor.dims]
            if all(bool(atoms & writer.inner) == bool(atoms - writer.inner) for atoms in joined):
                yield index, node, tuple(rename(axis, lambda n: names.get(n, n)) for axis in writer.axes_of(tensor))


def _names(implied: PermutationSpec, given: PermutationSpec) -> dict[str, str] | None:
    """What `given` calls the groups of `implied`, if they stand in the same places."""
    names: dict[str, str] = {}
    for name, axes in implied.axes.items():
        ours = [group for axis in axes for group in refs(axis)]
        theirs = [group for axis in given.axes.get(name, ()) for group in refs(axis)]
        if len(ours) != len(theirs) or any(
            names.setdefault(own, its) != its for own, its in zip(ours, theirs, strict=True)
        ):
            return None
    return names if len(set(names.values())) == len(names) else None


def _is_evidence(node: fx.Node) -> bool:
    """Whether a node computes something, rather than rearranging what it is given."""
    target: Any = node.target
    if target is operator.getitem:
        source: Any = node.args[0]
        return source.op == "call_function" and source.target is not operator.getitem and _is_evidence_of(source.target)
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point() and _is_evidence_of(target)


def _is_evidence_of(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    if schema is None or properties_of(str(target)).values in _REARRANGED:
        return False
    alias = schema.returns[0].alias_info if schema.returns else None
    return alias is None or alias.is_write
