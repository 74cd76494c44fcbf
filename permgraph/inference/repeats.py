"""Dimensions along which elements of a tensor may be equal by more than chance.

A ReLU gives many zeros, a comparison ones and zeros, padding the same value again. Where the largest of such elements
is looked for, the first of several wins, so that their places matter. Each operator declares where the values of its
results come from (`permgraph.rules.properties.Values`), and one that declares nothing may give equal ones; inputs and
weights are taken to hold distinct values. Elements that weights have mixed are taken to differ, unless what was mixed
has equal slices, such as rows of zeros (of padding, as a mask leaves it), or may be zero throughout; and so are those
that a mask has left, unless the mask tells large elements from small.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from permgraph.inference.constancy import NONE, Uniform
from permgraph.inference.memory import Memory
from permgraph.inference.operators import Operators, arguments_of, contracted_with, is_real, name_of
from permgraph.rules.properties import Properties

EQUAL_SLICES = frozenset(["unknown", "padded"])  # whole slices of the result may be one number throughout
CARRIED = frozenset(["moved", "joined", "looked up", "derived"])  # equal elements stay equal, uniform ones meet others
UNREAD = frozenset(["same", "kept", "reduced", "moved"])  # what only these take part in decides nothing by itself
DEPTH = 4  # so many operators deep a sum is taken apart, and operands are followed to what they have in common


def repeated_dims(
    nodes: Sequence[fx.Node], memory: Memory, uniform: Mapping[fx.Node, Uniform], operators: Operators
) -> dict[fx.Node, Uniform]:
    """For each node the dimensions along which its elements may be equal; those along which all are, left out."""
    search = _Search(nodes, memory, uniform, operators)
    while search.grew:
        search.grew = False
        for node in nodes:
            search.visit(node)
    return search.repeats


class _Search:
    """What is known so far; memory that is written to is one with all that sees it."""

    def __init__(
        self, nodes: Sequence[fx.Node], memory: Memory, uniform: Mapping[fx.Node, Uniform], operators: Operators
    ) -> None:
        self.repeats: dict[fx.Node, Uniform] = {}
        self.grew = True
        self._uniform = uniform
        self._written: Collection[fx.Node] = memory.written
        self._memory = memory
        self._operators = operators
        self._written_repeats: set[fx.Node] = set()  # the owners of written memory that has equal elements somewhere
        self._equal_slices: set[fx.Node] = set()  # what has equal slices (of written memory, its owner)
        self._compares: set[fx.Node] = set()  # masks that tell large elements from small
        self._may_be_zero: set[fx.Node] = set()  # where a mask, or a ReLU, says so

    def visit(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        properties = self._operators.of(node)
        if self._tells_large_from_small(node, properties):
            self._compares.add(node)
        if self._is_zeroed(node, val, properties):
            self._may_be_zero.add(node)
        ndim = _widest(val)
        if node.op == "call_function" and self._has_equal_slices(node, properties):
            self.grew |= self._home(node) not in self._equal_slices
            self._equal_slices.add(self._home(node))
        owner = self._memory.owner(node) if node in self._written else None
        dims = frozenset(range(ndim)) if owner in self._written_repeats else self._dims(node, val, ndim, properties)
        if dims - self.repeats.get(node, NONE):
            self.repeats[node] = dims | self.repeats.get(node, NONE)
            self.grew = True
            if owner is not None:
                self._written_repeats.add(owner)

    def _dims(self, node: fx.Node, val: object, ndim: int, properties: Properties) -> Uniform:
        every = frozenset(range(ndim))
        if isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex()):
            return every
        if node.op != "call_function":
            return NONE
        values = properties.values
        sources = [n for n in node.all_input_nodes if is_real(n)] if properties.reads_values else []
        if values in ("unknown", "repeat", "padded") or (values == "constant" and node in self._written):
            return every
        if _is_flat(node, properties) or node.kwargs.get("rounding_mode") is not None:
            return every
        if values == "derived" and _is_of_one_element(node):
            return every
        if values == "looked up" and not self._equal_in(sources[:1]):
            return _looked_up(node, name_of(node), ndim)
        if values in CARRIED:
            return every if self._equal_in(sources) or any(s in self._uniform for s in sources) else NONE
        if values in ("kept", "reduced"):
            if name_of(node) == "expand" and not self._equal_in(sources):
                # of memory that is written to, else it is uniform
                return _repeated(sources[0].meta["val"], val) if node in self._written else NONE
            return every if self._equal_in(sources) else NONE
        if properties.elementwise:
            return self._by_element(
                node, properties, [n for n in node.all_input_nodes if _widest(n.meta.get("val"))], every
            )
        if values == "mixed" and self._home(node) in self._equal_slices:
            return every - {properties.bias[1] % ndim} if properties.bias and _has_bias(node, properties) else every
        return NONE

    def _home(self, node: fx.Node) -> fx.Node:
        return self._memory.owner(node) if node in self._written else node

    def _has_equal_slices(self, node: fx.Node, properties: Properties) -> bool:
        values = properties.values
        if values in EQUAL_SLICES or (values == "constant" and node in self._written):
            return True
        sources = [n for n in node.all_input_nodes if is_real(n)] if properties.reads_values else []
        if values == "joined" and any(self._is_one_number(source) for source in sources):
            return True
        if self._is_switched(node, properties, sources):
            return True
        equal = [source for source in sources if self._home(source) in self._equal_slices or source in self._uniform]
        if properties.elementwise and values != "product":
            varying = [s for s in sources if self._varies_at_all(s)]
            return bool(equal) and all(source in equal for source in varying)
        return bool(equal) and values != "constant"

    def _is_switched(self, node: fx.Node, properties: Properties, sources: Sequence[fx.Node]) -> bool:
        """Whether slices may be one number throughout: switched off by a mask, or mixed from zeros alone."""
        if properties.values == "mixed":
            product = contracted_with(node, properties)
            if product is None or _has_bias(node, properties):
                return False
            return product[0] in self._may_be_zero or product[2] in self._may_be_zero
        if properties.values == "product":
            switches, switched = [n for n in node.all_input_nodes if n in self._may_be_zero], sources
        elif properties.values == "choice":
            given = [a for a in node.args if isinstance(a, fx.Node)]
            switches, switched = [n for n in given if n.meta["val"].dtype is torch.bool], sources
            if len([s for s in switched if self._varies_at_all(s)]) > 1:
                return False
        else:
            return False
        dims = range(-_widest(node.meta["val"]), 0)
        return any(not self._varies(s, d) and any(self._varies(o, d) for o in switched) for s in switches for d in dims)

    def _is_zeroed(self, node: fx.Node, val: object, properties: Properties) -> bool:
        if isinstance(val, torch.Tensor) and (val.dtype is torch.bool or (node.op == "placeholder" and _is_whole(val))):
            return True
        if node.op == "call_function" and (properties.values in ("unknown", "repeat") or _is_flat(node, properties)):
            return True
        if node.op == "call_function" and properties.elementwise:
            varying = [s for s in node.all_input_nodes if _widest(s.meta.get("val")) and self._varies_at_all(s)]
            if len(varying) > 1 and self._may_cancel(node, varying):
                return True
        passing = properties.values in UNREAD or properties.values == "product"
        return passing and any(source in self._may_be_zero for source in node.all_input_nodes)

    def _is_one_number(self, source: fx.Node) -> bool:
        same = self._uniform.get(source, NONE)
        return all(size == 1 or d in same for d, size in enumerate(source.meta["val"].shape))

    def _equal_in(self, sources: Sequence[fx.Node]) -> bool:
        return any(source in self.repeats for source in sources)

    def _by_element(self, node: fx.Node, properties: Properties, sources: Sequence[fx.Node], every: Uniform) -> Uniform:
        values = properties.values
        if values == "choice" and any(n in self._compares for n in node.all_input_nodes):
            return every
        if values == "product" and self._equal_in(sources):
            return every
        varying = [s for s in sources if self._varies_at_all(s)]
        if len(varying) > 1 and self._may_cancel(node, varying):
            return every
        repeated = set()
        for d in every:
            along = [s for s in varying if self._varies(s, d - len(every))]
            if along and (
                all(d - len(every) + s.meta["val"].ndim in self.repeats.get(s, NONE) for s in along)
                or (values == "limit" and len(along) < len(node.all_input_nodes))
            ):
                repeated.add(d)
        return frozenset(repeated)

    def _may_cancel(self, node: fx.Node, operands: Sequence[fx.Node]) -> bool:
        """Whether operands follow, element by element, from one tensor, so that it may cancel: ``x - x.abs()``.

        Of a sum such as ``x + (x.round() - x).detach()`` only the rounded x is left.
        """
        terms: Counter[fx.Node] = Counter()
        self._add_terms(node, 1, terms)
        if any(count == 0 for count in terms.values()) and all(n in self.repeats for n in terms if terms[n]):
            return True
        roots = [set(self._roots(operand, DEPTH)) for operand in operands]
        return any(roots[i] & roots[j] for i in range(len(roots)) for j in range(i))

    def _roots(self, node: fx.Node, depth: int) -> Iterator[fx.Node]:
        """The tensors of which a node is a function element by element; the parts of a split are tensors apart."""
        properties = self._operators.of(node)
        passing = properties.elementwise or (properties.values in ("moved", "kept") and node.target is not getitem)
        passing |= properties.values == "reduced" and _reduces_nothing(node)
        if not depth or not passing or not (sources := [n for n in node.all_input_nodes if self._varies_at_all(n)]):
            yield node
            return
        for source in sources:
            yield from self._roots(source, depth - 1)

    def _add_terms(self, node: fx.Node, sign: int, terms: Counter[fx.Node], depth: int = DEPTH) -> None:
        """Count what is added up in a sum: of ``x + (x.round() - x).detach()`` only the rounded x is left."""
        while self._operators.of(node).values == "same" and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        given = [argument for argument in node.args if isinstance(argument, fx.Node)]
        sums = name_of(node) in ("add", "sub") and len(given) == 2 and not node.kwargs and node not in self._written
        if sums and depth:
            self._add_terms(given[0], sign, terms, depth - 1)
            self._add_terms(given[1], sign if name_of(node) == "add" else -sign, terms, depth - 1)
        else:
            terms[node] += sign

    def _varies(self, source: fx.Node, d: int) -> bool:
        """Whether an operand varies along a dimension, counted from the last."""
        val = source.meta["val"]
        return val.ndim >= -d and val.shape[d] > 1 and val.ndim + d not in self._uniform.get(source, NONE)

    def _varies_at_all(self, source: fx.Node) -> bool:
        return any(self._varies(source, d) for d in range(-_widest(source.meta.get("val")), 0))

    def _tells_large_from_small(self, node: fx.Node, properties: Properties) -> bool:
        val = node.meta.get("val")
        if node.op != "call_function" or not isinstance(val, torch.Tensor) or val.dtype.is_floating_point:
            return False
        sources = [source for source in node.all_input_nodes if is_real(source)]
        if sources and (properties.compares or properties.values == "unknown"):
            return True
        return any(source in self._compares for source in node.all_input_nodes) or any(
            source in self._may_be_zero for source in sources
        )


def _is_flat(node: fx.Node, properties: Properties) -> bool:
    """Whether a number among the arguments makes the function flat: the slope of a leaky ReLU, if it is zero."""
    if not properties.repeats_if_zero:
        return False
    given = arguments_of(node)
    numbers = [given.get(name) for name in properties.repeats_if_zero]
    return any(isinstance(number, (int, float)) and number == 0 for number in numbers)


def _is_of_one_element(node: fx.Node) -> bool:
    """Whether what an operator normalises, or ranks, along a dimension has one element there: the same everywhere."""
    given, source = arguments_of(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], torch.Tensor):
        return False
    if "normalized_shape" in given:
        return bool(math.prod(given["normalized_shape"]) == 1)
    if "HxW" in given:
        return bool(given["C"] * given["HxW"] == given["group"])
    shape, dim = source.meta["val"].shape, given.get("dim")
    return bool(shape) and isinstance(dim, int) and shape[dim] == 1


def _reduces_nothing(node: fx.Node) -> bool:
    """Whether a reduction, over dimensions of one element, leaves the elements as they are."""
    source, val = node.args[0], node.meta["val"]
    given = source.meta["val"] if isinstance(source, fx.Node) else None
    return isinstance(given, torch.Tensor) and isinstance(val, torch.Tensor) and given.numel() == val.numel()


def _has_bias(node: fx.Node, properties: Properties) -> bool:
    return properties.bias is not None and arguments_of(node).get(properties.bias[0]) is not None


def _repeated(x: torch.Tensor, out: object) -> Uniform:
    """The dimensions along which an expansion repeats a tensor."""
    assert isinstance(out, torch.Tensor)
    lead = out.ndim - x.ndim
    return frozenset(d for d, size in enumerate(out.shape) if d < lead or x.shape[d - lead] != size)


def _is_whole(val: torch.Tensor) -> bool:
    return not (val.is_floating_point() or val.is_complex())


def _widest(val: object) -> int:
    if isinstance(val, (list, tuple)):
        return max((_widest(item) for item in val), default=0)
    return val.ndim if isinstance(val, torch.Tensor) else 0


def _looked_up(node: fx.Node, name: str, ndim: int) -> Uniform:
    """The dimensions of a lookup's result that the index runs over."""
    given: Any = node.args[1]
    if name == "embedding":
        return frozenset(range(given.meta["val"].ndim))
    if name in ("gather", "index_select"):
        return frozenset([given % max(ndim, 1)])
    indices = {d: i.meta["val"] for d, i in enumerate(given) if i is not None}
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices.values()):
        return NONE
    first = min(indices) if max(indices) - min(indices) < len(indices) else 0
    return frozenset(range(first, min(ndim, first + max(i.ndim for i in indices.values()))))
