"""Dimensions along which a tensor does not vary, whatever the weights: zeros, ones, and what was expanded.

Such a dimension has no order that a use could mind. So each use of the tensor gets axes of its own there, and none of
its links ties them: the zeros from which two recurrent layers start do not tie the hidden units of the one to those
of the other.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from permgraph.capture.schema import signature
from permgraph.rules.pointwise import ARITHMETIC, COPIES

CONSTANT = """
    zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor _efficientzerotensor
"""
MOVING = """
    view _unsafe_view reshape flatten unflatten _reshape_alias repeat select unbind slice narrow split
    split_with_sizes chunk
"""
CREATED = frozenset(CONSTANT.split())
_MOVING = frozenset(MOVING.split())
_COPIES = frozenset(COPIES.split())
_BY_ELEMENT = _COPIES | frozenset([*ARITHMETIC.split(), "eq", "ne", "where", "masked_fill"])

_PASSING = _MOVING | _COPIES | frozenset(["permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "view_as"])
_PRODUCTS = frozenset(["mm", "bmm", "mv", "mul"])
#: Where the factors stand among the arguments.
_FACTORS = {"mm": 0, "bmm": 0, "mv": 0, "linear": 0, "convolution": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}

MAX_KNOWN = 64

Uniform = frozenset[int]
NONE: Uniform = frozenset()


def uniform_dims(
    nodes: Sequence[fx.Node], written: Collection[fx.Node], constants: Mapping[fx.Node, Uniform]
) -> dict[fx.Node, Uniform]:
    """For each node with a single floating-point or boolean result, the dimensions along which it does not vary.

    Memory that is written to in place (see `written_nodes`) counts as varying. `constants` says it of placeholders.
    """
    found: dict[fx.Node, Uniform] = {}
    for node in nodes:
        if node not in written:
            dims = constants.get(node, NONE) if node.op == "placeholder" else _of_call(node, found)
            val = _first(node)
            if dims and val is not None and (val.dtype is torch.bool or val.dtype.is_floating_point):
                several = isinstance(node.meta["val"], (list, tuple))
                found[node] = frozenset(d for d in dims if several or val.shape[d] > 1)
    return {node: dims for node, dims in found.items() if isinstance(node.meta["val"], torch.Tensor)}


def _of_call(node: fx.Node, found: Mapping[fx.Node, Uniform]) -> Uniform:
    if node.op != "call_function":
        return NONE
    if node.target is operator.getitem:
        source = node.args[0]
        return found.get(source, NONE) if isinstance(source, fx.Node) else NONE
    name = getattr(node.target, "_opname", "")
    out = _first(node)
    if out is None or name.endswith("_"):
        return NONE
    every = frozenset(range(out.ndim))
    if name in CREATED:
        return every
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if name == "expand":
        return _expanded(sources[0].meta["val"], out, found.get(sources[0], NONE))
    if not any(source in found for source in sources):
        return NONE
    if name in _BY_ELEMENT:
        return frozenset(d for d in every if all(_alike(s.meta["val"], found.get(s, NONE), out, d) for s in sources))
    source = sources[0]
    given, x = found.get(source, NONE), source.meta["val"]
    entirely = all(
        all(d in found.get(s, NONE) or size == 1 for d, size in enumerate(s.meta["val"].shape)) for s in sources
    )
    if len(sources) == 1 and name in _MOVING:
        return every if entirely else NONE
    if name in ("permute", "transpose", "t"):
        order = _order(name, node.args, x.ndim)
        return frozenset(d for d, old in enumerate(order) if old in given)
    if name == "unsqueeze":
        at = node.args[1] % (x.ndim + 1)
        return frozenset(d + (d >= at) for d in given)
    return NONE


def _alike(x: torch.Tensor, uniform: Uniform, out: torch.Tensor, d: int) -> bool:
    """Whether an operand does not vary along dimension d of the elementwise result."""
    own = d - (out.ndim - x.ndim)
    return own < 0 or x.shape[own] == 1 or own in uniform


def _expanded(x: torch.Tensor, out: torch.Tensor, given: Uniform) -> Uniform:
    lead = out.ndim - x.ndim
    return frozenset(d for d in range(out.ndim) if d < lead or x.shape[d - lead] != out.shape[d] or d - lead in given)


def _order(name: str, args: Sequence[Any], ndim: int) -> list[int]:
    order = list(range(ndim))
    if name == "permute":
        return [d % ndim for d in args[1]]
    if ndim > 1:
        i, j = (args[1] % ndim, args[2] % ndim) if name == "transpose" else (0, 1)
        order[i], order[j] = order[j], order[i]
    return order


def _first(node: fx.Node) -> torch.Tensor | None:
    val = node.meta.get("val")
    if isinstance(val, (list, tuple)) and val:
        val = val[0]
    return val if isinstance(val, torch.Tensor) else None


def zero_nodes(nodes: Sequence[fx.Node], written: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that are zero throughout, whatever the weights: a recurrent layer's first state, and its products."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node in written:
            continue
        name = getattr(node.target, "_opname", "")
        if node.op == "placeholder":
            real = node.meta.get("real") if node.meta["kind"] == "constant" else None
            if real is not None and real.numel() > 0 and not real.is_meta and not bool(real.any()):
                found.add(node)
        elif name in CREATED:
            given = (*node.args[1:3], node.kwargs.get("fill_value")) if "full" in name else ()
            if "zero" in name or any(isinstance(value, (int, float)) and value == 0 for value in given):
                found.add(node)
        elif name in _PASSING or node.target is operator.getitem:
            source = node.args[0]
            if isinstance(source, fx.Node) and source in found:
                found.add(node)
        elif name in _PRODUCTS and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def contracted_with(node: fx.Node) -> tuple[fx.Node, int, fx.Node, int] | None:
    """The two factors of a matrix product or convolution, each with the dimension over which the product sums."""
    name = getattr(node.target, "_opname", "")
    at = _FACTORS.get(name)
    if at is None:
        return None
    left, right = node.args[at : at + 2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if name == "convolution":
        return left, 1, right, 0 if node.args[6] else 1
    return left, -1, right, -1 if name == "linear" or right.meta["val"].ndim == 1 else -2


def known_values(nodes: Sequence[fx.Node], written: Collection[fx.Node]) -> dict[fx.Node, tuple[int, ...]]:
    """The values of short integer vectors that the code itself has: what it indexes with is as good as a slice."""
    found: dict[fx.Node, tuple[int, ...]] = {}
    for node in nodes:
        val = node.meta.get("val")
        if node in written or not isinstance(val, torch.Tensor) or val.ndim != 1 or not 0 < len(val) <= MAX_KNOWN:
            continue
        if val.dtype.is_floating_point or val.dtype.is_complex or val.dtype is torch.bool:
            continue
        if node.op == "placeholder" and node.meta["kind"] == "constant" and node.meta.get("real") is not None:
            found[node] = tuple(node.meta["real"].tolist())
        elif getattr(node.target, "_opname", "") in _COPIES:
            source = node.args[0]
            if isinstance(source, fx.Node) and source in found:
                found[node] = found[source]
    return found


class Memory:
    """Which nodes of a graph may share memory, and which operators write to it."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._shared: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            if node.op == "call_function":
                for source, writes in _aliased(node):
                    self._shared[self.owner(node)] = self.owner(source)
                    if writes:
                        self._written.setdefault(node, []).append(source)

    def owner(self, node: fx.Node) -> fx.Node:
        """One node that stands for all that may share this one's memory: the first of them."""
        while (shared := self._shared.get(node, node)) is not node:
            node = shared
        return node

    def written_by(self, node: fx.Node) -> Sequence[fx.Node]:
        """The arguments that an operator writes to."""
        return self._written.get(node, ())

    def written(self) -> set[fx.Node]:
        """The owners of the memory that some operator writes to."""
        return {self.owner(source) for sources in self._written.values() for source in sources}


def written_nodes(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes whose memory some operator writes to, through whichever view."""
    memory = Memory(nodes)
    owners = memory.written()
    return {node for node in nodes if memory.owner(node) in owners}


def viewed_nodes(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes whose memory is seen by two tensors or more: by one, and by views of it."""
    memory = Memory(nodes)
    views = (n for n in nodes if n.op == "call_function" and n.target is not operator.getitem)
    owners = {memory.owner(n) for n in views if (ties := list(_aliased(n))) and not any(writes for _, writes in ties)}
    return {node for node in nodes if memory.owner(node) in owners}


def _aliased(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The arguments whose memory the result may share, and whether it is written to."""
    known = signature(node.target)
    name = getattr(node.target, "_opname", "")
    if node.target is operator.getitem or known is None or name in _COPIES:
        yield from ((source, False) for source in node.all_input_nodes)
        return
    for i, argument in enumerate(known.arguments):
        if argument.shares:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for source in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(source, fx.Node):
                    yield source, argument.writes
