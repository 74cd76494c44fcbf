"""What a captured graph says of its tensors before any rule runs: each analysis once, with one look at its memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from torch import fx

from permgraph.inference.constancy import NONE, Uniform, known_values, uniform_dims, zero_nodes
from permgraph.inference.liveness import live_nodes, read_for_shape
from permgraph.inference.memory import Memory
from permgraph.inference.operators import Operators
from permgraph.inference.repeats import repeated_dims


class GraphFacts:
    """The facts of one graph.

    Args:
        nodes: the nodes in order.
        results: the results of a graph that has no output node.

    Attributes:
        operators: the declared properties of the operators.
        memory: which nodes share memory, and which of it is written to.
        uniform: for each node the dimensions along which it does not vary.
        known: the values of short integer vectors that the model's code has.
        live: the nodes on which anything outside the graph depends.
        for_shape: the parts and views of tensors of which no element is read.
        zeros: the nodes that are zero throughout, whatever the weights.
    """

    def __init__(self, nodes: Sequence[fx.Node], results: Sequence[fx.Node] = ()) -> None:
        self.nodes = nodes
        self.results = results
        self.operators = Operators()
        self.memory = Memory(nodes, self.operators)
        self.uniform = uniform_dims(nodes, self.memory.written, self.operators)
        self.known = known_values(nodes, self.memory.written, self.operators)
        self.live = self.live_but_for()
        self.for_shape = read_for_shape(nodes, self.memory, self.operators, results)
        self.zeros = zero_nodes(nodes, self.memory.written, self.operators)

    @cached_property
    def _repeats(self) -> Mapping[fx.Node, Uniform]:
        return repeated_dims(self.nodes, self.memory, self.uniform, self.operators)

    def repeats_of(self, node: fx.Node) -> Uniform:
        """The dimensions of a node along which elements may be equal; few graphs have an operator that minds."""
        return self._repeats.get(node, NONE)

    def live_but_for(self, zeros: Collection[fx.Node] = ()) -> set[fx.Node]:
        """The live nodes, if what is multiplied with one of these zeros counts for nothing."""
        return live_nodes(self.nodes, self.memory, self.operators, self.results, zeros)
