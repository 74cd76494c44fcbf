"""The record that passes from stage to stage: a captured graph, what is known of it, and the types of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from permgraph.algebra import Axes, Axis
from permgraph.capture.record import Limits
from permgraph.inference.facts import GraphFacts
from permgraph.rules.call import Call
from permgraph.rules.ledger import Ledger
from permgraph.rules.typed_tensor import TypedTensor


@dataclass(frozen=True)
class StandIn:
    """A part of the model that no pass reached, and the siblings of it in whose places it was put."""

    part: str
    siblings: tuple[str, ...]


@dataclass
class Solution:
    """Every tensor of the graph with its axes, and what the rules said to make them so.

    Attributes:
        values: of each node a typed tensor, or a nest of them.
        parameters: the weights by their names.
        uses: of tensors that one use alone sees, by their `id`, the node that is used.
        order: names of floating-point parameters in the order in which the forward pass first reads them.
        unread: names of those that it never reads.
        calls: the operators, each with what its rule said.
        ends: what was said of inputs, outputs and what no operator reads.
        limits: when the time to solve is up, if ever.
        stand_ins: the parts that no pass reached, and whose places they took.
        unseen: the weights that met only constants where these are taken to be constant in every run.
    """

    facts: GraphFacts
    axes: Axes
    values: dict[fx.Node, Any] = field(default_factory=dict)
    parameters: dict[str, TypedTensor] = field(default_factory=dict)
    uses: dict[int, fx.Node] = field(default_factory=dict)
    order: Sequence[str] = ()
    unread: Sequence[str] = ()
    calls: list[Call] = field(default_factory=list)
    ends: Ledger = field(default_factory=Ledger)
    limits: Limits | None = None
    stand_ins: tuple[StandIn, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def nodes(self) -> Sequence[fx.Node]:
        return self.facts.nodes

    def out_of_time(self) -> bool:
        """Whether the time to solve is up: what has no types yet is pinned then."""
        return self.limits is not None and self.limits.over()

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
