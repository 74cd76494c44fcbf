"""The ends of a graph: inputs and outputs, which stay put, and what of weights one pass does not show."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import fx

from permgraph.algebra import Axis, Kind, Pinned
from permgraph.capture.counting import counting
from permgraph.inference.constancy import constant_along
from permgraph.inference.repeats import UNREAD as PASSED_ON
from permgraph.inference.solution import Solution, StandIn, tensors_in
from permgraph.rules.typed_tensor import TypedTensor, loose_families

UNREAD = "no output depends on it"


def pin_ends(solution: Solution) -> None:
    """Pin inputs, outputs that count, constants where they vary, and integer weights."""
    solution.ends.clear()
    for number, node in enumerate(solution.nodes):
        if node.op == "placeholder" and isinstance(solution.values[node], TypedTensor):
            _pin_placeholder(solution, number, node, solution.values[node])
        elif node.op == "output":
            given: Any = node.args[0]
            results = given if isinstance(given, (list, tuple)) else [given]
            ends: list[Any] = [one for one, counts in zip(results, counting(node), strict=True) if counts]
            for end in ends:
                if isinstance(end, (list, tuple)):
                    ends.extend(end)
                elif isinstance(end, fx.Node):
                    solution.pin(number, solution.values[end], "output of the model")


def _pin_placeholder(solution: Solution, number: int, node: fx.Node, tensor: TypedTensor) -> None:
    kind = node.meta["kind"]
    if kind == "input":
        solution.pin(number, tensor, "input of the model")
    elif kind == "constant":
        solution.pin(number, tensor, "constant", free=constant_along(node.meta.get("real")))
    elif kind != "free" and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        solution.pin(number, tensor, f"{kind} of type {tensor.dtype}")


def pin_unread(solution: Solution, run_until_stable: Callable[[Solution], None]) -> None:
    """Settle what of parameters has no effect in this pass: whole ones, or the rows beyond those that were sliced.

    On other inputs the other rows of a table may be read, so they go with these as far as that is one axis; what is
    left stays put. What the rules have said stands.
    """
    unread = _unread(solution)
    if unread and _continue_periods(solution, unread):
        run_until_stable(solution)
        unread = _unread(solution)
    # Each round makes an axis that was not read one with an axis that was, so that there are no more rounds than such
    # axes. If cuts have made more of them meanwhile, these are pinned.
    for _ in range(len(unread)):
        if not _join_all_unread(solution, unread):
            break
        run_until_stable(solution)
        unread = _unread(solution)
    said = []
    for number, node in solution.weights_read() if unread else ():
        for dim, axis in enumerate(solution.values[node].dims):
            found = unread.intersection(solution.axes.atoms(axis))
            for atom in found:
                if _tells_members(solution, axis, atom):  # as one pinned atom the sum would no longer tell them
                    solution.axes.unify(atom, solution.axes.sum([solution.axes.one] * atom.size))
                else:
                    solution.axes.pin(atom, Pinned(UNREAD, number))
            if found:
                said.append((solution.values[node], dim, UNREAD, number))
    if said and solution.axes.has_families:
        run_until_stable(solution)  # where all of a sum is pinned, nothing tells the members of a family over it apart
    solution.ends.pins += said


def _continue_periods(solution: Solution, unread: set[Axis]) -> bool:
    """Let the rest of a flat table go on as the part that was read: as more rows of what these are rows of.

    That is so where all that was read are whole rows whose order is fixed, all of one kind, and the rest has room for
    whole rows. Says whether there was any.
    """
    axes = solution.axes
    continued: list[StandIn] = []
    for _, node in solution.weights_read():
        tensor = solution.values[node]
        for dim, axis in enumerate(tensor.dims):
            parts = axes.parts(axis)
            idle = [part for part in parts if part in unread]
            rows = [_row(solution, part) for part in parts if part not in unread]
            row = next(iter(rows), None)
            if not idle or row is None or not all(r is not None and axes.same(r, row) for r in rows):
                continue
            ends = list(itertools.accumulate(part.size for part in parts))
            if any(end % row.size for end in ends):
                continue
            for part, end in zip(parts, ends, strict=True):
                if part in unread:
                    head, inner = axes.split(part, [part.size // row.size, row.size])
                    axes.pin(head, Pinned(UNREAD))
                    axes.unify(inner, row)
                    place = ", ".join([*":" * dim, f"{end - part.size}:{end}"])
                    continued.append(StandIn(f"{tensor.name}[{place}]", (f"the rest of {tensor.name}",)))
    solution.stand_ins += tuple(continued)
    return bool(continued)


def _row(solution: Solution, part: Axis) -> Axis | None:
    """What each of several rows in a part of an axis has, if their order is fixed and something in them moves."""
    first, *rest = solution.axes.factors(part)
    if not rest or first.kind is not Kind.ATOM or first.pinned is None or solution.axes.still(part):
        return None
    return solution.axes.product(rest)


def _tells_members(solution: Solution, axis: Axis, part: Axis) -> bool:
    """Whether a family goes by the parts of a sum, of which this is one."""
    total = solution.axes.resolve(axis)
    parts = total.children if total.kind is Kind.SUM and solution.axes.tells_members(total) else ()
    return any(solution.axes.resolve(child) is part for child in parts)


def _join_all_unread(solution: Solution, unread: set[Axis]) -> bool:
    """Tie the members of families that were not read to the one that was, where all that were are one."""
    before = solution.axes.changes
    for _, node in solution.weights_read() if solution.axes.has_families else ():
        for axis in solution.values[node].dims:
            for family, _ in reversed(list(loose_families(solution.axes, axis))):  # inner ones first
                members = {solution.axes.resolve(member) for member in family.find().children}
                idle = {m for m in members if unread.issuperset(solution.axes.atoms(m))}
                if idle and len(members - idle) == 1:
                    solution.axes.collapse(family)
    return solution.axes.changes != before


def _unread(solution: Solution) -> set[Axis]:
    """The atoms of parameters which no operator has met but those that only move elements about, or drop some."""
    read: set[Axis] = set()
    ends = [node for node in solution.nodes if node.op == "output"]
    seen = [solution.values[node] for end in ends for node in end.all_input_nodes]
    seen += [solution.values[node] for node in solution.facts.results]
    for call in solution.calls:
        properties = solution.facts.operators.of(call.node)
        moves_only = call.ledger.rearrangements or properties.values in PASSED_ON
        if call.node in solution.facts.live and not moves_only:
            seen += [*(call.tensors if properties.reads_values else ()), *call.results]
    for tensor in tensors_in(seen):
        for axis in tensor.dims:
            read.update(solution.axes.atoms(axis))
    parameters = (axis for _, node in solution.weights_read() for axis in solution.values[node].dims)
    return {atom for axis in parameters for atom in solution.axes.atoms(axis) if atom.pinned is None} - read
