"""Rotary positions: parts of a graph that turn pairs of indices of an axis, found by what they compute.

A query or key with rotary positions is read as n/2 complex numbers, each multiplied by one that depends on the position
alone. So a complex factor for each pair passes, and nothing else does: not even a permutation, as each pair has a
frequency of its own. The cosines and sines of one pair are two elements of a table each, or one, in whichever way the
model writes it; what says that they are equal is how the table is made. So a part of the graph between a tensor and a
later one of the same shape is run by itself, in float64, on random numbers, with tables made of random constants, and
is *a turn* if it is linear, treats every row apart, and commutes with random factors for each pair, but with no matrix;
at positions below 16, and at larger ones as far as its tables reach.

Some models put the pairs from the order of neighbours to that of halves on the way. Such a part takes the matrices of
one order to those of the other.

Such a part is replaced by what it means for all other dimensions: the tensor is multiplied by a number for each index
along which the table varies. Then the axis is free in all that comes after, and the node that ends the part tells
(`TURN`) which pairs were turned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from permgraph.capture.schema import is_random
from permgraph.inference.memory import Memory
from permgraph.inference.operators import Operators, name_of
from permgraph.inference.solution import is_weight
from permgraph.structures import random_element

TURN = "turn"
"""The key in a node's `meta` under which stands the structure, `T` or `T2`, that passes along its last dimension.

``T2>T`` and ``T>T2`` say that the pairs stand otherwise after it than before.
"""

ORDERS = {"T2>T": 1, "T>T2": -1}
"""How often such a part puts neighbours to halves."""

PAIRED = ("T", "T2")
MOST_NODES = 40
"""So many operators a turn may have."""
MOST_ELEMENTS = 1 << 22
TOLERANCE = 1e-9
RANGES = (16, 64, 1024, 1 << 16)
"""Below these the positions are with which tables are tried; those that are looked up may be shorter than the last."""
REDUCED = (torch.float32, torch.float16, torch.bfloat16)

#: The operators that a turn is written with: sums, products, and what puts elements elsewhere.
_STEPS = """
add sub rsub neg mul addcmul cat stack slice select split split_with_sizes chunk unbind getitem narrow flip roll
unsqueeze squeeze view reshape _unsafe_view flatten unflatten transpose permute expand clone contiguous alias detach
lift_fresh _to_copy to view_as_complex view_as_real complex real imag
"""
STEPS = frozenset(_STEPS.split())
#: Of these those that leave every number as it is.
MOVES = STEPS - frozenset(["add", "sub", "rsub", "neg", "mul", "addcmul"])
ENDS = frozenset(("add", "sub", "addcmul", "cat", "stack", "view", "reshape", "_unsafe_view", "flatten"))


def free_turns(graph: fx.Graph) -> None:
    """Replace, in place, all parts of a captured graph that turn pairs."""
    nodes = list(graph.nodes)
    at = {node: number for number, node in enumerate(nodes)}
    moving: set[fx.Node] = set()
    for node in nodes:
        if is_weight(node) or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    if not any(name_of(node) in ENDS and node in moving for node in nodes):
        return
    written = Memory(nodes, Operators()).written
    uncertain: set[fx.Node] = set()  # tables of which nothing says what they hold when they are read
    for node in nodes:
        if node not in moving and (node in written or any(source in uncertain for source in node.all_input_nodes)):
            uncertain.add(node)
    tables = _Tables()
    judged: dict[Any, Verdict | None] = {}
    found: list[tuple[fx.Node, fx.Node, list[fx.Node], str, tuple[int, ...]]] = []
    inside: set[fx.Node] = set()
    for end in nodes:
        if end not in moving or name_of(end) not in ENDS or not _is_float(end):
            continue
        best: tuple[fx.Node, fx.Node, list[fx.Node], str, tuple[int, ...]] | None = None
        for start, part in _parts(end, moving, at):
            if start in inside or not inside.isdisjoint(part):
                break
            if not _may_turn(start, end, part, moving) or any(
                not uncertain.isdisjoint(n.all_input_nodes) for n in part
            ):
                continue
            if best is not None and not all(_name(node) in MOVES for node in part if node not in best[2]):
                break  # what is larger than a turn would say less of which pairs are turned
            key = _key(start, part, tables)
            if key not in judged:
                judged[key] = _judge(start, end, part, tables)
            verdict = judged[key]
            if verdict is not None and (best is None or verdict[0] in ORDERS):
                best = start, end, part, *verdict
        if best is not None:
            found.append(best)
            inside.update(best[2])
    if not found:
        return
    left = {node for one in nodes for node in one.meta.get("left", ())}
    for start, end, part, structure, varies in found:
        if written.isdisjoint([start, *part]):
            _replace(graph, start, end, structure, varies)
    for node in reversed(nodes):
        if not node.users and node in inside and node not in left:
            graph.erase_node(node)


def _parts(end: fx.Node, moving: set[fx.Node], at: Mapping[fx.Node, int]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Tensors on which a node depends alone, with the nodes between, the nearest first."""
    part: list[fx.Node] = [end]
    waiting = {source for source in end.all_input_nodes if source in moving}
    while waiting and len(part) <= MOST_NODES:
        last = max(waiting, key=at.__getitem__)
        waiting.remove(last)
        if not waiting:
            yield last, sorted(part, key=at.__getitem__)
        if last.op != "call_function" or not _is_step(last):
            return
        part.append(last)
        waiting.update(source for source in last.all_input_nodes if source in moving)


