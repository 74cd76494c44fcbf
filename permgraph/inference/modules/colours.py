"""Parameters that stand in places which look alike, as one sweep up and one down the graph see them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch
from torch import fx

from permgraph.inference.modules.reading import Dataflow
from permgraph.inference.operators import is_real
from permgraph.inference.solution import is_weight


class Colours:
    """A number for each node: equal where what a node is computed from, and what becomes of it, look alike.

    Two nodes that an automorphism of the graph carries to each other have the same colour; the converse is for the
    proof. Both sweeps together are linear in the size of the graph.
    """

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._numbers: dict[Hashable, int] = {}
        self._above: dict[fx.Node, int] = {}
        for node in flow.nodes:
            self._above[node] = self._number(self._seen_from_above(node))
        self.of: dict[fx.Node, int] = {}
        for node in reversed(flow.nodes):
            users = sorted(self._number((key, self.of[user])) for user, key in flow.users[node])
            self.of[node] = self._number((self._above[node], tuple(users)))

    def classes(self) -> list[list[fx.Node]]:
        """The weights of each colour that several have, in the order in which they are met.

        Integers, such as counters of batches, stay put, and are not among them.
        """
        found: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self._flow.nodes:
            if is_weight(node) and self._flow.users[node] and is_real(node):
                found[self.of[node]].append(node)
        return [nodes for nodes in found.values() if len(nodes) > 1]

    def _number(self, seen: Hashable) -> int:
        return self._numbers.setdefault(seen, len(self._numbers))

    def _seen_from_above(self, node: fx.Node) -> Hashable:
        reading = self._flow.readings[node]
        if node.op == "placeholder":
            val = node.meta["val"]
            if is_weight(node):
                if node.meta["names"][0] in self._flow.held:
                    return node
                return (reading.key, tuple(val.shape), str(val.dtype))
            return (reading.key, constant_key(node) or node)
        terms = [(term.key, tuple(self._above[source] for source in term.nodes)) for term in reading.terms]
        if not reading.ordered:
            terms.sort(key=repr)
        return (reading.key, tuple(terms))


def constant_key(node: fx.Node) -> Hashable | None:
    """What tells a constant from others: its values; None where they are not known, or it is none."""
    real = node.meta.get("real")
    if node.meta["kind"] != "constant" or not isinstance(real, torch.Tensor) or real.is_meta or real.numel() > 1 << 20:
        return None
    content = real.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return (tuple(real.shape), str(real.dtype), content)
