"""Which dimensions of a parameter an operator sums over, and which one finds again in its result."""

from __future__ import annotations

from torch import fx

from permgraph.capture import Captured
from permgraph.inference.operators import Operators, contracted_with, dimensions_kept


def dimensions_read(captured: Captured) -> dict[str, frozenset[int]]:
    """For each parameter and buffer, by its names, the dimensions that index what its operators read.

    A linear layer's weight reads along its inputs, over which the product sums, and writes along its outputs. A bias,
    a gain and running statistics only write. A tensor that is used twice, as an embedding and as a head, may do both
    along one dimension, which then counts as read.
    """
    operators = Operators()
    found: dict[str, frozenset[int]] = {}
    for kind in ("parameter", "buffer"):
        for node in captured.placeholders(kind):
            read = frozenset(_read(node, list(range(node.meta["val"].ndim)), operators))
            found.update(dict.fromkeys(node.meta["names"], read))
    return found


def _read(node: fx.Node, own: list[int | None], operators: Operators) -> set[int]:
    """Which of a tensor's dimensions are read where a node stands for it; `own` says which of them each is there."""
    found: set[int] = set()
    for user in node.users:
        properties = operators.of(user)
        factors = contracted_with(user, properties) if user.op == "call_function" else None
        if factors is not None:
            left, i, right, j = factors
            for factor, dim in ((left, i), (right, j)):
                if factor is node and own[dim] is not None:
                    found.add(own[dim])  # type: ignore[arg-type]
            continue
        if not user.args or user.args[0] is not node:
            continue
        order = range(len(own)) if properties.values == "same" else dimensions_kept(user, node.meta["val"].shape)
        if order is not None:
            found |= _read(user, [None if dim is None else own[dim] for dim in order], operators)
    return found
