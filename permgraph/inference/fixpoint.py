"""From a captured graph to axis types: run every operator's rule until nothing changes.

The rules only state constraints, so running them once more is harmless; they are run until a fixed point because a
family (an axis that differs from part to part of another) may have to collapse where a later operator shows that it
must. When a run has cut factors that a view had made whole, the run is repeated with that knowledge, so that their
neighbours are families from the start (see `Axes.cuts`).
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from permgraph.algebra import TOO_INTRICATE, Axes, Axis, FactorKey, Kind, Pinned, TooIntricateError
from permgraph.capture.schema import signature
from permgraph.errors import ConflictError
from permgraph.inference.constancy import (
    NONE,
    Uniform,
    known_values,
    uniform_dims,
    viewed_nodes,
    written_nodes,
    zero_nodes,
)
from permgraph.inference.liveness import VALUELESS, live_nodes, met_zeros
from permgraph.inference.predicted_cuts import PLACEHOLDER, foreseen_cuts
from permgraph.inference.repeats import AS_IT_WAS, tied_dims
from permgraph.rules import find_rule
from permgraph.rules.call import EQUAL, Call, Ledger, TypedTensor, loose_families, provides
from permgraph.rules.registry import Rule

UNREAD = "no output depends on it"
UNSEEN = "its weight met only zeros"
ONE_STEP = "a weight met only zeros, as in the first step of a sequence: one of this size may meet it in the second"
UNSORTED = "it was searched for its largest elements, whose order was left open"
MAX_RUNS = 6
MAX_VISITS = 12


@dataclass
class Solution:
    """Every tensor of the graph with its axes, and what the rules said to make them so."""

    axes: Axes
    ledger: Ledger
    nodes: Sequence[fx.Node]
    parameters: dict[str, TypedTensor]
    tensors: list[TypedTensor]
    values: dict[fx.Node, Any] = field(default_factory=dict)  # of each node: a typed tensor, or a nest of them


def solve(graph: fx.Graph, results: Sequence[fx.Node] = ()) -> Solution:
    """Type every tensor of a captured graph; of one without an output node, `results` are the results.

    Raises `ConflictError`, naming the operator and its place in the source, where a rule ties axes of different sizes.
    """
    nodes = list(graph.nodes)
    cuts = foreseen_cuts(nodes)
    constants = [n for n in nodes if n.op == "placeholder" and n.meta["kind"] == "constant"]
    written = written_nodes(nodes)
    uniform = uniform_dims(nodes, written, {node: _constant_along(node.meta.get("real")) for node in constants})
    live = live_nodes(nodes, results)
    facts = _Facts(
        uniform, tied_dims(nodes, written, uniform), known_values(nodes, written), viewed_nodes(nodes),
        live, results,
    )  # fmt: skip
    for number in range(MAX_RUNS):
        run = _Run(nodes, Axes(cuts), facts)
        run.until_stable()
        # What is foreseen makes families before anything is known of cuts inside them.
        seen = run.cuts_seen(within=number == 0)
        if seen == cuts:
            break
        cuts = seen
    run.pin_unobserved(live)
    run.pin_unseen(live, zero_nodes(nodes, written))
    return run.solution()


@dataclass(frozen=True)
class _Facts:
    """What the graph says of tensors' values before any rule runs; see `constancy` and `repeats`."""

    uniform: Mapping[fx.Node, Uniform]
    tied: Mapping[fx.Node, Uniform]
    known: Mapping[fx.Node, tuple[int, ...]]
    viewed: Collection[fx.Node]
    live: Collection[fx.Node]
    results: Collection[fx.Node]


