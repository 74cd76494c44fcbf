"""Which nodes of a graph may share memory, and which operators write to it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

from torch import fx

from permgraph.capture.schema import signature
from permgraph.inference.operators import Operators


class Memory:
    """For each node one that stands for all that may share its memory, and what writes there."""

    def __init__(self, nodes: Sequence[fx.Node], operators: Operators) -> None:
        self._operators = operators
        self._shared: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}
        views = []
        for node in nodes:
            if node.op == "call_function":
                aliased = list(self._aliased(node))
                for source, writes in aliased:
                    self._shared[self.owner(node)] = self.owner(source)
                    if writes:
                        self._written.setdefault(node, []).append(source)
                if aliased and node not in self._written and node.target is not operator.getitem:
                    views.append(node)
        owners = {node: self.owner(node) for node in nodes}
        written = {self.owner(source) for sources in self._written.values() for source in sources}
        viewed = {owners[view] for view in views}
        self.written = {node for node, owner in owners.items() if owner in written}
        """The nodes whose memory some operator writes to, through whichever view."""
        self.viewed = {node for node, owner in owners.items() if owner in viewed}
        """The nodes whose memory is seen by two tensors or more: by one, and by views of it."""

    def owner(self, node: fx.Node) -> fx.Node:
        """One node that stands for all that may share this one's memory: the first of them."""
        while (shared := self._shared.get(node, node)) is not node:
            node = shared
        return node

    def written_by(self, node: fx.Node) -> Sequence[fx.Node]:
        """The arguments that an operator writes to."""
        return self._written.get(node, ())

    def _aliased(self, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """The arguments whose memory the result may share, and whether it is written to."""
        known = signature(node.target)
        if node.target is operator.getitem or known is None or self._operators.of(node).values == "same":
            yield from ((source, False) for source in node.all_input_nodes)
            return
        for i, argument in enumerate(known.arguments):
            if argument.shares:
                given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                for source in given if isinstance(given, (list, tuple)) else (given,):
                    if isinstance(source, fx.Node):
                        yield source, argument.writes