def _name(node: fx.Node) -> str:
    return name_of(node) or str(getattr(node.target, "__name__", ""))


def _is_step(node: fx.Node) -> bool:
    return _name(node) in STEPS and not getattr(node.target, "_opname", "").endswith("_")


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.is_floating_point()


def _may_turn(start: fx.Node, end: fx.Node, part: Sequence[fx.Node], moving: set[fx.Node]) -> bool:
    """Whether a part begins and ends alike, on pairs, and multiplies by something that varies along them."""
    if not _is_float(start) or not _is_step(end):
        return False
    shape = start.meta["val"].shape
    if not shape or shape != end.meta["val"].shape or shape[-1] % 2 or shape[-1] < 2 or shape.numel() > MOST_ELEMENTS:
        return False
    factors = [
        source for node in part if name_of(node) in ("mul", "addcmul") for source in node.all_input_nodes
        if source not in moving
    ]  # fmt: skip
    return any(isinstance(val := f.meta.get("val"), Tensor) and val.numel() > 1 and not _is_whole(val) for f in factors)


def _is_whole(val: Tensor) -> bool:
    return not (val.is_floating_point() or val.is_complex())


def _key(start: fx.Node, part: Sequence[fx.Node], tables: _Tables) -> Any:
    """What two parts have in common that compute the same of tensors of one shape, with the same tables."""
    numbers = {start: 0} | {node: number for number, node in enumerate(part, start=1)}

    def named(node: fx.Node) -> str:
        return f"%{numbers[node]}" if node in numbers else f"table {tables.number(node)}"

    return tuple(start.meta["val"].shape), tuple(_said(node, named) for node in part)


def _said(node: fx.Node, named: Callable[[fx.Node], str]) -> tuple[str, str]:
    """A node's operator, and its arguments with others for the nodes among them."""
    return str(node.target), str(fx.node.map_arg((node.args, node.kwargs), lambda source: _Named(named(source))))


class _Named(str):
    __slots__ = ()


