"""The record that passes from stage to stage: a captured graph, what is known of it, and the types of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from permgraph.algebra import Axes, Axis
from permgraph.inference.constancy import Uniform, known_values, uniform_dims, viewed_nodes, written_nodes, zero_nodes
from permgraph.inference.liveness import live_nodes
from permgraph.inference.repeats import tied_dims
from permgraph.rules.call import Call, Ledger, TypedTensor


@dataclass(frozen=True)
class GraphFacts:
    """What the graph says of tensors' values before any rule runs; see `constancy`, `repeats` and `liveness`."""

    nodes: Sequence[fx.Node]
    results: Sequence[fx.Node]  # of a graph without an output node
    uniform: Mapping[fx.Node, Uniform]
    tied: Mapping[fx.Node, Uniform]
    known: Mapping[fx.Node, tuple[int, ...]]
    viewed: Collection[fx.Node]
    live: Collection[fx.Node]
    zeros: Collection[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph, results: Sequence[fx.Node] = ()) -> GraphFacts:
        """Read them off a captured graph."""
        nodes = list(graph.nodes)
        constants = [n for n in nodes if n.op == "placeholder" and n.meta["kind"] == "constant"]
        written = written_nodes(nodes)
        uniform = uniform_dims(nodes, written, {node: constant_along(node.meta.get("real")) for node in constants})
        return cls(
            nodes,
            results,
            uniform=uniform,
            tied=tied_dims(nodes, written, uniform),
            known=known_values(nodes, written),
            viewed=viewed_nodes(nodes),
            live=live_nodes(nodes, results),
            zeros=zero_nodes(nodes, written),
        )


def constant_along(real: torch.Tensor | None) -> frozenset[int]:
    """The dimensions along which a constant does not vary, where its values are known."""
    if real is None or real.numel() == 0 or real.is_meta:
        return frozenset()
    same = [real] if real.is_complex() else [real, real.signbit()]  # tell -0.0 from 0.0
    return frozenset(d for d in range(real.ndim) if all(bool((x == x.narrow(d, 0, 1)).all()) for x in same))


@dataclass
class Solution:
    """Every tensor of the graph with its axes, and what the rules said to make them so.

    Attributes:
        values: of each node a typed tensor, or a nest of them.
        parameters: the weights by their names.
        order: names of floating-point parameters in the order in which the forward pass first reads them.
        unread: names of those that it never reads.
        calls: the operators, each with what its rule said.
        ends: what was said of inputs, outputs and what no operator reads.
    """

    facts: GraphFacts
    axes: Axes
    values: dict[fx.Node, Any] = field(default_factory=dict)
    parameters: dict[str, TypedTensor] = field(default_factory=dict)
    order: Sequence[str] = ()
    unread: Sequence[str] = ()
    calls: list[Call] = field(default_factory=list)
    ends: Ledger = field(default_factory=Ledger)

    @property
    def nodes(self) -> Sequence[fx.Node]:
        return self.facts.nodes

    def ledger(self) -> Ledger:
        """All that was said, of the ends first."""
        return Ledger.joined([self.ends, *(call.ledger for call in self.calls)])

    def tensors(self) -> list[TypedTensor]:
        """Every tensor once."""
        every = [*tensors_in(list(self.values.values())), *self.parameters.values()]
        return list({id(tensor): tensor for tensor in every}.values())

    def weights_read(self) -> list[tuple[int, fx.Node]]:
        """The parameters and buffers that some operator takes, with their numbers."""
        return [(number, node) for number, node in enumerate(self.nodes) if is_weight(node) and node.users]

    def pin(self, number: int, value: Any, reason: str, free: frozenset[int] = frozenset()) -> None:
        """Pin all dimensions but `free` of a tensor, or of each in a list, on behalf of the node of this number."""
        for tensor in reversed(tensors_in(value)):
            end = Call(self.nodes[number], number, {}, [], self.axes, self.ends, {})
            end.pin(tensor, [d for d in range(tensor.ndim) if d not in free], reason)
            end.pin_values(tensor, reason)


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a parameter or a persistent buffer."""
    return node.op == "placeholder" and node.meta["kind"] in ("parameter", "buffer")


def tensors_in(value: Any) -> list[TypedTensor]:
    """The typed tensors in a nest of lists."""
    found, stack = [], [value]
    while stack:
        value = stack.pop()
        if isinstance(value, TypedTensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
    return found


def axes_of(tensor: TypedTensor) -> list[Axis]:
    """The axes of its dimensions, and that which its values number if there is one."""
    return tensor.dims if tensor.value is None else [*tensor.dims, tensor.value]
