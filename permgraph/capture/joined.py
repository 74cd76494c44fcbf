"""Several passes as one graph over shared parameters, and whether two of them say the same.

A specification is inferred from what a forward pass did, and used for a model that runs on other inputs. What another
pass ties or pins holds as well, so passes are solved together: their graphs are put side by side, and the parameters
are the nodes that they share. A pass that differs from an earlier one in its sizes alone says nothing new (`alike`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from permgraph.capture.captured import Captured
from permgraph.capture.numbering import Numbering

_VIEWS = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"])


def alike(first: Captured, second: Captured) -> bool:
    """Whether two passes ran the same operators on the same nodes, with sizes that differ and say the same.

    At each operator every size stands for one other, and a view puts the same dimensions together or takes them apart:
    then each rule says of the second pass what it says of the first.
    """
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    if len(nodes) != len(others):
        return False
    number = {node: at for at, node in enumerate(nodes)}
    other_number = {node: at for at, node in enumerate(others)}
    return all(_alike(*pair, number, other_number) for pair in zip(nodes, others, strict=True))


def _alike(node: fx.Node, other: fx.Node, number: dict[fx.Node, int], other_number: dict[fx.Node, int]) -> bool:
    if node.op != other.op:
        return False
    if node.op == "placeholder":
        kind = node.meta["kind"]
        if kind != other.meta["kind"]:
            return False
        if kind in ("parameter", "buffer") and node.meta["names"] != other.meta["names"]:
            return False
    elif node.target != other.target:
        return False
    forth: dict[int, int] = {1: 1}
    back: dict[int, int] = {1: 1}

    def same_size(a: int, b: int) -> bool:
        return forth.setdefault(a, b) == b and back.setdefault(b, a) == a

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node):
            return isinstance(b, fx.Node) and number[a] == other_number[b] and same_value(a.meta["val"], b.meta["val"])
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
        if type(a) is int and type(b) is int:  # a number of a dimension stays; a size goes with the shapes' sizes
            return a == b or same_size(a, b)
        if type(a) is not type(b):
            return False
        try:
            return bool(a == b or a != a)
        except NotImplementedError:  # packed weights of quantised layers
            return a is b

    def same_value(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            alike_dtype = isinstance(b, Tensor) and a.dtype == b.dtype and a.ndim == b.ndim
            return alike_dtype and all(map(same_size, a.shape, b.shape))
        if isinstance(a, (list, tuple)):
            return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same_value, a, b))
        return True

    if not same_value(node.meta["val"], other.meta["val"]) or node.kwargs.keys() != other.kwargs.keys():
        return False
    if not same([*node.args, *node.kwargs.values()], [*other.args, *other.kwargs.values()]):
        return False
    return node.op != "call_function" or _same_view(node, other)


def _same_view(node: fx.Node, other: fx.Node) -> bool:
    """Whether two views, if they are some, put the same dimensions together and take the same apart."""
    packet = getattr(node.target, "_schema", None)
    name = packet.name.rpartition(":")[2] if packet is not None else ""
    if name == "as_strided":
        return bool(node.meta["val"].shape == other.meta["val"].shape)
    if name not in _VIEWS:
        return True
    groups = [_regrouped(each) for each in (node, other)]
    return groups[0] is not None and groups[0] == groups[1]


def _regrouped(view: fx.Node) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """The dimensions of more than one index that a view merges or splits; None where it does both to some."""
    source: Any = view.args[0]
    before, after = source.meta["val"].shape, view.meta["val"].shape
    if 0 in before:
        return None
    groups = []
    left, right = list(_wide(before)), list(_wide(after))
    while left or right:
        ins: list[int] = []
        outs: list[int] = []
        product_in = product_out = 1
        while not ins or product_in != product_out:
            if product_in <= product_out and left:
                dim, size = left.pop(0)
                ins.append(dim)
                product_in *= size
            elif right:
                dim, size = right.pop(0)
                outs.append(dim)
                product_out *= size
            else:
                return None  # a view of other bits
        if min(len(ins), len(outs)) > 1:
            return None
        groups.append((tuple(ins), tuple(outs)))
    return groups


def _wide(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((dim, size) for dim, size in enumerate(shape) if size > 1)


def joined(passes: Sequence[Captured]) -> Captured:
    """Several passes as one: the first one's graph, and after it what the others compute that none did before."""
    graph = fx.Graph()
    made: dict[int, fx.Node] = {}
    copies: dict[fx.Node, fx.Node] = {}
    numbering = Numbering(passes)

    def copy(node: fx.Node) -> None:
        number = numbering.of(node)
        if number not in made:
            made[number] = graph.node_copy(node, lambda source: copies[source])
        copies[node] = made[number]

    for node in (node for one in passes for node in one.graph.nodes if node.op == "placeholder"):
        copy(node)
    outputs: list[Any] = []
    ends: list[fx.Node] = []
    for one in passes:
        for node in one.graph.nodes:
            if node.op == "call_function":
                copy(node)
            elif node.op == "output":
                outputs.extend(node.args[0])
                ends.append(node)
    output = graph.output([copies[node] for node in outputs])
    left = {copies[node]: name for end in ends for node, name in end.meta.get("left", {}).items()}
    output.meta.update(ends[0].meta, val=[value for end in ends for value in end.meta["val"]], left=left)
    graph.lint()
    unused = tuple(name for name in passes[0].unused if all(name in one.unused for one in passes))
    return replace(passes[0], graph=graph, unused=unused)
