"""By-products: what a pass returns beside its result, and from which the result is computed.

A flag such as ``return_features=True`` makes a model return what it computes on the way. To pin that would take the
symmetry of whoever never sets the flag, so a pass that differs from the first by its flags keeps the results alone.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from permgraph.capture.captured import Captured
from permgraph.capture.numbering import Numbering


def without_by_products(again: Captured, first: Captured) -> tuple[Captured, int]:
    """A further pass with its results alone, and how many by-products were left out.

    A by-product is an output from which another output of the same pass is computed, or which the first pass computes
    on the way to its own outputs. What the first pass returns is none.
    """
    nodes = {node.op: node for node in again.graph.nodes}
    end: fx.Node = nodes["output"]
    outputs: list[fx.Node] = list(end.args[0])  # type: ignore[arg-type]
    numbering = Numbering((first, again))
    there, here = ({n: numbering.of(n) for n in one.graph.nodes if n.op != "output"} for one in (first, again))
    returned = {there[node] for node in next(n for n in first.graph.nodes if n.op == "output").args[0]}
    on_the_way = set(there.values()) - returned
    above = _ancestors(outputs)
    kept = [
        at
        for at, node in enumerate(outputs)
        if here[node] in returned or not (node in above or here[node] in on_the_way)
    ]
    if len(kept) == len(outputs):
        return again, 0
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in again.graph.nodes:
        if node is not end:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    made = graph.output([copies[outputs[at]] for at in kept])
    left = {copies[node]: name for node, name in end.meta.get("left", {}).items()}
    made.meta.update(end.meta, val=[end.meta["val"][at] for at in kept], left=left)
    return replace(again, graph=graph), len(outputs) - len(kept)


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes from which any of these is computed."""
    found: set[fx.Node] = set()
    waiting = [source for node in nodes for source in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