class _Tables:
    """The values of what depends on no weight, of random constants and inputs, as often as there are `RANGES`."""

    def __init__(self) -> None:
        self.values: list[dict[fx.Node, Any]] = [{} for _ in RANGES]
        self.generators = [torch.Generator().manual_seed(draw) for draw in range(len(RANGES))]
        self._numbers: dict[fx.Node, int] = {}
        self._known: dict[Any, int] = {}

    def number(self, node: fx.Node) -> int:
        """The same number for tables that are computed alike from the same, as each layer adds a dimension to one.

        What is drawn is like nothing else.
        """
        for one in self._from(node, self._numbers):
            pure = one.op == "call_function" and not is_random(one.target)
            key = (_said(one, lambda source: str(self._numbers[source])), str(one.meta["val"])) if pure else one
            self._numbers[one] = self._known.setdefault(key, len(self._known))
        return self._numbers[node]

    def of(self, node: fx.Node, draw: int) -> Any:
        """The value of one node in one of the draws.

        Raises what its operators raise on numbers for which they were not meant.
        """
        values = self.values[draw]
        for one in self._from(node, values):
            values[one] = run(one, values) if one.op == "call_function" else self._drawn(one, draw)
        return values[node]

    @staticmethod
    def _from(node: fx.Node, known: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
        """A node after all that it is computed from, but for what is known by then."""
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [] if last in known else [source for source in last.all_input_nodes if source not in known]
            if not missing:
                waiting.pop()
                if last not in known:
                    yield last
            waiting += missing

    def _drawn(self, node: fx.Node, draw: int) -> Any:
        val, generator, most = node.meta["val"], self.generators[draw], RANGES[draw]
        if not isinstance(val, Tensor) or val.numel() > MOST_ELEMENTS:
            raise ValueError(f"{node.name} is no tensor, or too large to try")
        if _is_whole(val):
            if val.dtype == torch.bool:
                numbers = (torch.arange(val.numel()) // (1 << draw) + draw) % 2
            elif draw == 0:  # positions that differ, but few enough of them for a table that is looked up
                numbers = torch.arange(val.numel()) % most
            else:
                most = min(most, torch.iinfo(val.dtype).max)
                numbers = (most ** torch.rand(val.numel(), generator=generator, dtype=torch.float64)).long()
                numbers[:1] = most - 1
            return numbers.reshape(val.shape).to(val.dtype)
        real = 0.5 + torch.rand((*val.shape, 2), generator=generator, dtype=torch.float64)
        real *= most / RANGES[0]
        return torch.view_as_complex(real) if val.is_complex() else real[..., 0].clone()


def run(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What the operator of a node makes of these values, in double precision, on this machine."""

    def replaced(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value in REDUCED else torch.complex128 if value == torch.complex64 else value
        return torch.device("cpu") if isinstance(value, torch.device) else value

    given: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    args = [replaced(value) for value in given[0]]
    return node.target(*args, **{name: replaced(value) for name, value in given[1].items()})  # type: ignore[operator]


Verdict = tuple[str, tuple[int, ...]]


def _judge(start: fx.Node, end: fx.Node, part: Sequence[fx.Node], tables: _Tables) -> Verdict | None:
    """Of a part that turns pairs, which pairs, and along which dimensions it varies; None of any other part.

    It must turn the same pairs at small positions and at all larger ones for which its tables are made.
    """
    inner = {start, *part}
    sources = {source for node in part for source in node.all_input_nodes if source not in inner}
    found: Verdict | None = None
    for draw in range(len(RANGES)):
        try:
            verdict = _judge_with({source: tables.of(source, draw) for source in sources}, start, end, part)
        except Exception:  # whatever an operator says of numbers that are not the model's: then it is not known
            verdict = _UNKNOWN
        if draw == 0:
            found = verdict
        elif verdict is None or (verdict is not _UNKNOWN and found is not None and verdict[0] != found[0]):
            return None
        elif found is not None and verdict is not _UNKNOWN:
            found = found[0], tuple(sorted({*found[1], *verdict[1]}))
        if found is None or found is _UNKNOWN:
            return None
    return found


_UNKNOWN: Verdict = ("", ())
"""The verdict on numbers for which the operators are not made."""


def _judge_with(given: Mapping[fx.Node, Any], start: fx.Node, end: fx.Node, part: Sequence[fx.Node]) -> Verdict | None:
    """The verdict where tables have these values.

    Raises what the operators raise on numbers for which they were not meant.
    """
    shape = tuple(start.meta["val"].shape)
    generator = torch.Generator().manual_seed(1)

    def turned(x: Tensor) -> Tensor:
        values = {**given, start: x}
        for node in part:
            values[node] = run(node, values)
        found: Tensor = values[end]
        return found

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    def close(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())

    x, rows = drawn(*shape), drawn(*shape[:-1], 1)
    y = turned(x)
    if y.dtype != torch.float64:
        return None
    if not bool(y.isfinite().all()) or not bool(y.abs().max() > 0):
        return _UNKNOWN
    other = drawn(*shape)
    if not close(turned(x + other), y + turned(other)) or not close(turned(rows * x), rows * y):
        return None
    numbers = np.random.default_rng(0)

    def passes(before: str, order: int = 0) -> bool:
        g = torch.from_numpy(random_element(before, shape[-1], numbers))
        to = torch.arange(shape[-1])
        if order:
            to = to.reshape((-1, 2) if order == 1 else (2, -1)).T.reshape(-1)
        return close(turned(x @ g.T), y @ g[to][:, to].T)

    ways = [*((s, 0) for s in PAIRED), *ORDERS.items()]
    way = next(((turn, order) for turn, order in ways if passes(turn.partition(">")[0], order)), None)
    if way is None or passes("GL", way[1]):
        return None
    same = turned(drawn(shape[-1]).expand(shape).clone())
    varies = tuple(d for d in range(len(shape) - 1) if not close(same, same.select(d, 0).unsqueeze(d).expand(shape)))
    return way[0], varies


def _replace(graph: fx.Graph, start: fx.Node, end: fx.Node, structure: str, varies: Iterable[int]) -> None:
    """Put in the place of a turn what it means for the dimensions along which it varies."""
    val = start.meta["val"]
    about: dict[str, Any] = {key: end.meta[key] for key in ("module", "source") if key in end.meta}

    def call(target: Any, args: tuple[Any, ...], like: Tensor, **more: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {**about, "val": like, **more}
        return node

    ops = torch.ops.aten
    with graph.inserting_before(end):
        node = start
        for dim in varies:
            n, ndim = val.shape[dim], val.ndim
            shape = [n if d == dim else 1 for d in range(ndim)]
            numbers = call(ops.arange.default, (n,), val.new_empty([n], dtype=torch.int64))
            placed = call(ops.view.default, (numbers, shape), val.new_empty(shape, dtype=torch.int64))
            node = call(ops.mul.Tensor, (node, placed), val.new_empty(val.shape))
        node = call(ops.clone.default, (node,), end.meta["val"], **{TURN: structure})
    end.replace_all_uses_with(node)