class _Run:
    """One attempt: fresh axes for every tensor, then the rules over and over."""

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        axes: Axes,
        facts: _Facts,
    ) -> None:
        self.axes = axes
        self.facts = facts
        self.ends = Ledger()
        self.nodes = nodes
        self.values: dict[fx.Node, Any] = {}
        self.parameters: dict[str, TypedTensor] = {}
        self.calls: list[Call] = []
        self._rules: dict[Any, Rule | None] = {}
        memo: dict[Any, Any] = {}
        for number, node in enumerate(self.nodes):
            if node.op == "placeholder":
                self.values[node] = tensor = self._typed(node, node.meta["val"])
                if isinstance(tensor, TypedTensor) and node.meta["kind"] != "input":
                    tensor.dims = axes.make_factors((PLACEHOLDER, number), tensor.shape)
                    tensor.known = facts.known.get(node)
                if node.meta["kind"] in ("parameter", "buffer") and isinstance(self.values[node], TypedTensor):
                    name = node.meta["names"][0]
                    self.values[node].name = name
                    self.parameters[name] = self.values[node]
            elif node.op == "call_function":
                if node.target is operator.getitem:
                    source, item = node.args
                    assert isinstance(source, fx.Node)
                    self.values[node] = self.values[source][item]
                    continue
                arguments = self._arguments(node)
                self.values[node] = result = self._result(node, arguments)
                outs = list(result) if isinstance(result, (list, tuple)) else [result]
                if node in facts.known:
                    result.known = facts.known[node]
                self.calls.append(Call(node, number, arguments, outs, axes, Ledger(), memo))

    # -- making tensors ----------------------------------------------------------------------------------------------

    def _typed(self, node: fx.Node, val: Any, suffix: str = "") -> Any:
        if isinstance(val, torch.Tensor):
            tensor = TypedTensor(node.name + suffix, val.shape, val.dtype, self.axes)
            tensor.tied = self.facts.tied.get(node, NONE)
            tensor.viewed = node in self.facts.viewed
            return tensor
        if isinstance(val, (list, tuple)):
            items = [self._typed(node, item, f"{suffix}.{i}") for i, item in enumerate(val)]
            if node not in self.facts.results and not suffix:
                read = {user.args[1] for user in node.users if user in self.facts.live}
                for i, item in enumerate(items):
                    if isinstance(item, TypedTensor):
                        item.read = i in read
            return items
        return val

    def _used(self, source: fx.Node, user: fx.Node) -> Any:
        """What a node holds, as one use of it sees it: with axes of its own where the tensor does not vary."""
        value = self.values[source]
        dims = self.facts.uniform.get(source)
        if not dims or not isinstance(value, TypedTensor):
            return value
        used = TypedTensor(f"{value.name} in {user.name}", value.shape, value.dtype, self.axes)
        used.dims = [used.dims[d] if d in dims else axis for d, axis in enumerate(value.dims)]
        used.uniform = dims
        used.tied = value.tied
        return used

    def _argument(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, fx.Node):
            return self._used(value, node)
        if isinstance(value, (list, tuple)):
            return [self._argument(item, node) for item in value]
        return value

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        known = signature(node.target)
        if known is None:
            return {str(i): self._argument(arg, node) for i, arg in enumerate((*node.args, *node.kwargs.values()))}
        args, kwargs = node.args, node.kwargs
        found = {}
        for i, argument in enumerate(known.arguments):
            if i < len(args):
                found[argument.name] = self._argument(args[i], node)
            elif argument.name in kwargs:
                found[argument.name] = self._argument(kwargs[argument.name], node)
            else:
                found[argument.name] = argument.default
        return found

    def _result(self, node: fx.Node, arguments: dict[str, Any]) -> Any:
        """The result's tensors; the argument itself where an operator returns what it has written into."""
        known = signature(node.target)
        val = node.meta["val"]
        typed = self._typed(node, val)
        results = typed if isinstance(typed, list) else [typed]
        for i, names in enumerate(known.returned[: len(results)] if known is not None else ()):
            for name in names:
                written, made = arguments[name], results[i]
                if isinstance(written, TypedTensor) and isinstance(made, TypedTensor) and written.shape == made.shape:
                    results[i] = written
        return results if isinstance(typed, list) else results[0]

    # -- constraints -----------------------------------------------------------------------------------------------

    def until_stable(self) -> None:
        self._pin_ends()
        settled: dict[Call, tuple[Axis, ...] | None] = {}
        forms: list[list[object]] = []
        for visit in itertools.count():
            # An axis that is a shifted copy of itself would be cut once more on every visit, index by index. Once it is
            # pinned, copies of its parts are still made and tied to one another, which goes on for ever.
            self.axes.may_cut = visit < MAX_VISITS
            before = self.axes.changes
            for call in self.calls:
                if visit == 0 or not self._is_settled(settled.get(call)):
                    if visit > 0:
                        call.ledger.clear()
                    said = self.axes.changes
                    self._apply(call)
                    if visit > 2 * MAX_VISITS and self.axes.changes != said:
                        call.pin_all([*call.tensors, *call.results], "cut at ever new places")
                    if self.axes.has_families:  # else there may be no second visit
                        settled[call] = self._atoms_of(call)
            self._pin_ends()  # once more: only the rules have said which axes the values of tensors number
            self._pin_mirrored()
            self._pin_unsorted()
            if not self.axes.has_families:  # then what was said once holds for good
                return
            self._collapse_families()
            if self.axes.changes == before:
                return
            if visit > 1:
                forms.append(self.axes.form(axis for tensor in self._all_tensors() for axis in _axes_of(tensor)))
                if len(forms) > 2 and forms[-1] == forms[-2] == forms[-3]:
                    return

    @staticmethod
    def _is_settled(seen: tuple[Axis, ...] | None) -> bool:
        """Whether the axes that a call saw last are what they were: to say the same of them again is nothing new."""
        return seen is not None and all(axis.link is None for axis in seen)

    def _atoms_of(self, call: Call) -> tuple[Axis, ...] | None:
        """The axes of a call's tensors with the atoms in them; None if any has a family, which may have to collapse."""
        found: list[Axis] = []
        for tensor in (*call.tensors, *call.results):
            for axis in _axes_of(tensor):
                axis = self.axes.resolve(axis)
                found.append(axis)
                if axis.kind is not Kind.ATOM:
                    if self.axes.contains_family(axis):
                        return None
                    found.extend(self.axes.atoms(axis))
        return tuple(found)

    def _apply(self, call: Call) -> None:
        self.axes.start_node(call.number)
        target = call.node.target
        if target not in self._rules:
            self._rules[target] = find_rule(str(target))
        rule = self._rules[target]
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

    def _pin_ends(self) -> None:
        self.ends.clear()
        for number, node in enumerate(self.nodes):
            if node.op == "placeholder" and isinstance(self.values[node], TypedTensor):
                self._pin_placeholder(number, node, self.values[node])
            elif node.op == "output":
                ends: list[Any] = [node.args[0]]
                for end in ends:
                    if isinstance(end, (list, tuple)):
                        ends.extend(end)
                    elif isinstance(end, fx.Node):
                        self._pin(number, self.values[end], "output of the model")

    def pin_unobserved(self, live: Collection[fx.Node]) -> None:
        """Settle what of parameters has no effect in this pass: whole ones, or the rows beyond those that were sliced.

        On other inputs the other rows of a table may be read, so they go with these as far as that is one axis; what is
        left stays put. What the rules have said stands.
        """
        unread = self._unread(live)
        # Each round ties an axis that was not read to one that was. What is left when they are over is pinned.
        for _ in range(len(unread)):
            if not self._join_all_unread(unread):
                break
            self.until_stable()
            unread = self._unread(live)
        for number, node in self._parameters_read() if unread else ():
            for dim, axis in enumerate(self.values[node].dims):
                found = unread.intersection(self.axes.atoms(axis))
                for atom in found:
                    self.axes.pin(atom, Pinned(UNREAD, number))
                if found:
                    self.ends.pins.append((self.values[node], dim, UNREAD, number))

    def _join_all_unread(self, unread: set[Axis]) -> bool:
        """Tie the members of families that were not read to the one that was, where all that were are one."""
        before = self.axes.changes
        for _, node in self._parameters_read() if self.axes.has_families else ():
            for axis in self.values[node].dims:
                for family in reversed(list(loose_families(self.axes, axis))):  # inner ones first
                    members = {self.axes.resolve(member) for member in family.find().children}
                    idle = {m for m in members if unread.issuperset(self.axes.atoms(m))}
                    if idle and len(members - idle) == 1:
                        self.axes.collapse(family)
        return self.axes.changes != before

    def _parameters_read(self) -> list[tuple[int, fx.Node]]:
        """The parameters and buffers that some operator takes, with their numbers."""
        nodes = ((number, node) for number, node in enumerate(self.nodes) if node.op == "placeholder" and node.users)
        return [(number, node) for number, node in nodes if node.meta["kind"] in ("parameter", "buffer")]

    def _unread(self, live: Collection[fx.Node]) -> set[Axis]:
        """The atoms of parameters which no operator has met but those that only move elements about, or drop some."""
        read: set[Axis] = set()
        ends = [node for node in self.nodes if node.op == "output"]
        seen = [self.values[node] for end in ends for node in end.all_input_nodes]
        seen += [self.values[node] for node in self.facts.results]
        for call in self.calls:
            name = getattr(call.node.target, "_opname", "")
            if call.node in live and not call.ledger.rearrangements and name not in AS_IT_WAS:
                seen += [*(() if name in VALUELESS else call.tensors), *call.results]
        for tensor in self._tensors_in(seen):
            for axis in tensor.dims:
                read.update(self.axes.atoms(axis))
        parameters = (axis for _, node in self._parameters_read() for axis in self.values[node].dims)
        return {atom for axis in parameters for atom in self.axes.atoms(axis) if atom.pinned is None} - read

    def pin_unseen(self, live: Collection[fx.Node], zeros: Collection[fx.Node]) -> None:
        """Pin what a weight may meet in a longer sequence, where this one only multiplied it with zeros.

        What the weight sums over stays put in any case, unless it stands elsewhere too. If the inputs may be one step
        of a sequence, the weight of a recurrent layer meets that layer's own state from the second step on: an axis of
        the same size, which one, no tensor shows.
        """
        if not any(met_zeros(node, zeros) for node in live):
            return
        seen = live_nodes(self.nodes, list(self.facts.results), zeros)
        elsewhere = {atom for node in seen for tensor in self._tensors_in(self.values.get(node))
                     for axis in tensor.dims for atom in self.axes.atoms(axis)}  # fmt: skip
        unseen = set()  # what comes from a weight of which nothing is seen
        sizes = set()
        for number, node in enumerate(self.nodes):
            if node in live and node not in seen:
                weight = node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer")
                if weight or any(source in unseen for source in node.all_input_nodes):
                    unseen.add(node)
            for factor, dim in met_zeros(node, zeros).items() if node in live else ():
                if factor in unseen and elsewhere.isdisjoint(self.axes.atoms(self.values[factor].dims[dim])):
                    sizes.add(self.values[factor].shape[dim])
                    self._pin_dim(number, self.values[factor], dim, UNSEEN)
        if not self._may_be_one_step(sizes):
            return
        for number, node in enumerate(self.nodes):
            for tensor in self._tensors_in(self.values.get(node)):
                for dim, size in enumerate(tensor.shape):
                    if size in sizes:
                        self._pin_dim(number, tensor, dim, ONE_STEP)

    def _pin_dim(self, number: int, tensor: TypedTensor, dim: int, reason: str) -> None:
        if tensor.shape[dim] > 1 and any(a.pinned is None for a in self.axes.atoms(tensor.dims[dim])):
            self.axes.pin(tensor.dims[dim], Pinned(reason, number))
            self.ends.pins.append((tensor, dim, reason, number))

    def _may_be_one_step(self, sizes: Collection[int]) -> bool:
        """Whether a state of one of these sizes is kept on the model, or inputs have one element along something."""
        kept = [size for node in self.nodes for left in node.meta.get("left", ()) for size in left.meta["val"].shape]
        inputs = [node for node in self.nodes if node.op == "placeholder" and node.meta["kind"] == "input"]
        names = [name for node in inputs for name in node.meta["names"]]
        lists = {name[: found.start()] for name in names for found in re.finditer(r"\[0\]", name)} - {"args"}
        alone = any(not any(name.startswith(f"{place}[1]") for name in names) for place in lists)
        single = any(1 in tensor.shape for node in inputs for tensor in self._tensors_in(self.values.get(node)))
        return bool(sizes) and (alone or single or not set(sizes).isdisjoint(kept))

    def _pin_mirrored(self) -> None:
        """Pin axes that meet themselves where a largest element is looked for: (i, j) and (j, i) may be the same."""
        for call in self.calls:
            for tensor, dims, number in call.ledger.searched:
                if self._meets_itself([tensor.dims[d] for d in dims]):
                    self._pin(number, tensor, EQUAL, free=frozenset(range(tensor.ndim)) - frozenset(dims))

    def _pin_unsorted(self) -> None:
        """Pin what was searched where the order in which the largest elements came out is seen by anything."""
        found = [entry for call in self.calls for entry in call.ledger.unsorted]
        before = -1
        while found and before != self.axes.changes:
            before = self.axes.changes
            placeholders = (value for node, value in self.values.items() if node.op == "placeholder")
            written = {
                a for t in self._tensors_in(list(placeholders)) for axis in t.dims for a in self.axes.atoms(axis)
            }
            for searched, ranked, dim, number in found:
                rank = self.axes.resolve(ranked.dims[dim])
                if rank.kind is not Kind.ATOM or rank.pinned is not None or rank in written:
                    self._pin(number, ranked, UNSORTED, free=frozenset(range(ranked.ndim)) - {dim})
                    self._pin(number, searched, UNSORTED, free=frozenset(range(searched.ndim)) - {dim})

    def _meets_itself(self, axes: Sequence[Axis]) -> bool:
        """Whether one unpinned axis stands twice in the product of these."""
        axis = self.axes.resolve(axes[0]) if len(axes) == 1 else None
        if axis is not None and axis.kind is not Kind.PRODUCT:
            return any(self._meets_itself([child]) for child in axis.children)
        factors = [factor for axis in axes for factor in self.axes.factors(axis)]
        atoms = [a for factor in factors for a in dict.fromkeys(self.axes.atoms(factor)) if a.pinned is None]
        return len(set(atoms)) < len(atoms) or any(self._meets_itself([f]) for f in factors if f.children)

    def _pin_placeholder(self, number: int, node: fx.Node, tensor: TypedTensor) -> None:
        kind = node.meta["kind"]
        if kind == "input":
            self._pin(number, tensor, "input of the model")
        elif kind == "constant":
            self._pin(number, tensor, "constant", free=_constant_along(node.meta.get("real")))
        elif kind != "free" and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            self._pin(number, tensor, f"{kind} of type {tensor.dtype}")

    def _pin(self, number: int, tensor: Any, reason: str, free: frozenset[int] = frozenset()) -> None:
        if isinstance(tensor, list):
            for item in tensor:
                self._pin(number, item, reason)
        elif isinstance(tensor, TypedTensor):
            end = self._call(number)
            end.pin(tensor, [d for d in range(tensor.ndim) if d not in free], reason)
            end.pin_values(tensor, reason)

    def _call(self, number: int) -> Call:
        """A call on behalf of an input, an output or a parameter."""
        return Call(self.nodes[number], number, {}, [], self.axes, self.ends, {})

    def _collapse_families(self) -> None:
        if not self.axes.has_families:
            return
        for tensor in self._all_tensors():
            for d, axis in enumerate(tensor.dims) if 0 not in tensor.shape else ():
                for family in list(loose_families(self.axes, axis)):
                    assert family.index is not None
                    index = family.index.find()
                    givers = [k for k, other in enumerate(tensor.dims) if k != d and provides(self.axes, other, index)]
                    if len(givers) != 1:
                        self.axes.collapse(family)
            if tensor.value is not None:
                for family in list(loose_families(self.axes, tensor.value)):
                    self.axes.collapse(family)

    def cuts_seen(self, *, within: bool) -> dict[FactorKey, tuple[int, ...]]:
        """Where axes were cut, see `Axes.cuts_seen`; of a placeholder's, those of which a part was taken."""
        taken = {id(tensor) for call in self.calls for tensor in call.ledger.taken}
        numbers = {n for n, node in enumerate(self.nodes) if id(self.values.get(node)) in taken}
        cuts = self.axes.cuts_seen(within=within)
        return {key: points for key, points in cuts.items() if key[0] != PLACEHOLDER or key[1] in numbers}

    def _all_tensors(self) -> list[TypedTensor]:
        return list({id(tensor): tensor for tensor in self._tensors_in(list(self.values.values()))}.values())

    @staticmethod
    def _tensors_in(value: Any) -> list[TypedTensor]:
        found, stack = [], [value]
        while stack:
            value = stack.pop()
            if isinstance(value, TypedTensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                stack.extend(value)
        return found

    def solution(self) -> Solution:
        ledger = Ledger.joined([self.ends, *(call.ledger for call in self.calls)])
        return Solution(self.axes, ledger, self.nodes, self.parameters, self._all_tensors(), self.values)


def _axes_of(tensor: TypedTensor) -> list[Axis]:
    return tensor.dims if tensor.value is None else [*tensor.dims, tensor.value]


def _constant_along(real: torch.Tensor | None) -> frozenset[int]:
    """The dimensions along which a constant does not vary, where its values are known."""
    if real is None or real.numel() == 0 or real.is_meta:
        return frozenset()
    same = [real] if real.is_complex() else [real, real.signbit()]  # a zero may be less than nothing
    return frozenset(d for d in range(real.ndim) if all(bool((x == x.narrow(d, 0, 1)).all()) for x in same))
