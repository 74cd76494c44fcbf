"""What lies off the diagonal of a square matrix, however a model takes it out, where all of it is reduced to a number.

Losses on correlations between units (Barlow Twins, VICReg) flatten a matrix, leave out the last element, and view the
rest with rows one longer, so that the diagonal becomes a column; others choose by a mask. The n (n - 1) elements have
no axes that a view could name. But where they are then treated one by one, and summed, they might as well stand where
they stood, with nothing on the diagonal. So such a part of the graph is replaced by an operator that leaves them there.
Which elements a part takes is found by running it on the numbers of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from permgraph.capture.schema import is_random, signature
from permgraph.inference.memory import Memory
from permgraph.inference.operators import Operators, name_of
from permgraph.inference.solution import is_weight

_library = torch.library.Library("permgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("off_diagonal(Tensor matrix) -> Tensor")  # type: ignore[no-untyped-call]

#: The elements of a square matrix where they are, but for those on its diagonal, which count for nothing.
OFF_DIAGONAL = torch.ops.permgraph.off_diagonal.default

_VIEWS = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "_reshape_alias",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "t",
        "unsqueeze",
        "squeeze",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "_to_copy",
    ]
)
_STEPS = _VIEWS | frozenset(["slice", "narrow", "index", "masked_select"])
_ENDS = frozenset(["slice", "narrow", "index", "masked_select"])
_REDUCTIONS = frozenset(["sum", "mean", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm"])
_MOST_STEPS = 12
_MOST_ELEMENTS = 1 << 22


@dataclass
class _Part:
    """A matrix, the node whose elements are all that lie off its diagonal, and what is made of these.

    `views` only give them another shape, `each` treats them one by one, and `numbers` reduces all to one.
    """

    matrix: fx.Node
    end: fx.Node
    views: list[fx.Node]
    each: list[fx.Node]
    numbers: list[fx.Node]


def with_off_diagonals(graph: fx.Graph) -> fx.Graph:
    """The same graph with what takes out off-diagonals replaced; the very graph, if nothing does."""
    nodes = list(graph.nodes)
    candidates = [node for node in nodes if name_of(node) in _ENDS and _side(node)]
    if not candidates:
        return graph
    operators = Operators()
    memory = Memory(nodes, operators)
    constants = _Constants(memory)
    moving: set[fx.Node] = set()
    for node in nodes:
        if is_weight(node) or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    parts = []
    for end in candidates:
        matrix = _matrix_of(end, moving, constants) if end in moving else None
        part = None if matrix is None else _followed(matrix, end, operators, memory)
        if part is not None:
            parts.append(part)
    return _replaced(graph, parts) if parts else graph


def _side(node: fx.Node) -> int:
    """The n for which a tensor has n (n - 1) elements; 0 if there is none."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or not val.is_floating_point() or val.numel() < 2:
        return 0
    side = (1 + math.isqrt(1 + 4 * val.numel())) // 2
    return side if side * (side - 1) == val.numel() and side * side <= _MOST_ELEMENTS else 0


def _matrix_of(end: fx.Node, moving: set[fx.Node], constants: _Constants) -> fx.Node | None:
    """The square matrix of which a node holds each element off the diagonal once, and none on it."""
    side, chain, node = _side(end), [end], end
    while len(chain) <= _MOST_STEPS:
        sources = [source for source in node.all_input_nodes if source in moving]
        if len(sources) != 1 or node.op != "call_function" or name_of(node) not in _STEPS:
            return None
        node = sources[0]
        val = node.meta.get("val")
        if isinstance(val, Tensor) and tuple(val.shape) == (side, side):
            break
        chain.append(node)
    else:
        return None
    numbers = torch.arange(side * side).view(side, side)
    found: dict[fx.Node, Tensor] = {node: numbers}
    for step in reversed(chain):
        made = constants.run(step, found)
        if made is None:
            return None
        found[step] = made
    wanted = numbers[~torch.eye(side, dtype=torch.bool)]
    return node if torch.equal(found[end].flatten().sort().values, wanted) else None


