"""By-products: what a pass returns beside its result, and from which the result is computed.

A flag such as ``return_features=True`` makes a model return what it computes on the way. To pin that would take the
symmetry of whoever never sets the flag, so a pass that differs from the first by its flags keeps the results alone.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from permgraph.capture.captured import Captured
from permgraph.capture.numbering import Numbering
from permgraph.capture.schema import operator_name, signature


def without_by_products(again: Captured, first: Captured) -> tuple[Captured, int]:
    """A further pass with its results alone, and how many by-products were left out.

    A by-product is an output from which another output of the same pass is computed, or which the first pass computes
    on the way to its own outputs; or the values of such a one, put elsewhere, as a cache holds the last of them. What
    the first pass returns is none.
    """
    nodes = {node.op: node for node in again.graph.nodes}
    end: fx.Node = nodes["output"]
    outputs: list[fx.Node] = list(end.args[0])  # type: ignore[arg-type]
    numbering = Numbering((first, again))
    there, here = ({n: numbering.of(n) for n in one.graph.nodes if n.op != "output"} for one in (first, again))
    returned = {there[node] for node in next(n for n in first.graph.nodes if n.op == "output").args[0]}
    on_the_way = set(there.values()) - returned
    above = _ancestors(outputs)
    sources = {node: _sources(node) for node in outputs}
    computed_from = _ancestors([source for each in sources.values() for source in each])

    def by_product(node: fx.Node) -> bool:
        if here[node] in returned:
            return False
        held = bool(sources[node]) and all(s in computed_from or here[s] in on_the_way for s in sources[node])
        return node in above or here[node] in on_the_way or held

    kept = [at for at, node in enumerate(outputs) if not by_product(node)]
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


#: Operators that are no views and put values elsewhere, with nothing done to them.
_COPIES = frozenset(
    ["clone", "cat", "stack", "constant_pad_nd", "copy_", "_to_copy", "lift_fresh", "index_select", "roll"]
)


def _sources(node: fx.Node) -> set[fx.Node]:
    """The computed nodes whose values a node holds as they are, here or there; itself, if it computes them."""
    found: set[fx.Node] = set()
    seen = {node}
    waiting = [node]
    while waiting:
        one = waiting.pop()
        name = operator_name(one.target)
        if one.op != "call_function" or not one.all_input_nodes or name.startswith("new_") or name.endswith("_like"):
            continue  # an input, or what reads no values
        if not _moves_alone(one):
            found.add(one)
            continue
        new = [source for source in one.all_input_nodes if source not in seen]
        seen.update(new)
        waiting.extend(new)
    return found


def _moves_alone(node: fx.Node) -> bool:
    """Whether a node's operator does nothing to values but put them elsewhere."""
    if node.target is operator.getitem:
        return _moves_alone(node.all_input_nodes[0])
    known = signature(node.target)
    view = known is not None and any(argument.shares and not argument.writes for argument in known.arguments)
    return view or operator_name(node.target) in _COPIES


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
