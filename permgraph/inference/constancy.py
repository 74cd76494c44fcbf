"""Dimensions along which a tensor does not vary, whatever the weights: zeros, ones, and what was expanded.

Such a dimension has no order that a use could mind. So each use of the tensor gets axes of its own there, and none of
its links ties them: the zeros from which two recurrent layers start do not tie the hidden units of the one to those
of the other.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from permgraph.inference.operators import Operators, arguments_of, dimensions_kept, first_result, name_of

MAX_KNOWN = 64

Uniform = frozenset[int]
NONE: Uniform = frozenset()


def constant_along(real: torch.Tensor | None) -> Uniform:
    """The dimensions along which a constant does not vary, where its values are known."""
    if real is None or real.numel() == 0 or real.is_meta:
        return NONE
    same = [real] if real.is_complex() else [real, real.signbit()]  # tell -0.0 from 0.0
    return frozenset(d for d in range(real.ndim) if all(bool((x == x.narrow(d, 0, 1)).all()) for x in same))


def uniform_dims(
    nodes: Sequence[fx.Node], written: Collection[fx.Node], operators: Operators
) -> dict[fx.Node, Uniform]:
    """For each node with a single floating-point or boolean result, the dimensions along which it does not vary.

    Memory that is written to in place counts as varying.
    """
    uniform: dict[fx.Node, Uniform] = {}
    for node in nodes:
        if node in written:
            continue
        if node.op == "placeholder":
            dims = constant_along(node.meta.get("real")) if node.meta["kind"] == "constant" else NONE
        else:
            dims = _of_call(node, uniform, operators)
        val = first_result(node)
        if dims and val is not None and (val.dtype is torch.bool or val.dtype.is_floating_point):
            several = isinstance(node.meta["val"], (list, tuple))
            uniform[node] = frozenset(d for d in dims if several or val.shape[d] > 1)
    return {node: dims for node, dims in uniform.items() if isinstance(node.meta["val"], torch.Tensor)}


def _of_call(node: fx.Node, uniform: Mapping[fx.Node, Uniform], operators: Operators) -> Uniform:
    if node.op != "call_function":
        return NONE
    if node.target is operator.getitem:
        source = node.args[0]
        return uniform.get(source, NONE) if isinstance(source, fx.Node) else NONE
    out = first_result(node)
    if out is None or getattr(node.target, "_opname", "").endswith("_"):
        return NONE
    every = frozenset(range(out.ndim))
    properties = operators.of(node)
    if properties.values == "constant":
        return every
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if name_of(node) == "expand":
        return _expanded(sources[0].meta["val"], out, uniform.get(sources[0], NONE))
    if not any(source in uniform for source in sources):
        return NONE
    if properties.elementwise:
        return frozenset(d for d in every if all(_alike(s.meta["val"], uniform.get(s, NONE), out, d) for s in sources))
    given = uniform.get(sources[0], NONE)
    if len(sources) == 1 and (properties.values == "moved" or name_of(node) == "repeat"):
        return every if all(d in given or size == 1 for d, size in enumerate(sources[0].meta["val"].shape)) else NONE
    order = dimensions_kept(node, sources[0].meta["val"].shape)
    return frozenset(d for d, old in enumerate(order or ()) if old in given)


def _alike(x: torch.Tensor, uniform: Uniform, out: torch.Tensor, d: int) -> bool:
    """Whether an operand does not vary along dimension d of the elementwise result."""
    own = d - (out.ndim - x.ndim)
    return own < 0 or x.shape[own] == 1 or own in uniform


def _expanded(x: torch.Tensor, out: torch.Tensor, given: Uniform) -> Uniform:
    lead = out.ndim - x.ndim
    return frozenset(d for d in range(out.ndim) if d < lead or x.shape[d - lead] != out.shape[d] or d - lead in given)


def zero_nodes(nodes: Sequence[fx.Node], written: Collection[fx.Node], operators: Operators) -> set[fx.Node]:
    """The nodes that are zero throughout, whatever the weights: a recurrent layer's first state, and its products."""
    zeros: set[fx.Node] = set()
    for node in nodes:
        if node in written:
            continue
        if node.op == "placeholder":
            real = node.meta.get("real") if node.meta["kind"] == "constant" else None
            if real is not None and real.numel() > 0 and not real.is_meta and not bool(real.any()):
                zeros.add(node)
            continue
        properties = operators.of(node)
        sources = node.all_input_nodes if properties.reads_values else []
        if properties.values == "constant" and properties.zeros is None:
            given = [arguments_of(node).get(name) for name in ("fill_value", "s")]
            is_zero = any(isinstance(value, (int, float)) and value == 0 for value in given)
        else:
            among = [source in zeros for source in sources] or [not properties.reads_values]
            is_zero = properties.zeros is not None and (all(among) if properties.zeros == "all" else any(among))
        if is_zero:
            zeros.add(node)
    return zeros


def known_values(
    nodes: Sequence[fx.Node], written: Collection[fx.Node], operators: Operators
) -> dict[fx.Node, tuple[int, ...]]:
    """The values of short integer vectors that the code itself has: what it indexes with is as good as a slice."""
    known: dict[fx.Node, tuple[int, ...]] = {}
    for node in nodes:
        val = node.meta.get("val")
        if node in written or not isinstance(val, torch.Tensor) or val.ndim != 1 or not 0 < len(val) <= MAX_KNOWN:
            continue
        if val.dtype.is_floating_point or val.dtype.is_complex or val.dtype is torch.bool:
            continue
        if node.op == "placeholder" and node.meta["kind"] == "constant" and node.meta.get("real") is not None:
            known[node] = tuple(node.meta["real"].tolist())
        elif operators.of(node).values == "same":
            source = node.args[0]
            if isinstance(source, fx.Node) and source in known:
                known[node] = known[source]
    return known