def _followed(matrix: fx.Node, end: fx.Node, operators: Operators, memory: Memory) -> _Part | None:
    """What becomes of the elements, if all of them are treated alike and reduced to numbers; else None."""
    part = _Part(matrix, end, [], [], [])
    inside, waiting, writes = {end}, [end], False
    while waiting:
        node = waiting.pop()
        for user in node.users:
            val = user.meta.get("val")
            if not isinstance(val, Tensor):
                return None
            if user in inside or user in part.numbers:
                continue
            name, written = name_of(user), memory.written_by(user)
            others = [source for source in user.all_input_nodes if source is not node]
            if name in _VIEWS and val.numel() == node.meta["val"].numel():
                part.views.append(user)
            elif operators.of(user).elementwise and tuple(val.shape) == tuple(node.meta["val"].shape):
                if any(not isinstance(o.meta.get("val"), Tensor) or o.meta["val"].ndim for o in others):
                    return None
                if any(memory.owner(source) is memory.owner(matrix) for source in written):
                    return None
                writes |= bool(written)
                part.each.append(user)
            elif name in _REDUCTIONS and not others and val.ndim == 0 and not written:
                part.numbers.append(user)
                continue
            else:
                return None
            inside.add(user)
            waiting.append(user)
    if not part.numbers or (writes and any(len(node.users) > 1 for node in inside)):
        return None
    return part if all(_over_both(node) is not None for node in part.numbers) else None


def _over_both(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a reduction of all dimensions, with both of a matrix in place of those that are named."""
    known = signature(node.target)
    if known is None:
        return None
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, argument in enumerate(known.arguments):
        if argument.name not in ("dim", "dims"):
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        if given is None or given == []:
            continue
        if not isinstance(given, (list, tuple)):
            return None
        if position < len(args):
            args[position] = [0, 1]
        else:
            kwargs[argument.name] = [0, 1]
    return tuple(args), kwargs


def _replaced(graph: fx.Graph, parts: Sequence[_Part]) -> fx.Graph:
    """A copy of the graph in which the elements stay where they are."""
    matrices = {part.end: part.matrix for part in parts}
    views = {node for part in parts for node in part.views}
    sides = {node: _side(part.end) for part in parts for node in (part.end, *part.each)}
    numbers = {node for part in parts for node in part.numbers}
    unused = _unused(graph, parts)
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in matrices:
            copies[node] = copy = made.call_function(OFF_DIAGONAL, (copies[matrices[node]],))
            copy.meta = dict(node.meta)
        elif node in views:
            copies[node] = copies[next(source for source in node.all_input_nodes if source in copies)]
            continue
        elif node in unused:
            continue
        else:
            copies[node] = copy = made.node_copy(node, lambda source: copies[source])
            if "left" in node.meta:
                copy.meta["left"] = {copies[left]: name for left, name in node.meta["left"].items()}
        if node in sides:
            val = node.meta["val"]
            copy.meta["val"] = torch.empty(sides[node], sides[node], dtype=val.dtype, device="meta")
        if node in numbers:
            args, kwargs = _over_both(node) or (node.args, node.kwargs)
            copy.args = fx.node.map_arg(args, lambda source: copies[source])
            copy.kwargs = fx.node.map_arg(kwargs, lambda source: copies[source])
    return made


def _unused(graph: fx.Graph, parts: Sequence[_Part]) -> set[fx.Node]:
    """What led from a matrix to the elements off its diagonal, and to nothing else."""
    left = {node for one in graph.nodes for node in one.meta.get("left", ())}
    kept = left | {part.matrix for part in parts}
    ends = {part.end for part in parts}
    gone = set(ends)
    for node in reversed(list(graph.nodes)):
        if name_of(node) in _STEPS and node.users and node not in kept and gone.issuperset(node.users):
            gone.add(node)
    return gone - ends


class _Constants:
    """What depends on no weight and on no input, run on real tensors."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._known: dict[fx.Node, Tensor | None] = {}

    def of(self, node: fx.Node) -> Tensor | None:
        """The value of a node; None if it is no constant, or nothing says what it holds when it is read."""
        if node not in self._known:
            self._known[node] = None
            if node not in self._memory.written:
                real = node.meta.get("real") if node.op == "placeholder" and node.meta["kind"] == "constant" else None
                self._known[node] = real if node.op == "placeholder" else self.run(node, {})
        return self._known[node]

    def run(self, node: fx.Node, given: Mapping[fx.Node, Tensor]) -> Tensor | None:
        """The result of a node on these tensors, and on constants."""
        val = node.meta.get("val")
        if node.op != "call_function" or is_random(node.target) or not isinstance(val, Tensor):
            return None
        if val.numel() > _MOST_ELEMENTS or signature(node.target) is None:
            return None
        values = {source: given.get(source, None) for source in node.all_input_nodes}
        for source in values:
            if values[source] is None:
                values[source] = self.of(source)
        if any(value is None for value in values.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # an operator that has no kernel for whole numbers
            return None
        return result if isinstance(result, Tensor) and result.shape == val.shape else None
