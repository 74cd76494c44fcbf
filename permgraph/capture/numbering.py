"""Numbers for what the nodes of several passes compute, by which it is known that two of them compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from permgraph.capture.captured import Captured
from permgraph.capture.schema import signature


class Numbering:
    """Gives each node a number, the sources before what reads them; the same to nodes that compute the same.

    These apply the same operator to the same tensors. Weights are the same by their names; inputs and constants by
    names and shapes, for what they hold is not looked at. Where a pass writes into tensors, what a node holds depends
    on when it is read: then only weights are shared. Random numbers never are.

    With `apart`, no two nodes of one pass get the same, for two modules may each repeat the same tensor along an axis
    of their own, or each start with zeros. Nodes are the same where the same module computed them, as often before.
    """

    def __init__(self, passes: Sequence[Captured], *, apart: bool = False) -> None:
        self._apart = apart
        self._share = not any(map(_writes, passes))
        self._known: dict[Hashable, int] = {}
        self._met: Counter[Hashable] = Counter()
        self._numbers: dict[fx.Node, int] = {}

    def of(self, node: fx.Node) -> int:
        """The number of a node."""
        self._numbers[node] = number = self._known.setdefault(self._key(node), len(self._known))
        return number

    def _key(self, node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            kind, names = node.meta["kind"], tuple(node.meta["names"])
            if kind in ("parameter", "buffer") and names:
                return kind, names
            return (kind, names, _shape(node.meta["val"]), id(node.meta.get("real"))) if self._share and names else node
        if not self._share or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return node
        said = self._said([*node.args, *node.kwargs.items()])
        key = str(node.target), said, _shape(node.meta["val"])
        if not self._apart:
            return key
        at = node.graph, key, node.meta.get("module")
        self._met[at] += 1
        return *at[1:], self._met[at]

    def _said(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return "node", self._numbers[value]
        if isinstance(value, (list, tuple)):
            return tuple(map(self._said, value))
        return type(value).__name__, repr(value)


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape)
    return tuple(map(_shape, value)) if isinstance(value, (list, tuple)) else repr(value)


def _writes(captured: Captured) -> bool:
    """Whether a pass has an operator that writes into a tensor."""
    known = (signature(node.target) for node in captured.graph.nodes if node.op == "call_function")
    return any(argument.writes for one in known if one is not None for argument in one.arguments)
