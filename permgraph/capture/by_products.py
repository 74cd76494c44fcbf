"""By-products: what a pass returns beside its result, and from which the result is computed.

Structured results have fields for what is computed on the way, and a flag such as ``return_features=True`` adds more.
To pin that would take the symmetry of whoever never looks at it. So of what a pass returns `intermediate` tells what
is no result, and a pass that differs from the first by its flags keeps the results alone.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import fx

from permgraph.capture.captured import Captured
from permgraph.capture.counting import counting, returned_by
from permgraph.capture.numbering import Numbering, computed_again
from permgraph.capture.schema import operator_name, signature


def without_by_products(again: Captured, first: Captured) -> tuple[Captured, int]:
    """A further pass with its results alone, and how many by-products were left out.

    A by-product is an output from which another output of the same pass is computed, or which the first pass computes
    on the way to its own outputs; or the values of such a one, put elsewhere, as a cache holds the last of them. What
    the first pass returns as its result is none.
    """
    nodes = {node.op: node for node in again.graph.nodes}
    end: fx.Node = nodes["output"]
    outputs: list[fx.Node] = list(end.args[0])  # type: ignore[arg-type]
    numbering = Numbering((first, again))
    there, here = ({n: numbering.of(n) for n in one.graph.nodes if n.op != "output"} for one in (first, again))
    end_of_first = next(n for n in first.graph.nodes if n.op == "output")
    returned = {there[n] for n, counts in zip(end_of_first.args[0], counting(end_of_first), strict=True) if counts}
    on_the_way = set(there.values()) - returned
    above = _ancestors(outputs)
    sources = {node: _sources(node) for node in outputs}
    computed_from = _ancestors([source for each in sources.values() for source in each])

    def by_product(node: fx.Node, counts: bool) -> bool:
        if here[node] in returned:
            return False
        if not counts:  # by what was asked for
            return True
        held = bool(sources[node]) and all(s in computed_from or here[s] in on_the_way for s in sources[node])
        return node in above or here[node] in on_the_way or held

    said = [replace(one, names=()) for one in returned_by(end)]  # with a flag, names may mean something else
    kept = [at for at, node in enumerate(outputs) if not by_product(node, said[at].counts)]
    if len(kept) == len(outputs):
        end.meta["returned"] = said
        return again, 0
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in again.graph.nodes:
        if node is not end:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    made = graph.output([copies[outputs[at]] for at in kept])
    left = {copies[node]: name for node, name in end.meta.get("left", {}).items()}
    made.meta.update(end.meta, val=[end.meta["val"][at] for at in kept], left=left, returned=[said[at] for at in kept])
    return replace(again, graph=graph), len(outputs) - len(kept)


def intermediate(results: Sequence[fx.Node], of_parts: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The results of one call that are by-products: from which another is computed by way of a parameter.

    Layers stand between what is computed on the way and the result. Where no parameter does, or a single number such
    as a temperature, both are results: logits and what is made of them, embeddings and how similar they are. A scalar
    makes nothing a by-product, for it may be a loss. The values of a by-product put elsewhere, as a cache holds them,
    or computed once more, as a norm that is applied twice does, are one; what was not computed from inputs, and whole
    numbers and truth values, are none. Of results that parts of the model gave, `of_parts`, a normalised by-product is
    one too: a pooled state beside the states.
    """
    ends = [node for node in results if node.meta["val"].ndim]
    if len(results) < 2 or not ends:
        return set()
    nodes = list(ends[0].graph.nodes)
    of_inputs = _computed_from("input", nodes)
    weights = _computed_from("parameter", nodes) - of_inputs
    above: set[fx.Node] = set(ends)
    behind: set[fx.Node] = set()  # what a parameter stands between and one of the ends
    for node in reversed(nodes):
        if node in above and node.op == "call_function" and not _reads_no_values(node):
            above.update(node.all_input_nodes)
            if node in behind or any(_has_axes(source) for source in weights.intersection(node.all_input_nodes)):
                behind.update(node.all_input_nodes)

    again = computed_again(nodes, behind)

    def by_product(node: fx.Node) -> bool:
        value = node.meta["val"]
        if node not in of_inputs or not (value.is_floating_point() or value.is_complex()):
            return False
        sources = _sources(node, norms=node in of_parts)
        return node in behind or (bool(sources) and sources <= behind | again)

    return {node for node in results if by_product(node)}


def _computed_from(kind: str, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The placeholders of a kind, and all that is computed from them."""
    found: set[fx.Node] = set()
    for node in nodes:
        is_source = node.op == "placeholder" and node.meta["kind"] == kind
        if is_source or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _has_axes(node: fx.Node) -> bool:
    """Whether a node is a tensor of more than one number, or several results."""
    value = node.meta["val"]
    return not isinstance(value, torch.Tensor) or value.numel() != 1


#: Operators that are no views and put values elsewhere, with nothing done to them.
_COPIES = frozenset(
    ["clone", "cat", "stack", "constant_pad_nd", "copy_", "_to_copy", "lift_fresh", "index_select", "roll"]
)


_NORMS = frozenset(["native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"])


def _sources(node: fx.Node, *, norms: bool = False) -> set[fx.Node]:
    """The computed nodes whose values a node holds as they are, here or there; itself, if it computes them.

    With `norms`, also those of which it holds the values normalised.
    """
    found: set[fx.Node] = set()
    seen = {node}
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one.op != "call_function" or not one.all_input_nodes or _reads_no_values(one):
            continue
        of_norm = norms and one.target is operator.getitem and one.args[1] == 0 and _is_norm(one.all_input_nodes[0])
        if not (_moves_alone(one) or of_norm or (norms and _is_norm(one))):
            found.add(one)
            continue
        read = one.all_input_nodes[:1] if norms and _is_norm(one) else one.all_input_nodes
        new = [source for source in read if source not in seen]
        seen.update(new)
        waiting.extend(new)
    return found


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node.target) in _NORMS


def _reads_no_values(node: fx.Node) -> bool:
    """Whether a node's operator makes a new tensor of the shape of another."""
    name = operator_name(node.target)
    return name.startswith("new_") or name.endswith("_like")


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
