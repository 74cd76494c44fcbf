"""Which nodes of a captured graph anything outside it can see the effect of.

A model may compute what it then drops: the last layer of an image tower whose features are taken one layer earlier, a
head that another mode returns. Nothing can tell how its units are numbered, and a test least of all.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Sequence

from torch import Tensor, fx

from permgraph.capture.outputs import tensor_leaves
from permgraph.capture.schema import signature
from permgraph.inference.memory import Memory
from permgraph.inference.operators import Operators, contracted_with


def live_nodes(
    nodes: Sequence[fx.Node],
    memory: Memory,
    operators: Operators,
    results: Sequence[fx.Node] = (),
    zeros: Collection[fx.Node] = (),
) -> set[fx.Node]:
    """The nodes on which a result depends, what the forward pass leaves in buffers, or what left torch as a number.

    `results` are those of a graph that has no output node; nodes that are `seen` on another run, as what stands in its
    siblings' places is, count as results. Nothing depends on what is multiplied with one of `zeros`,
    nor on what these are computed from.
    """
    writers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    roots = list(results)
    for node in nodes:
        written = [memory.owner(source) for source in memory.written_by(node)]
        for owner in written:
            writers[owner].append(node)
        if (
            node.op == "output"
            or node.meta.get("seen")
            or any(owner.op == "placeholder" for owner in written)
            or _has_effect(node)
        ):
            roots.append(node)
    live: set[fx.Node] = set()
    while roots:
        node = roots.pop()
        if node not in live:
            live.add(node)
            if operators.of(node).reads_values and node not in zeros:
                factors = met_zeros(node, operators, zeros)
                roots.extend(source for source in node.all_input_nodes if source not in factors)
            roots.extend(writers[memory.owner(node)])
    return live


def read_for_shape(
    nodes: Sequence[fx.Node], memory: Memory, operators: Operators, results: Sequence[fx.Node] = ()
) -> set[fx.Node]:
    """The parts and views of tensors of which no element is read: ``torch.ones_like(h[:, :1])``, ``w[0].numel()``."""
    for_shape: set[fx.Node] = set()
    for node in reversed(nodes):
        moves = node.op == "call_function" and operators.of(node).values in ("moved", "kept")
        if not moves or node in memory.written or node in results or not isinstance(node.meta.get("val"), Tensor):
            continue
        if all(user in for_shape or not operators.of(user).reads_values for user in node.users):
            for_shape.add(node)
    return for_shape


def met_zeros(node: fx.Node, operators: Operators, zeros: Collection[fx.Node]) -> dict[fx.Node, int]:
    """The factors of a product of which one is zero, each with the dimension over which the product sums."""
    product = contracted_with(node, operators.of(node)) if zeros else None
    if product is None or (product[0] not in zeros and product[2] not in zeros):
        return {}
    return {product[0]: product[1], product[2]: product[3]}


def _has_effect(node: fx.Node) -> bool:
    """Whether a call may do more than return tensors: it returns none, or nothing is known of it."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return signature(node.target) is None or next(tensor_leaves(node.meta.get("val")), None) is None
