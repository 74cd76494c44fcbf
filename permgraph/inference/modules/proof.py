"""Whether every call of a graph computes the same after two modules have changed places.

Let the weights of the second module be put in the place of the first and the other way round, and the dimensions of
weights be moved as `moves` says. Claimed is that then the twin of each node holds what the node held, its dimensions
moved as `moves` says. By induction along the graph it is enough that this holds for each call if it does for its
operands:

- a call whose operands stay and are not moved: its result stays, and is not moved;
- a call whose twin takes the twins of its operands, with the same other arguments: so does its result, where nothing is
  moved; and where something is, if the rule of the operator has one label for all dimensions that are moved alike, pins
  none of them, and says nothing of them otherwise;
- a sum, product or maximum: its terms may be in any order; those of an even function of a sum may all be negative; and
  where masks cannot meet, so may what they choose;
- a call that only puts elements elsewhere (a view, a part, a concatenation) is tried on numbers that tell all elements
  apart, exactly.

All of the result must stay, and so must inputs, constants and what is left on the model from call to call.
What is drawn at random, read by Python, or written to memory that is seen through views is refused.
"""

from __future__ import annotations

import bisect
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from permgraph.inference.modules.colours import constant_key
from permgraph.inference.modules.exchange import Exchange
from permgraph.inference.modules.moves import Move, Refused, by_labels
from permgraph.inference.modules.reading import JOINS, LISTS, Dataflow, whole
from permgraph.inference.operators import arguments_of
from permgraph.inference.solution import is_weight, tensors_in
from permgraph.rules.call import Call
from permgraph.rules.typed_tensor import VALUE, TypedTensor

MOST_ELEMENTS = 1 << 22
"""Of tensors that are tried on numbers."""

UNREAD = "no pass reads them, or which of them is read depends on what is given"

INDICES = frozenset(["index", "indices", "mask"])


