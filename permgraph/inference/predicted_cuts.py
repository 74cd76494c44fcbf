"""Where factors will be cut, read off the graph before any rule runs.

A fused projection is viewed as ``(3, H, D)`` and its three parts are taken some operators later. The solver learns of
that by running into it, and then starts anew (see `Factors`). What can be seen beforehand spares it the first run:
a view that makes a factor of one dimension, and a part of that factor taken after nothing but changes of place.
What is overlooked here costs one more run, and nothing else.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx

from permgraph.algebra import FactorKey
from permgraph.inference.operators import Operators, arguments_of, dimensions_kept, name_of
from permgraph.rules.typed_tensor import matching_dims

PLACEHOLDER = "placeholder"

_VIEWS = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"])
_TAKING = frozenset(["select", "unbind", "split", "split_with_sizes", "chunk", "slice", "narrow"])

MadeFactors = dict[int, FactorKey]  # the dimensions of a tensor that are factors as they were made, and their names


def foreseen_cuts(
    nodes: Sequence[fx.Node], operators: Operators, for_shape: Collection[fx.Node] = ()
) -> dict[FactorKey, tuple[int, ...]]:
    """The points at which the factors that views make, and the dimensions of parameters, are cut by taking parts.

    Those taken for their shape alone cut nothing.
    """
    made: dict[fx.Node, MadeFactors] = {}
    cuts: dict[FactorKey, set[int]] = {}
    for number, node in enumerate(nodes):
        val = node.meta.get("val")
        if node.op == "placeholder" and isinstance(val, torch.Tensor) and node.meta["kind"] != "input":
            made[node] = {d: (PLACEHOLDER, number, d) for d in range(val.ndim)}
        if node.op != "call_function" or node.target is operator.getitem or not node.args or node in for_shape:
            continue
        source = node.args[0]
        x = source.meta.get("val") if isinstance(source, fx.Node) else None
        if not isinstance(source, fx.Node) or not isinstance(x, torch.Tensor):
            continue
        name = name_of(node)
        known = made.get(source, {})
        if known:
            for dim, points in _taken(name, node, x):
                if dim in known:
                    cuts.setdefault(known[dim], set()).update(p for p in points if 0 < p < x.shape[dim])
        if isinstance(val, torch.Tensor):
            factors = _made(number, x, val) if name in _VIEWS else {}
            if known and name not in _VIEWS:
                order = range(x.ndim) if operators.of(node).values == "same" else dimensions_kept(node, x.shape)
                factors = {at: known[d] for at, d in enumerate(order or ()) if d is not None and d in known}
            if factors:
                made[node] = factors
    return {key: tuple(sorted(points)) for key, points in cuts.items() if points}


def _made(number: int, x: torch.Tensor, out: torch.Tensor) -> MadeFactors:
    """The factors that a view makes of one dimension, by the names under which the solver will make them."""
    if x.dtype.itemsize != out.dtype.itemsize or 0 in x.shape:
        return {}
    split = []
    for left, right in matching_dims(tuple(x.shape), tuple(out.shape)):
        inner = [d for d in right if out.shape[d] > 1]
        if len(left) == 1 and len(inner) > 1:
            split.append((x.shape[left[0]], inner))
    shapes = [(size, tuple(out.shape[d] for d in inner)) for size, inner in split]
    alike = Counter(shapes)  # which of several alike comes first depends on what is pinned by then
    return {
        d: (number, *shape, 0, position)
        for shape, (_, inner) in zip(shapes, split, strict=True)
        if alike[shape] == 1
        for position, d in enumerate(inner)
    }


def _taken(name: str, node: fx.Node, x: torch.Tensor) -> Iterator[tuple[int, Sequence[int]]]:
    """The dimension of which an operator takes a part, and the two ends of each part."""
    if name not in _TAKING:
        return
    given = arguments_of(node)
    dim = given.get("dim", 0) % max(x.ndim, 1) if isinstance(given.get("dim", 0), int) else 0
    size = x.shape[dim] if x.ndim else 0
    val = node.meta["val"]
    if name == "select":
        at = given["index"] % size
        yield dim, (at, at + 1)
    elif name == "unbind":
        yield dim, range(size)
    elif name in ("split", "split_with_sizes", "chunk"):
        start = 0
        for part in val:
            start += part.shape[dim]
            yield dim, (start,)
    elif name in ("slice", "narrow") and (given.get("step") or 1) == 1:
        start = given.get("start") or 0
        start = min(max(start + size if start < 0 else start, 0), size)
        yield dim, (start, start + val.shape[dim])
