"""Operators that mean something together which they do not mean alone: sums of squares, and means taken out.

A norm that is written in primitive operators squares each element, and takes the mean. The squares alone are spoilt by
a rotation, the sum is not; so where nothing but that sum is read of the squares, both are one norm. Likewise a mean
along an axis that is taken from the elements of the same tensor is one linear map, which commutes with all matrices
that leave the vector of ones in its place.
"""

from __future__ import annotations

from torch import fx

from permgraph.inference.operators import arguments_of, name_of
from permgraph.inference.solution import Solution
from permgraph.rules.call import Call
from permgraph.rules.typed_tensor import TypedTensor

Dims = frozenset[int]
NONE: Dims = frozenset()


class Patterns:
    """The sums of squares of a graph and the means that are taken out, by node and dimension from the front."""

    def __init__(self, solution: Solution) -> None:
        self._squared: dict[fx.Node, Dims] = {}
        self._square_sums: dict[fx.Node, Dims] = {}
        self._means: dict[fx.Node, Dims] = {}
        self._taken_out: dict[fx.Node, Dims] = {}
        written = solution.facts.memory.written
        for node in solution.nodes:
            if node.op == "call_function" and node not in written:
                if _is_square(node):
                    self._find_square_sum(node)
                elif name_of(node) == "mean":
                    self._find_taken_out(node, solution)

    def _find_square_sum(self, node: fx.Node) -> None:
        sums = [_reduced(user) for user in node.users if name_of(user) in ("mean", "sum")]
        if sums and len(sums) == len(node.users):
            self._squared[node] = frozenset.intersection(*sums)
            self._square_sums.update(dict.fromkeys(node.users, self._squared[node]))

    def _find_taken_out(self, node: fx.Node, solution: Solution) -> None:
        source = node.args[0]
        if source in solution.facts.memory.written or not arguments_of(node).get("keepdim"):
            return
        if node.users and all(_takes_out(user, source, node) for user in node.users):
            dims = _reduced(node)
            self._means[node] = dims
            self._taken_out.update(dict.fromkeys(node.users, dims))

    def squared(self, node: fx.Node, dim: int | None) -> bool:
        """Whether a node squares, and nothing but the sum along this dimension is read."""
        return dim in self._squared.get(node, NONE)

    def sums_squares(self, node: fx.Node, dim: int | None) -> bool:
        """Whether a node sums such squares along this dimension."""
        return dim in self._square_sums.get(node, NONE)

    def is_mean(self, node: fx.Node, dim: int | None) -> bool:
        """Whether a node takes a mean along this dimension, only for it to be taken out."""
        return dim in self._means.get(node, NONE)

    def takes_mean_out(self, node: fx.Node, dim: int | None) -> bool:
        """Whether a node takes the mean along this dimension out."""
        return dim in self._taken_out.get(node, NONE)

    def taken_together(self, call: Call, tensor: TypedTensor) -> Dims:
        """The dimensions of a call's first operand over which a mean is taken that it takes out, or a variance."""
        if call.node in self._taken_out:
            return self._taken_out[call.node]
        if "normalized_shape" in call.arguments:
            return frozenset(range(tensor.ndim - len(call["normalized_shape"]), tensor.ndim))
        return frozenset(call.dim_list(tensor)) if "dim" in call.arguments else frozenset(range(tensor.ndim))


def _is_square(node: fx.Node) -> bool:
    name, args = name_of(node), node.args
    if getattr(node.target, "_opname", "").endswith("_"):
        return False
    return (
        name == "square"
        or (name == "pow" and isinstance(args[0], fx.Node) and len(args) > 1 and args[1] in (2, 2.0))
        or (name == "mul" and len(args) == 2 and args[0] is args[1])
    )


def _reduced(node: fx.Node) -> Dims:
    """The dimensions over which a sum or mean goes."""
    ndim = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    given = arguments_of(node).get("dim")
    dims = range(ndim) if given is None or given == [] else [given] if isinstance(given, int) else given
    return frozenset(d % max(ndim, 1) for d in dims)


def _takes_out(user: fx.Node, source: object, mean: fx.Node) -> bool:
    """Whether a node is ``source - mean``."""
    if name_of(user) != "sub" or getattr(user.target, "_opname", "").endswith("_"):
        return False
    alpha = arguments_of(user).get("alpha", 1)
    return len(user.args) > 1 and user.args[0] is source and user.args[1] is mean and alpha == 1