class Proof:
    """Proves exchanges of one graph."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._pinned: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for pinned, dim, why, number in flow.solution.ledger().pins:
            self._pinned.setdefault((id(whole(pinned)), dim), []).append((why, number))
        self._unseen = frozenset(flow.solution.unseen)
        self._memory_is_plain = _plain_memory(flow)
        self._writes: dict[fx.Node, set[fx.Node]] = {}
        for node in flow.solution.facts.nodes:
            for source in flow.memory.written_by(node):
                self._writes.setdefault(flow.memory.owner(source), set()).add(flow.within.get(node, node))

        self._placeholders = [node for node in flow.nodes if node.op == "placeholder"]
        self._outputs = [node for node in flow.nodes if node.op == "output"]
        self._written_placeholders = [n for n in self._placeholders if flow.memory.owner(n) in self._writes]
        self._placeholders_of: dict[int, list[fx.Node]] = {}
        for node in self._placeholders:
            if (tensor := flow.tensor(node)) is not None:
                self._placeholders_of.setdefault(id(whole(tensor)), []).append(node)

    def check(self, exchange: Exchange) -> None:
        """Raise Refused, saying why, unless an exchange leaves all that counts as it was."""
        if any(is_weight(node) and node.meta["names"][0] in self._flow.held for node in exchange.twins):
            raise Refused(UNREAD)
        tried = []
        for node in self._touched(exchange):
            for one in dict.fromkeys((node, exchange.twins.get(node, node))):
                if self._check_node(one, exchange):
                    tried.append(one)
        for node in tried:  # last, since that takes longest
            self._try(node, exchange.twins.get(node, node), exchange)

    def _touched(self, exchange: Exchange) -> dict[fx.Node, None]:
        """Every node for which the claim says something, one of each pair of twins."""
        flow = self._flow
        found: dict[fx.Node, None] = dict.fromkeys([*self._outputs, *exchange.fixed, *exchange.first])
        for node in exchange.twins:
            found.update(dict.fromkeys(user for user, _ in flow.users[node]))
        for tensor in exchange.moves.tensors.values():
            for call in flow.calls_of(tensor):
                found[flow.within.get(call.node, call.node)] = None
                for user in call.node.users:
                    if user in flow.readings:
                        found[user] = None
        found.update(dict.fromkeys(self._written_placeholders))
        for moved in exchange.moves.tensors:
            found.update(dict.fromkeys(self._placeholders_of.get(moved, ())))
        return {node: None for node in found if node not in exchange.twins or node in exchange.first}

    def _check_node(self, node: fx.Node, exchange: Exchange) -> bool:
        """Raise Refused where a node does not compute the same; give whether that is to be tried."""
        flow, twin = self._flow, exchange.twins.get(node, node)
        if node.op == "placeholder":
            self._check_placeholder(node, twin, exchange)
        elif node.op == "output":
            self._check_output(node, exchange)
        else:
            moved = self._moves_around(node, exchange)
            if (
                node is twin
                and not moved
                and not any(n in exchange.twins for t in flow.readings[node].terms for n in t.nodes)
            ):
                return False
            self._check_memory(node)
            if node is not twin or moved:
                self._check_effects(node, twin, exchange)
            reading = flow.readings[node]
            if node is twin and self._takes_what_stays(node, exchange):
                return False
            if self._is_tried(node, twin, moved):
                return True
            self._check_terms(node, twin, exchange)
            if len(reading.places) == 1:
                self._check_numbers(node, twin, exchange)
            elif reading.places != flow.readings[twin].places:
                raise Refused(f"{node.target} takes other parts")
            for inner in (node, *reading.inside):
                if not moved or flow.name(inner) in LISTS or inner.target is operator.getitem:
                    continue  # parts are looked at each, several results where they are made
                call = flow.calls.get(inner)
                if call is None:
                    raise Refused(f"{inner.target} was not looked at, the time being up")
                self._check_labels(call, exchange, compares=len(reading.places) == 1)
        return False

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _check_placeholder(self, node: fx.Node, twin: fx.Node, exchange: Exchange) -> None:
        tensor = self._flow.tensor(node)
        moves = {} if tensor is None else exchange.moves.of(tensor)
        what = node.meta["names"][0] if node.meta.get("names") else str(node)
        if is_weight(node):
            a, b = node.meta["val"], twin.meta["val"]
            if a.shape != b.shape or a.dtype != b.dtype:
                raise Refused(f"{what} has another shape or type than {twin}")
            if node is not twin and len(node.meta["names"]) + len(twin.meta["names"]) > 2:
                raise Refused(f"{what} has several names")
            if not a.is_floating_point() and not a.is_complex() and (moves or node is not twin):
                raise Refused(f"{what} is of type {a.dtype}, which stays")
            if node is not twin and not self._unseen.isdisjoint((*node.meta["names"], *twin.meta["names"])):
                raise Refused(f"{what} met only constants")
            for dim in moves:
                self._refuse_pins(tensor, dim, -1)
            written, its = (self._writes.get(self._flow.memory.owner(n), set()) for n in (node, twin))
            if {exchange.twins.get(write, write) for write in written} != its:
                raise Refused(f"what is written to {what} tells the modules apart")
            if node is twin and not written.isdisjoint(exchange.twins):
                raise Refused(f"the modules write to {what} one after the other")
            return
        if (node is not twin or moves) and self._flow.memory.owner(node) in self._writes:
            raise Refused(f"the modules write to {what}, which is no weight")
        if node is not twin and (constant_key(node) is None or constant_key(node) != constant_key(twin)):
            raise Refused(f"{what} is no weight")
        uniform = self._flow.solution.facts.uniform.get(node, frozenset())
        if any(dim not in uniform for dim in moves):
            raise Refused(f"{what} is no weight, and would be moved")

    def _check_output(self, node: fx.Node, exchange: Exchange) -> None:
        results: Any = node.args[0]
        ends = list(results) if isinstance(results, (list, tuple)) else [results]
        kept = list(node.meta.get("left", ()))
        for end in (*(n for n in ends if isinstance(n, fx.Node)), *kept):
            if end in exchange.twins:
                raise Refused(
                    "the result lists what the modules make" if end not in kept else "the model keeps what they make"
                )
            for tensor in tensors_in([self._flow.solution.values[end]]):
                if exchange.moves.of(tensor):
                    raise Refused("the order of the modules is seen in the result")

    def _check_effects(self, node: fx.Node, twin: fx.Node, exchange: Exchange) -> None:
        if "read" in node.meta:
            raise Refused("Python reads a value that belongs to one of the modules")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Refused(f"{node.target} draws random numbers in order")
        if node is not twin and "batch_norm" in self._flow.name(node):
            given = arguments_of(node)
            kept = [given.get(name) for name in ("running_mean", "running_var")]
            if any(isinstance(n, fx.Node) and n not in exchange.twins for n in kept):
                raise Refused("the modules share a batch norm, whose statistics they update one after the other")

    def _check_memory(self, node: fx.Node) -> None:
        for inner in (node, *self._flow.readings[node].inside):
            if not self._memory_is_plain(inner):
                raise Refused(f"{inner.target} writes to memory that is seen through views")

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _moves_around(self, node: fx.Node, exchange: Exchange) -> bool:
        """Whether any tensor that a node takes or gives is moved."""
        nodes = [node, *self._flow.readings[node].inside]
        if node.target is operator.getitem:
            nodes += [source for source in node.all_input_nodes if self._flow.name(source) in LISTS]
        for inner in nodes:
            call = self._flow.calls.get(inner)
            values = [*call.tensors, *call.results] if call else tensors_in([self._flow.solution.values.get(inner)])
            if any(exchange.moves.of(tensor) for tensor in values):
                return True
        return False

    def _check_terms(self, node: fx.Node, twin: fx.Node, exchange: Exchange) -> None:
        """The twin takes the twins of the operands, in the same order where that counts."""
        mine, its = self._flow.readings[node], self._flow.readings[twin]
        carried = [(t.key, t.sign, tuple(exchange.twins.get(n, n) for n in t.nodes)) for t in mine.terms]
        wanted = [(t.key, t.sign, t.nodes) for t in its.terms]
        ordered = mine.ordered or self._flow.name(node) in JOINS
        same = carried == wanted if ordered else Counter(carried) == Counter(wanted)
        if mine.even and not same:
            same = Counter((key, -sign, nodes) for key, sign, nodes in carried) == Counter(wanted)
        if mine.key != its.key or not same:
            raise Refused(f"{node.target} in {node.meta.get('module') or 'the model'} tells the modules apart")

    def _check_numbers(self, node: fx.Node, twin: fx.Node, exchange: Exchange) -> None:
        """Two comparisons with numbers change places as the values do."""
        (mine,), (its,) = self._flow.readings[node].places, self._flow.readings[twin].places
        tensor = self._flow.tensor(self._flow.readings[node].terms[0].nodes[0])
        move = None if tensor is None else exchange.moves.of(tensor).get(VALUE)
        goes_to = mine if move is None else int(move.to[mine]) if 0 <= mine < len(move.to) else -1
        if goes_to != its:
            raise Refused(f"{node.target} compares with {mine} and {its}, which do not change places")

    def _check_labels(self, call: Call, exchange: Exchange, *, compares: bool) -> None:
        """All dimensions that are moved have a label, and all dimensions of a label are moved alike."""
        properties = self._flow.operators.of(call.node)
        if not properties.reads_values:
            alike = properties.acts in ("zeros", "constant")
            if not alike and any(exchange.moves.of(result) for result in call.results):
                raise Refused(f"{call.node.target} makes anew what is moved")
            return
        if self._flow.name(call.node) == "arange" and call.out.value is not None:
            numbers = exchange.moves.of(call.out)
            if len(numbers) == 1 or not numbers[0].same(numbers[VALUE]):
                raise Refused(f"{call.node.target} numbers what is moved")
            return
        seen: set[tuple[int, int]] = set()
        for relation in call.ledger.relations:
            by_label: dict[str, list[tuple[TypedTensor, Move | None]]] = {}
            for one in relation.tensors:
                if one.tensor is None:
                    continue
                tensor = whole(one.tensor)
                for label, move in by_labels(one, exchange.moves.of(tensor)).items():
                    by_label.setdefault(label, []).append((tensor, move))
                    seen.add((id(tensor), one.where[label]))
            for told in by_label.values():
                moves_of_label = [move for _, move in told]
                if any(m is not None for m in moves_of_label) and not all(
                    m is not None and moves_of_label[0] is not None and m.same(moves_of_label[0])
                    for m in moves_of_label
                ):
                    raise Refused(f"{call.node.target} ties what is moved to what is not")
        for a, i, b, j, _ in call.ledger.unified:
            ends = exchange.moves.of(a).get(i), exchange.moves.of(b).get(j)
            if any(move is not None for move in ends) and not all(m and m.same(_first(ends)) for m in ends):
                raise Refused(f"{call.node.target} ties what is moved to what is not")
        for rearranged in call.ledger.rearrangements:
            if any(exchange.moves.of(tensor) for tensor in rearranged.tensors):
                raise Refused(f"{call.node.target} cuts what is moved")
        if all(tensor.value is None for tensor in call.tensors):
            for result in map(whole, call.results):
                if result.value is not None and result.value.size > 1 and (id(result), VALUE) not in seen:
                    raise Refused(f"{call.node.target} numbers what is moved among others")
        for given in (*call.tensors, *call.results):
            tensor = whole(given)
            for dim in exchange.moves.of(tensor):
                if compares and dim == VALUE:
                    continue
                if (id(tensor), dim) not in seen and dim not in given.uniform:
                    raise Refused(f"{call.node.target} says nothing of a dimension that is moved")
                self._refuse_pins(tensor, dim, call.number)

    def _refuse_pins(self, tensor: TypedTensor | None, dim: int, number: int) -> None:
        """Raise Refused where the rule of this call, or no call, pins a dimension of a tensor."""
        for why, at in self._pinned.get((id(tensor), dim), ()):
            node = self._flow.solution.nodes[at] if at >= 0 else None
            if at == number or node is None or node.op != "call_function":
                raise Refused(f"{why}: what would be moved stays put")

    # -- calls that put elements elsewhere -----------------------------------------------------------------------------

    def _is_tried(self, node: fx.Node, twin: fx.Node, moved: bool) -> bool:
        """Whether a call only puts elements elsewhere, so that it can be tried."""
        flow = self._flow
        source = node if node.target is not operator.getitem else node.args[0]
        assert isinstance(source, fx.Node)
        if not moved and node is not twin and flow.readings[node].places == flow.readings[twin].places:
            return False
        name = flow.name(source)
        if source is not node:
            return name in LISTS
        if name in LISTS:
            return False
        given = arguments_of(node)
        looks_up = any(isinstance(given.get(name), (fx.Node, list, tuple)) for name in INDICES)
        moves_only = flow.operators.of(node).acts == "moved" and not looks_up
        return moves_only and (moved or name in JOINS or bool(flow.readings[node].places))

    def _takes_what_stays(self, node: fx.Node, exchange: Exchange) -> bool:
        """Whether a node takes a part of a tensor whose other parts are moved, along this dimension alone."""
        reading, tensor = self._flow.readings[node], self._flow.tensor(node)
        if len(reading.places) != 3 or tensor is None or exchange.moves.of(tensor):
            return False
        dim, start, end = reading.places
        source = reading.terms[0].nodes[0]
        if self._flow.name(source) in LISTS:
            (source,) = self._flow.readings[source].terms[0].nodes
        taken_of = self._flow.tensor(source)
        if taken_of is None or source in exchange.twins:
            return False
        moves = exchange.moves.of(taken_of)
        return moves.keys() == {dim} and np.array_equal(moves[dim].to[start:end], np.arange(start, end))

    def _try(self, node: fx.Node, twin: fx.Node, exchange: Exchange) -> None:
        """Try a call that only puts elements elsewhere on numbers that tell all elements apart."""
        list_of, its_list = (n.args[0] if n.target is operator.getitem else None for n in (node, twin))
        caller = list_of if isinstance(list_of, fx.Node) else node
        twin_caller = its_list if isinstance(its_list, fx.Node) else twin
        back = {exchange.twins.get(source, source): source for source in caller.all_input_nodes}
        tags: dict[fx.Node, Tensor] = {}
        start = 0
        for source in caller.all_input_nodes:
            val = source.meta["val"]
            if not isinstance(val, Tensor) or start + val.numel() > MOST_ELEMENTS:
                raise Refused(f"{node.target} is too large to be tried")
            tags[source] = torch.arange(start + 1, start + 1 + val.numel()).reshape(val.shape)
            start += val.numel()
        if not back.keys() >= set(twin_caller.all_input_nodes):
            raise Refused(f"{node.target} tells the modules apart")
        carried = {there: self._moved(tags[here], here, exchange) for there, here in back.items()}
        result, its = _run(caller, tags), _run(twin_caller, carried)
        if list_of is not None:
            assert isinstance(node.args[1], int) and isinstance(twin.args[1], int)
            result, its = result[node.args[1]], its[twin.args[1]]
        if not isinstance(result, Tensor) or not torch.equal(self._moved(result, node, exchange), its):
            raise Refused(f"{node.target} in {node.meta.get('module') or 'the model'} does not go along")
        self._check_numbering(node, caller, exchange)

    def _check_numbering(self, node: fx.Node, caller: fx.Node, exchange: Exchange) -> None:
        """What puts elements elsewhere has values that number what is moved in all of its tensors, or in none."""
        numbering = [t for n in (node, *caller.all_input_nodes) if (t := self._flow.tensor(n)) is not None]
        told = [exchange.moves.of(tensor).get(VALUE) for tensor in numbering]
        if any(m is not None for m in told) and not all(m is not None and m.same(_first(told)) for m in told):
            raise Refused(f"{node.target} mixes values that are moved with others")
        call = self._flow.calls.get(caller)
        for tensor, move in zip(numbering, told, strict=True):
            if move is not None and call is not None:
                self._refuse_pins(whole(tensor), VALUE, call.number)

    def _moved(self, values: Tensor, node: fx.Node, exchange: Exchange) -> Tensor:
        """The tensor of a node, its dimensions moved: what was at index i is at `to[i]`."""
        tensor = self._flow.tensor(node)
        for dim, move in (exchange.moves.of(tensor) if tensor is not None else {}).items():
            if dim != VALUE:
                values = values.index_select(dim, torch.from_numpy(np.argsort(move.to)))
        return values


def _first(moves: Sequence[Move | None]) -> Move:
    """The first move that there is."""
    return next(move for move in moves if move is not None)


def _run(node: fx.Node, tags: dict[fx.Node, Tensor]) -> Any:
    """The result of a call on other tensors, which stay as they are."""
    given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: tags[n].clone())
    args, kwargs = given
    name = str(node.target)
    if name.endswith("view.dtype"):
        raise Refused(f"{node.target} reads the bits of a number as others")
    try:
        if name in ("aten.view.default", "aten._unsafe_view.default"):
            return args[0].reshape(args[1])
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError) as error:
        raise Refused(f"{node.target} cannot be tried: {error}") from None


def _plain_memory(flow: Dataflow) -> Callable[[fx.Node], bool]:
    """Says of a node whether all that it takes, gives and writes is what the graph says.

    Between the node by which a tensor is named and each use of it, nothing writes to its memory. Where something does,
    neither that node nor the one that writes is plain.
    """
    nodes, owner = flow.solution.facts.nodes, flow.memory.owner
    writes: dict[fx.Node, list[tuple[int, fx.Node, fx.Node]]] = {}
    for place, node in enumerate(nodes):
        for source in flow.memory.written_by(node):
            writes.setdefault(owner(source), []).append((place, node, source))
    odd: set[fx.Node] = set()
    for node in nodes:
        found = writes.get(owner(node))
        if found is None or not node.users:
            continue
        last = max(flow.place[user] for user in node.users)
        for place, writer, source in found[bisect.bisect_right(found, flow.place[node], key=lambda w: w[0]) :]:
            if place >= last:
                break
            if not flow.are_apart(node, source):
                odd.update((node, writer))
    return lambda node: odd.isdisjoint((node, *node.all_input_nodes))
