"""Numbers for what the nodes of several passes compute, by which it is known that two of them compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from permgraph.capture.captured import Captured
from permgraph.capture.schema import is_random, signature
from permgraph.capture.state import tensor_key


class Numbering:
    """Gives each node a number, the sources before what reads them; the same to nodes that compute the same.

    These apply the same operator to the same tensors. Weights are the same by their names; inputs and constants by
    names and shapes, for what they hold is not looked at. Where a pass writes into tensors, what a node holds depends
    on when it is read: then weights are shared, and besides what all passes do at their start, each in the same order,
    if none writes into it later on. Random numbers never are.

    With `apart`, no two nodes of one pass get the same, for two modules may each repeat the same tensor along an axis
    of their own, or each start with zeros. Nodes are the same where the same module computed them, as often before.

    With `weights_alone`, nothing is the same but weights.
    """

    def __init__(self, passes: Sequence[Captured], *, apart: bool = False, weights_alone: bool = False) -> None:
        self._apart = apart
        self._known: dict[Hashable, int] = {}
        self._met: Counter[Hashable] = Counter()
        self._numbers: dict[fx.Node, int] = {}
        self._starts: dict[fx.Node, int] | None = None
        if weights_alone or any(map(_writes, passes)):
            self._starts = {} if weights_alone else _common_starts(passes)

    def of(self, node: fx.Node) -> int:
        """The number of a node."""
        self._numbers[node] = number = self._known.setdefault(self._key(node), len(self._known))
        return number

    def _key(self, node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            kind, names = node.meta["kind"], tuple(node.meta["names"])
            if kind in ("parameter", "buffer") and names:
                return kind, names
            return _as_placeholder(node) if self._starts is None or node in self._starts else node
        if self._starts is not None:
            return ("start", self._starts[node]) if node in self._starts else node
        if is_random(node.target):
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


def computed_again(nodes: Sequence[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """The operators of one graph that compute the same as one of the nodes that are `known`.

    They apply the same operator to the same tensors, into none of which anything is written.
    """
    calls = [node for node in nodes if node.op == "call_function"]
    written = {key for node in calls for key in _written(node)}
    if written and any(not isinstance(node.meta["val"], FakeTensor) for node in calls if _is_tensor(node)):
        return set()  # of real tensors, nodes do not keep the memory
    numbers: dict[fx.Node, Hashable] = {}
    first: dict[Hashable, int] = {}
    for node in calls:
        touched = [node, *(source for source in node.all_input_nodes if "val" in source.meta)]
        changes = any(not written.isdisjoint(_memory(one.meta["val"])) for one in touched) if written else False
        key: Hashable = node if changes or is_random(node.target) else _call(node, numbers)
        numbers[node] = first.setdefault(key, len(first))
    same = {numbers[node] for node in known if node in numbers}
    return {node for node in calls if numbers[node] in same}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _common_starts(passes: Sequence[Captured]) -> dict[fx.Node, int]:
    """The operators with which the first pass and another begin, and their numbers; each is compared with the first.

    What they read is among them. What two passes do in the same order, from the same memory, they do alike, writing
    included. What follows is put one pass after the other, so there is no such start where either writes into its
    memory later on.
    """
    if any(one.mode != "fake" or _reshapes_in_place(one) for one in passes):
        return {}  # of real tensors, nodes do not keep the memory
    calls = [[node for node in one.graph.nodes if node.op == "call_function"] for one in passes]
    found: dict[fx.Node, int] = {}
    for other in calls[1:]:
        length = _length_of_start(calls[0], other)
        early = {node: at for nodes in (calls[0], other) for at, node in enumerate(nodes[:length])}
        early = {source: -1 for node in early for source in node.all_input_nodes} | early
        own = (node for node in early if node.meta.get("kind") not in ("parameter", "buffer"))
        memory = {key for node in own for key in _memory(node.meta["val"])}
        later = (node for nodes in (calls[0], other) for node in nodes[length:])
        if memory.isdisjoint(key for node in later for key in _written(node)):
            found.update(early)
    return found


def _length_of_start(calls: Sequence[fx.Node], others: Sequence[fx.Node]) -> int:
    """With how many operators two passes begin that are the same, to the first random one."""
    numbers: dict[fx.Node, Hashable] = {}
    for length, pair in enumerate(zip(calls, others, strict=False)):
        ours, theirs = (_call(node, numbers) for node in pair)
        if ours != theirs or is_random(pair[0].target):
            return length
        numbers.update(dict.fromkeys(pair, length))
    return min(len(calls), len(others))


def _call(node: fx.Node, numbers: dict[fx.Node, Hashable]) -> Hashable:
    """What a node does, to which of the nodes before it, with what result."""

    def said(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return numbers.get(value) if value.op == "call_function" else _as_placeholder(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(said, value))
        return type(value).__name__, repr(value)

    return str(node.target), said([*node.args, *node.kwargs.items()]), _shape(node.meta["val"])


def _as_placeholder(node: fx.Node) -> Hashable:
    """What tells a placeholder from others; one without a name is like no other."""
    if not node.meta["names"]:
        return node
    return node.meta["kind"], tuple(node.meta["names"]), _shape(node.meta["val"]), id(node.meta.get("real"))


def _reshapes_in_place(captured: Captured) -> bool:
    return any(torch.Tag.inplace_view in getattr(node.target, "tags", ()) for node in captured.graph.nodes)


def _memory(value: Any) -> Iterator[Hashable]:
    """What tells the memory of a fake tensor, or of several, from others."""
    if isinstance(value, Tensor):
        key = tensor_key(value)
        yield key[0] if isinstance(key, tuple) else key
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _memory(one)


def _written(node: fx.Node) -> Iterator[Hashable]:
    """The memory into which an operator writes."""
    known = signature(node.target)
    if known is None:
        return
    given = {**dict(zip((argument.name for argument in known.arguments), node.args, strict=False)), **node.kwargs}
    for argument in known.arguments:
        value = given.get(argument.name) if argument.writes else None
        for source in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(source, fx.Node):
                yield from _memory(source.meta["val"])


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape)
    return tuple(map(_shape, value)) if isinstance(value, (list, tuple)) else repr(value)


def _writes(captured: Captured) -> bool:
    """Whether a pass has an operator that writes into a tensor."""
    known = (signature(node.target) for node in captured.graph.nodes if node.op == "call_function")
    return any(argument.writes for one in known if one is not None for argument in one.arguments)
