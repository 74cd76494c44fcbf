"""What the nodes of a captured graph call: the declared properties of each operator, its arguments by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from permgraph.capture.schema import operator_name, signature
from permgraph.rules.properties import UNDECLARED, Properties
from permgraph.rules.registry import properties_of

ITEM = Properties("moved", zeros="all")  # one of several results


class Operators:
    """The declared properties of the operators of one graph, each looked up once."""

    def __init__(self) -> None:
        self._known: dict[Any, Properties] = {operator.getitem: ITEM}

    def of(self, node: fx.Node) -> Properties:
        """The properties of the operator that a node calls; those of no operator if it is an input or an output."""
        if node.op != "call_function":
            return UNDECLARED
        found = self._known.get(node.target)
        if found is None:
            found = self._known[node.target] = properties_of(str(node.target))
        return found


def name_of(node: fx.Node) -> str:
    """The name of the operator without its namespace and overload, and without the underscore of one in place."""
    name = operator_name(node.target)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def arguments_of(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of a node by the names of the operator's schema, defaults included."""
    known = signature(node.target)
    if known is None:
        return {}
    defaults = {argument.name: argument.default for argument in known.arguments}
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def is_real(node: fx.Node) -> bool:
    """Whether a node's result, or the first of several, has floating-point or complex elements."""
    val = first_result(node)
    return val is not None and (val.is_floating_point() or val.is_complex())


def first_result(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node results in, the first one of several."""
    val = node.meta.get("val")
    val = val[0] if isinstance(val, (list, tuple)) and val else val
    return val if isinstance(val, torch.Tensor) else None


def contracted_with(node: fx.Node, properties: Properties) -> tuple[fx.Node, int, fx.Node, int] | None:
    """The two factors of a matrix product or convolution, each with the dimension over which the product sums."""
    if properties.factors is None:
        return None
    given = arguments_of(node)
    (left, i), (right, j) = properties.factors
    if given.get("transposed"):
        j = 0  # the weight of a transposed convolution
    assert isinstance(given[left], fx.Node) and isinstance(given[right], fx.Node)
    return given[left], i, given[right], j


def dimensions_kept(node: fx.Node, shape: Sequence[int]) -> Sequence[int | None] | None:
    """For each dimension of the result, which of the argument's it is (None: a new one); None for other operators.

    For operators that put the dimensions of one tensor, of this shape, elsewhere, and change nothing else.
    """
    name, ndim = name_of(node), len(shape)
    args: tuple[Any, ...] = node.args
    order: list[int | None] = list(range(ndim))
    if name == "permute":
        return [d % ndim for d in args[1]]
    if name in ("transpose", "t"):
        if ndim > 1:
            i, j = args[1:3] if name == "transpose" else (0, 1)
            order[i], order[j] = order[j], order[i]
    elif name == "unsqueeze":
        order.insert(args[1] % (ndim + 1), None)
    elif name == "squeeze":
        dims = range(ndim) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
        gone = {d % ndim for d in dims if shape[d] == 1}
        order = [d for d in range(ndim) if d not in gone]
    else:
        return None
    return order
