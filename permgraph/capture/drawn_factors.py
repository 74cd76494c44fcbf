"""Random factors, one for each sample of a batch: what stochastic depth multiplies with in training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from permgraph.capture.schema import is_random, operator_name

#: Operators that make a tensor without reading the values of another.
_MADE = frozenset(["empty", "ones", "zeros", "full", "new_empty", "new_ones", "new_zeros", "new_full"])
_MADE |= frozenset(["empty_like", "ones_like", "zeros_like", "full_like", "rand_like"])
#: Operators by which a draw becomes a factor.
_MAKES = frozenset(
    ["add", "div", "mul", "floor", "bernoulli", "lt", "le", "gt", "ge", "_to_copy", "view", "reshape", "detach"]
)


@dataclass(frozen=True)
class DrawnFactors:
    """What of a pass draws factors for its samples.

    Attributes:
        drawing: the nodes that make the factors.
        products: the nodes that multiply with one, or divide for that, and what is multiplied.
        by_sample: the products with a factor for each sample rather than one for all.
    """

    drawing: frozenset[fx.Node] = frozenset()
    products: dict[fx.Node, fx.Node] = field(default_factory=dict)
    by_sample: frozenset[fx.Node] = frozenset()

    def without(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """The nodes as if nothing had been drawn."""
        return [node for node in nodes if node not in self.drawing and node not in self.products]

    def numbers(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """Numbers of the nodes that are left; a product has that of what is multiplied."""
        number = {node: at for at, node in enumerate(nodes)}
        for product, source in self.products.items():  # in the order of execution
            number[product] = number[source]
        return number


def drawn_factors(nodes: Sequence[fx.Node], batches: Collection[int]) -> DrawnFactors:
    """Find the factors that are drawn for the samples of a batch; none if any draw is used for something else.

    Args:
        nodes: those of a pass.
        batches: the sizes of batches: only a first dimension of one of these counts samples.
    """
    random = [node for node in nodes if is_random(node.target)]
    if not random:
        return DrawnFactors()
    drawn: set[fx.Node] = set()
    made: set[fx.Node] = set()
    for node in nodes:
        if node.op != "call_function":
            continue
        name = operator_name(node.target).rstrip("_")
        read = [] if name in _MADE else node.all_input_nodes
        if not all(source in drawn or source in made for source in read):
            continue
        if is_random(node.target) or (name in _MAKES and any(source in drawn for source in read)):
            drawn.add(node)
        elif name in _MADE or (name in _MAKES and read):
            made.add(node)
    products: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = _multiplied(node, drawn, batches)
        if source is not None:
            scaled = _before_scaling(source)
            if scaled is not None:
                products[source] = scaled
            products[node] = source
    drawing = set(drawn)
    for node in reversed(nodes):
        if node in made and node.users and all(user in drawing for user in node.users):
            drawing.add(node)
    if any(user not in drawing and user not in products for node in drawing for user in node.users):
        return DrawnFactors()
    many = {node for node in drawn if node.meta["val"].ndim and node.meta["val"].shape[0] != 1}
    by_sample = frozenset(node for node in products if not many.isdisjoint(node.all_input_nodes))
    return DrawnFactors(frozenset(drawing), products, by_sample)


def _multiplied(node: fx.Node, drawn: set[fx.Node], batches: Collection[int]) -> fx.Node | None:
    """What a node multiplies with a factor for each sample."""
    if operator_name(node.target).rstrip("_") != "mul" or node in drawn or len(node.args) != 2:
        return None
    factors = [value for value in node.args if isinstance(value, fx.Node) and value in drawn]
    others = [value for value in node.args if isinstance(value, fx.Node) and value not in drawn]
    if len(factors) != 1 or len(others) != 1:
        return None
    factor, value, result = factors[0].meta["val"], others[0].meta["val"], node.meta["val"]
    if not isinstance(value, Tensor) or value.shape != result.shape or value.dtype != result.dtype:
        return None
    if factor.ndim not in (0, value.ndim) or any(size != 1 for size in factor.shape[1:]):
        return None
    samples = factor.shape[0] if factor.ndim else 1
    return others[0] if samples == 1 or (samples == value.shape[0] and samples in batches) else None


def _before_scaling(node: fx.Node) -> fx.Node | None:
    """What a node that is read once, for a product, divides by a number."""
    number: Any = node.args[1] if len(node.args) == 2 else None
    if operator_name(node.target) == "div" and isinstance(number, (int, float)) and len(node.users) == 1:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    return None
