"""What each call of a graph does to which operands, as far as exchanging modules cares.

Sums, products and the like are flattened to their terms, in whatever order they were added. Operators that take, or put
together, parts of a dimension are read without the places of these parts; the proof looks at places again.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from permgraph.inference.operators import arguments_of, first_result, name_of
from permgraph.inference.solution import Solution, tensors_in
from permgraph.rules.call import Call
from permgraph.rules.typed_tensor import TypedTensor

LISTS = frozenset([
    "unbind", "unbind_copy", "split", "split_with_sizes", "chunk", "tensor_split", "split_copy",
    "split_with_sizes_copy", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
])  # fmt: skip
"""Operators whose results are the parts of a dimension, in order."""

JOINS = frozenset(["cat", "concat", "concatenate", "stack"])

TAKES = frozenset(["select", "select_copy", "slice", "slice_copy", "narrow"])
"""Operators that take a part of one dimension."""

SUMS = frozenset(["add", "sub", "index_add", "scatter_add", "index_put"])

COMMUTATIVE = {
    "mul": "mul", "multiply": "mul", "maximum": "maximum", "minimum": "minimum", "logical_and": "logical_and",
    "logical_or": "logical_or", "logical_xor": "logical_xor", "bitwise_and": "bitwise_and",
    "bitwise_or": "bitwise_or", "bitwise_xor": "bitwise_xor", "eq": "eq", "ne": "ne",
}  # fmt: skip

ASSOCIATIVE = frozenset(COMMUTATIVE.values()) - {"eq", "ne"}

CHOICES = frozenset(["where", "index_put"])

EVEN = frozenset(["even", "absolute", "square", "norm", "spread"])
"""How functions act that are the same of an argument and of its negative."""


@dataclass(frozen=True)
class Term:
    """Operands of one kind: nodes in order, and a key that says what becomes of them."""

    key: Hashable
    nodes: tuple[fx.Node, ...]
    sign: int = 1


@dataclass(frozen=True)
class Reading:
    """What a node computes: a key that says how, and terms; in any order unless `ordered`.

    Where it is `even`, the signs of all terms may change at once.

    Args:
        key: the operator and its arguments that are no tensors, but for places.
        terms: the operands.
        ordered: whether the order of the terms counts.
        even: whether it is an even function of a sum, as a distance is: then its terms have signs beside their keys.
        places: the part of a dimension that is taken: dimension, start, end; or the number a value is compared with.
        inside: nodes that compute parts of this one, such as sums of some of its terms.
    """

    key: Hashable
    terms: tuple[Term, ...]
    ordered: bool = True
    places: tuple[int, ...] = ()
    inside: tuple[fx.Node, ...] = ()
    even: bool = False


class Dataflow:
    """The live nodes of a solved graph, each with its reading.

    Attributes:
        nodes: the nodes that are read, in order; those inside a sum of others are not among them.
        readings: what each of them computes.
        users: for each of them the nodes that take it as an operand, with the key by which they do, once for each use.
        within: for each node inside another's reading, that other.
        left: the nodes that the forward pass leaves on the model.
        calls: the call of each node that calls an operator.
        held: the names of the weights that stay in their modules, whatever the graph says.
    """

    def __init__(self, solution: Solution, held: Collection[str] = ()) -> None:
        self.solution, self.held = solution, frozenset(held)
        facts = solution.facts
        self.operators = facts.operators
        self.memory = facts.memory
        self.calls: dict[fx.Node, Call] = {call.node: call for call in solution.calls}
        live = [n for n in facts.nodes if n in facts.live or n.op != "call_function"]
        self.place = {node: i for i, node in enumerate(facts.nodes)}
        self._live = set(live)
        self.left = {kept for node in facts.nodes for kept in node.meta.get("left", ())}
        self._users = {node: [u for u in node.users if u in self._live] for node in live}
        self.within: dict[fx.Node, fx.Node] = {}
        self.readings: dict[fx.Node, Reading] = {}
        for node in reversed(live):
            if node not in self.within:
                reading = self.readings[node] = self._read(node)
                self.within.update(dict.fromkeys(reading.inside, node))
        self.nodes = [node for node in live if node in self.readings]
        self.users: dict[fx.Node, list[tuple[fx.Node, Hashable]]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            reading = self.readings[node]
            for number, term in enumerate(reading.terms):
                for slot, source in enumerate(term.nodes):
                    key = (reading.key, term.key, slot, number if reading.ordered else None)
                    self.users[source].append((node, key))

        self._calls_of: dict[int, list[Call]] = {}
        self._of_nodes = {id(t) for value in solution.values.values() for t in tensors_in(value)}
        ends = [end for node in self.nodes if node.op == "output" for end in (*_leaves(node.args[0]), *self.left)]
        of_ends = (solution.values.get(end) for end in ends if isinstance(end, fx.Node))
        self._results = {id(whole(tensor)) for value in of_ends for tensor in tensors_in(value)}
        for call in self.calls.values():
            if call.node in self._live:
                for tensor in {id(t): t for t in map(whole, (*call.tensors, *call.results))}.values():
                    self._calls_of.setdefault(id(tensor), []).append(call)

    def is_result(self, tensor: TypedTensor) -> bool:
        """Whether a tensor is returned, or left on the model."""
        return id(tensor) in self._results

    def calls_of(self, tensor: TypedTensor) -> Sequence[Call]:
        """The live calls that take or give a tensor."""
        return self._calls_of.get(id(tensor), ())

    def is_of_node(self, tensor: TypedTensor) -> bool:
        """Whether a tensor is some node's, and none inside an operator."""
        return id(whole(tensor)) in self._of_nodes

    def are_apart(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether two views are known to have no memory in common: parts of one tensor that do not meet."""
        mine = {(base, dim): bounds for base, dim, bounds in self._parts_of(node)}
        for base, dim, (start, end) in self._parts_of(other):
            found = mine.get((base, dim))
            if found is not None and (found[1] <= start or end <= found[0]) and _every_element_alone(base.meta["val"]):
                return True
        return False

    def _parts_of(self, node: fx.Node) -> Iterator[tuple[fx.Node, int, tuple[int, int]]]:
        """Of which tensors a view is a part: of each the dimension, and where along it the part begins and ends."""
        while node.op == "call_function":
            if node.target is operator.getitem:
                source, item = node.args
                assert isinstance(source, fx.Node) and isinstance(item, int)
                if self.name(source) not in LISTS:
                    return
                dim, bounds = self.bounds(source)
                yield arguments_of(source)["self"], dim, bounds[item]
                node = arguments_of(source)["self"]
                continue
            views = [source for source in node.all_input_nodes if self.memory.owner(source) is self.memory.owner(node)]
            if len(views) != 1:
                return
            given = arguments_of(node)
            if name_of(node) in TAKES and given.get("self") is views[0]:
                reading = self._part(node, name_of(node), given)
                if reading.places:
                    dim, start, end = reading.places
                    yield views[0], dim, (start, end)
            node = views[0]

    def tensor(self, node: fx.Node) -> TypedTensor | None:
        """The typed tensor of a node that has one."""
        value = self.solution.values.get(node)
        return value if isinstance(value, TypedTensor) else None

    def name(self, node: fx.Node) -> str:
        """The operator that a node calls, ``"getitem"``, or what else it is."""
        if node.op != "call_function":
            return node.op
        return "getitem" if node.target is operator.getitem else name_of(node)

    # -- one node ------------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Reading:
        if node.op == "placeholder":
            return Reading((node.op, node.meta["kind"]), ())
        if node.op == "output":
            return Reading(node, tuple(Term(i, (n,)) for i, n in enumerate(node.all_input_nodes)))
        if node.target is operator.getitem:
            return self._item(node)
        properties, name = self.operators.of(node), name_of(node)
        given = arguments_of(node) or {str(i): arg for i, arg in enumerate((*node.args, *node.kwargs.values()))}
        if not properties.reads_values:
            val = first_result(node)
            return Reading((str(node.target), None if val is None else tuple(val.shape), self._constants(given)), ())
        if name in SUMS and (summed := self._sum(node)) is not None:
            return summed
        if name in CHOICES and (choice := self._choice(node)) is not None:
            return choice
        if (even := self._even(node, name, given)) is not None:
            return even
        if name in ASSOCIATIVE or (name in COMMUTATIVE and len(node.all_input_nodes) == 2):
            return self._product(node, COMMUTATIVE[name])
        if name in JOINS:
            tensors = given.get("tensors", ())
            terms = tuple(Term("part", (n,)) for n in tensors if isinstance(n, fx.Node))
            return Reading((name, given.get("dim", 0)), terms, ordered=False)
        if name in TAKES:
            return self._part(node, name, given)
        if name in ("eq", "ne") and isinstance(given.get("other"), int) and not isinstance(given["other"], bool):
            source = given["self"]
            typed = self.tensor(source) if isinstance(source, fx.Node) else None
            if typed is not None and typed.value is not None:
                return Reading((name, "number"), (Term("self", (source,)),), places=(given["other"],))
        return Reading((str(node.target), self._constants(given)), tuple(self._operands(given)))

    def _item(self, node: fx.Node) -> Reading:
        source, item = node.args
        assert isinstance(source, fx.Node) and isinstance(item, int)
        if self.name(source) in LISTS:
            dim, bounds = self.bounds(source)
            start, end = bounds[item]
            given = {k: v for k, v in arguments_of(source).items() if k != "self"}
            key = ("item", name_of(source), end - start, self._constants(given))
            return Reading(key, (Term("of", (source,)),), places=(dim, start, end))
        return Reading(("item", item), (Term("of", (source,)),))

    def bounds(self, node: fx.Node) -> tuple[int, list[tuple[int, int]]]:
        """Of an operator whose results are parts: the dimension, and where along it each begins and ends."""
        given = arguments_of(node)
        source = given["self"].meta["val"]
        dim = given.get("dim", 0) % source.ndim
        if name_of(node).startswith("unbind"):
            return dim, [(i, i + 1) for i in range(source.shape[dim])]
        sizes = [part.shape[dim] for part in node.meta["val"]]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return dim, [(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def _part(self, node: fx.Node, name: str, given: Mapping[str, Any]) -> Reading:
        source = given["self"]
        size = source.meta["val"].shape
        dim = given.get("dim", 0) % len(size)
        if name.startswith("select"):
            start = given["index"] % size[dim]
            end = start + 1
        elif name == "narrow":
            start = given["start"] % max(size[dim], 1) if isinstance(given["start"], int) else -1
            end = start + given["length"]
        else:
            start, end, _ = slice(given["start"], given["end"]).indices(size[dim])
        step = given.get("step", 1)
        if start < 0 or step != 1:
            return Reading((str(node.target), self._constants(given)), tuple(self._operands(given)))
        return Reading((name, dim, end - start), (Term("self", (source,)),), places=(dim, start, end))

    def _operands(self, given: Mapping[str, Any]) -> Iterator[Term]:
        for name, value in given.items():
            for i, leaf in enumerate(_leaves(value)):
                if isinstance(leaf, fx.Node):
                    yield Term((name, i), (leaf,))

    def _constants(self, given: Mapping[str, Any]) -> Hashable:
        """The arguments that are no tensors, as a text: equal for equal ones."""
        return repr({name: "tensor" if isinstance(value, fx.Node) else _plain(value) for name, value in given.items()})

    # -- sums and products ---------------------------------------------------------------------------------------------

    def _sum(self, node: fx.Node) -> Reading | None:
        """A sum with all its terms, those of sums that are used here alone among them; None if it is none."""
        terms: list[Term] = []
        inside: list[fx.Node] = []
        stack: list[tuple[Any, bool, list[fx.Node]]] = [(node, False, [])]
        while stack:
            part, negative, users = stack.pop()
            opened = part is node or (isinstance(part, fx.Node) and self._is_within(part, node, users))
            found = self._addends(part) if opened else None
            increment = self._increment(part) if opened else None
            within: list[fx.Node] = []
            if increment is not None:
                found, within = increment
                inside += within
            if found is None:
                if part is node:
                    return None
                terms.append(self._addend(part, negative))
                continue
            if part is not node:
                inside.append(part)
            for addend, minus in found:
                if isinstance(addend, Term):
                    if negative:
                        return None
                    terms.append(addend)
                else:
                    stack.append((addend, negative != minus, [part, *within]))
        return Reading(("sum", str(first_result(node).dtype)), tuple(terms), ordered=False, inside=tuple(inside))  # type: ignore[union-attr]

    @staticmethod
    def _addend(part: Any, negative: bool) -> Term:
        if isinstance(part, fx.Node):
            return Term(("minus" if negative else "plus",), (part,))
        return Term(("minus" if negative else "plus", repr(part)), ())

    def _addends(self, node: fx.Node) -> list[tuple[Any, bool]] | None:
        """What a node adds up: operands with whether they are subtracted, and other terms; None if it adds nothing."""
        if node.op != "call_function" or node.target is operator.getitem:
            return None
        name, given = name_of(node), arguments_of(node)
        if name in ("add", "sub") and given.get("alpha", 1) == 1 and "self" in given:
            return [(given["self"], False), (given["other"], name == "sub")]
        accumulates = {
            "index_add": ("dim", "index", "source"),
            "scatter_add": ("dim", "index", "src"),
            "index_put": ("indices", "values"),
        }
        if name not in accumulates or given.get("alpha", 1) != 1 or (name == "index_put" and not given["accumulate"]):
            return None
        others = {key: given[key] for key in accumulates[name]}
        nodes = tuple(leaf for value in others.values() for leaf in _leaves(value) if isinstance(leaf, fx.Node))
        shape = tuple(node.meta["val"].shape)  # what follows may be broadcast, and this would not be what it was
        return [(given["self"], False), (Term((name, shape, self._constants(others)), nodes), False)]

    def _increment(self, node: fx.Node) -> tuple[list[tuple[Any, bool]], list[fx.Node]] | None:
        """``out[i] += values``, that is ``out[i] = out[i] + values``: what is added up, and the nodes inside.

        Where `i` repeats itself the last one wins, but what is added to an element depends on no other term.
        """
        if node.op != "call_function" or node.target is operator.getitem or name_of(node) != "index_put":
            return None
        given = arguments_of(node)
        added, viewed = self._as_long(given["values"], node)
        if given["accumulate"] or not isinstance(added, fx.Node) or not self._is_alone(added, [node, *viewed]):
            return None
        total = arguments_of(added) if added.op == "call_function" and name_of(added) == "add" else {}
        old, values = total.get("self"), total.get("other")
        if not isinstance(old, fx.Node) or not isinstance(values, fx.Node) or total.get("alpha", 1) != 1:
            return None
        if old.op != "call_function" or name_of(old) != "index" or not self._is_alone(old, [added]):
            return None
        taken = arguments_of(old)
        if taken["self"] is not given["self"] or list(taken["indices"]) != list(given["indices"]):
            return None
        if first_result(added).dtype != first_result(node).dtype:  # type: ignore[union-attr]
            return None
        indices = tuple(leaf for leaf in _leaves(given["indices"]) if isinstance(leaf, fx.Node))
        key = ("increment", tuple(node.meta["val"].shape), self._constants({"indices": given["indices"]}))
        return [(given["self"], False), (Term(key, (*indices, values)), False)], [*viewed, added, old]

    def _as_long(self, values: Any, node: fx.Node) -> tuple[Any, list[fx.Node]]:
        """What is written to elements, and the view by which Python drops leading dimensions of a single index.

        It does so where there is one element, by chance.
        """
        if name_of_call(values) == "view" and self._is_alone(values, [node]):
            source = arguments_of(values)["self"]
            ones = source.meta["val"].ndim - values.meta["val"].ndim
            if source.meta["val"].shape == (*(1,) * ones, *values.meta["val"].shape):
                return source, [values]
        return values, []

    def _even(self, node: fx.Node, name: str, given: Mapping[str, Any]) -> Reading | None:
        """An even function of a sum: with all its terms, whose signs may change together."""
        acts = self.operators.of(node).acts
        squared = name == "mul" and given.get("self") is given.get("other")
        exponent = given.get("exponent")
        even_power = name == "pow" and isinstance(exponent, (int, float)) and exponent % 2 == 0
        source = given.get("self")
        if not (squared or even_power or acts in EVEN) or not isinstance(source, fx.Node):
            return None
        if (
            node.all_input_nodes != [source]
            or not self._is_within(source, node, [node])
            or name_of_call(source) not in SUMS
        ):
            return None
        summed = self._sum(source)
        if summed is None or not all(term.key in (("plus",), ("minus",)) for term in summed.terms):
            return None
        terms = tuple(Term("term", t.nodes, 1 if t.key == ("plus",) else -1) for t in summed.terms)
        key = ("even", str(node.target), self._constants(given), tuple(source.meta["val"].shape))
        return Reading(key, terms, ordered=False, inside=(source, *summed.inside), even=True)

    # -- choices -------------------------------------------------------------------------------------------------------

    def _choice(self, node: fx.Node) -> Reading | None:
        """Values chosen one after the other by masks no two of which meet; None if there are no two of them."""
        terms: list[Term] = []
        inside: list[fx.Node] = []
        numbers: set[int] = set()
        alike: Hashable = None
        part: Any = node
        users: list[fx.Node] = []
        while part is node or (isinstance(part, fx.Node) and self._is_within(part, node, users)):
            found = self._chosen(part)
            if found is None or name_of(part) != name_of(node):
                break
            mask, value, rest = found
            value, viewed = self._as_long(value, part) if name_of(node) == "index_put" else (value, [])
            equals = self._equals_number(mask)
            if equals is None or equals[1] in numbers or (numbers and equals[0] != alike):
                break
            alike = equals[0]
            numbers.add(equals[1])
            terms.append(Term("if", (mask, value)))
            inside += [] if part is node else [part]
            inside += viewed
            part, users = rest, [part]
        if len(terms) < 2:
            return None
        terms.append(Term("rest", (part,)))
        key = ("choice", str(name_of(node)), str(first_result(node).dtype))  # type: ignore[union-attr]
        return Reading(key, tuple(terms), ordered=False, inside=tuple(inside))

    @staticmethod
    def _chosen(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
        """Of a choice by one mask: the mask, what stands where it is set, and what stands elsewhere."""
        if name_of_call(node) not in CHOICES:
            return None
        given = arguments_of(node)
        if name_of(node) == "where":
            found = given.get("condition"), given.get("self"), given.get("other")
        else:
            indices = given["indices"]
            if given["accumulate"] or len(indices) != 1:
                return None
            found = indices[0], given["values"], given["self"]
        mask, value, rest = found
        if not (isinstance(mask, fx.Node) and isinstance(value, fx.Node) and isinstance(rest, fx.Node)):
            return None
        return (mask, value, rest) if mask.meta["val"].dtype is torch.bool else None

    def _equals_number(self, mask: fx.Node) -> tuple[Hashable, int] | None:
        """Of a mask that says where something is a whole number: what, in which shape, and the number."""
        path: list[Hashable] = []
        while name_of_call(mask) in ("unsqueeze", "view", "expand", "squeeze"):
            if mask in self.memory.written:
                return None
            path.append((str(mask.target), self._constants(arguments_of(mask))))
            mask = arguments_of(mask)["self"]
        if name_of_call(mask) != "eq" or mask in self.memory.written:
            return None
        given = arguments_of(mask)
        source, number = given["self"], given["other"]
        if not isinstance(source, fx.Node) or type(number) is not int or source in self.memory.written:
            return None
        return (source, tuple(path)), number

    def _product(self, node: fx.Node, kind: str) -> Reading:
        """A product, maximum or the like, with all its factors."""
        terms: list[Term] = []
        inside: list[fx.Node] = []
        stack: list[tuple[Any, fx.Node]] = [(node, node)]
        while stack:
            part, user = stack.pop()
            opens = part is node or (
                kind in ASSOCIATIVE
                and isinstance(part, fx.Node)
                and part.op == "call_function"
                and COMMUTATIVE.get(self.name(part)) == kind
                and self._is_within(part, node, [user])
            )
            if not opens:
                terms.append(self._addend(part, False))
                continue
            if part is not node:
                inside.append(part)
            given = arguments_of(part)
            stack += [(given["self"], part), (given["other"], part)]
        return Reading((kind, str(first_result(node).dtype)), tuple(terms), ordered=False, inside=tuple(inside))  # type: ignore[union-attr]

    def _is_within(self, node: fx.Node, whole: fx.Node, users: Sequence[fx.Node]) -> bool:
        """Whether a part of a sum or product is used by these alone, and is of its type, so that it overflows alike."""
        val, result = first_result(node), first_result(whole)
        if val is None or result is None or val.dtype != result.dtype:
            return False
        return self._is_alone(node, users)

    def _is_alone(self, node: fx.Node, users: Sequence[fx.Node]) -> bool:
        """Whether nothing but these nodes reads a node."""
        return bool(node.users) and set(node.users) <= set(users) and node not in self.left and "read" not in node.meta


def _every_element_alone(tensor: torch.Tensor) -> bool:
    """Whether each element of a tensor has memory of its own, as those of an expanded one have not."""
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def name_of_call(node: Any) -> str:
    """The name of the operator that a node calls; none if it is no such node."""
    calls = isinstance(node, fx.Node) and node.op == "call_function" and node.target is not operator.getitem
    return name_of(node) if calls else ""


def _leaves(value: Any) -> Iterator[Any]:
    """The values in a nest of lists, in order."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _plain(value: Any) -> Any:
    """A value with a word in the place of each node."""
    if isinstance(value, (list, tuple, dict, slice)):
        return fx.node.map_arg(value, lambda _: "tensor")
    return value


def whole(tensor: TypedTensor) -> TypedTensor:
    """The tensor itself, where this is one use of it."""
    return tensor.use_of or tensor
