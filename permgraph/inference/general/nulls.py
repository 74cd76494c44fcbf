"""Null directions: what can be added to a parameter without any effect, because something takes it out again.

A bias of keys adds one number to all logits of a query, which the softmax over them takes out; so is any vector added
to all logits of a router; and what is the same for all channels of a stream is taken out by the mean that LayerNorm
subtracts. All of these are one thing: an addition that *does not vary along a dimension*, on its way through linear
operators, until one takes out what does not vary along it. So for each parameter and dimension an addition is followed
through the graph; it must be taken out on every way that leads from it. Where an operator is not known here, or the
addition reaches an output, there is no null direction.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from permgraph.inference.operators import arguments_of, dimensions_kept, name_of
from permgraph.inference.solution import Solution
from permgraph.spec.general import NullDirection

Part = tuple[int, int, int]
MOST_STEPS = 2000
"""An addition that is on its way through more operators is given up."""


@dataclass(frozen=True)
class Added:
    """What is added to a tensor: it does not vary along these dimensions, and is zero outside of a part."""

    uniform: frozenset[int]
    part: Part | None = None


class _UnknownError(Exception):
    """What becomes of an addition is not known."""


def null_directions(solution: Solution) -> tuple[NullDirection, ...]:
    """The null directions of all vectors and matrices among the parameters of a graph."""
    paths = _Paths(solution)
    found = []
    for node in solution.nodes:
        if node.op != "placeholder" or node.meta["kind"] != "parameter" or not node.users:
            continue
        val = node.meta["val"]
        if not isinstance(val, Tensor) or val.ndim not in (1, 2) or not val.is_floating_point() or 1 in val.shape:
            continue
        for added in paths.candidates(node, tuple(val.shape)):
            reason = paths.taken_out(node, added)
            if reason is not None:
                name = node.meta["names"][0]
                found.append(NullDirection(name, tuple(sorted(added.uniform)), added.part, reason))
                if not added.uniform and added.part is None:
                    break
    return tuple(found)


class _Paths:
    """Follows additions through one graph."""

    def __init__(self, solution: Solution) -> None:
        self.nodes = solution.nodes
        self.at = {node: number for number, node in enumerate(self.nodes)}
        self.written = solution.facts.memory.written
        self.live = solution.facts.live
        self.left = {node for one in self.nodes for node in one.meta.get("left", ())}
        self.cuts = _cuts(self.nodes)

    def candidates(self, node: fx.Node, shape: tuple[int, ...]) -> Iterator[Added]:
        """What could be added: anything to a vector or a part of it, or the same along one dimension."""
        if len(shape) == 1:
            yield Added(frozenset())
            if any(name_of(user) in ("add", "addmm") for user in node.users):
                yield from (Added(frozenset(), (0, start, stop)) for start, stop in self.cuts.get(shape[0], ()))
        yield from (Added(frozenset((dim,))) for dim in range(len(shape)))

    def taken_out(self, start: fx.Node, added: Added) -> str | None:
        """What takes an addition out on every way; None if anything does not, or is not known."""
        if start in self.written or start in self.left:
            return None
        states: dict[fx.Node, Added] = {start: added}
        waiting: list[tuple[int, fx.Node]] = []
        seen: set[fx.Node] = set()
        reasons: dict[str, None] = {}

        def wait(node: fx.Node) -> None:
            for user in node.users:
                if user not in seen and user in self.live:
                    seen.add(user)
                    heapq.heappush(waiting, (self.at[user], user))

        wait(start)
        steps = 0
        while waiting:
            _, node = heapq.heappop(waiting)
            steps += 1
            if steps > MOST_STEPS or node.op != "call_function" or node in self.written or node in self.left:
                return None
            try:
                after = _after(node, states)
            except _UnknownError:
                return None
            if isinstance(after, str):
                reasons.setdefault(after)
            elif after is not None:
                states[node] = after
                wait(node)
        return ", ".join(reasons) or None


def _cuts(nodes: Sequence[fx.Node]) -> Mapping[int, Sequence[tuple[int, int]]]:
    """For each size at which a last dimension is split, the parts."""
    cuts: dict[int, dict[tuple[int, int], None]] = {}
    for node in nodes:
        if name_of(node) in ("split", "split_with_sizes", "chunk"):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            size = source.meta["val"].shape[-1]
            if _dim(arguments_of(node).get("dim", 0), source) == source.meta["val"].ndim - 1:
                for start, stop in _parts(node):
                    cuts.setdefault(size, {})[start, stop] = None
    return {size: list(parts) for size, parts in cuts.items()}


def _parts(node: fx.Node) -> list[tuple[int, int]]:
    source = node.args[0]
    dim = _dim(arguments_of(node).get("dim", 0), source)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _dim(dim: int, node: Any) -> int:
    return int(dim % max(1, node.meta["val"].ndim))


def _after(node: fx.Node, states: Mapping[fx.Node, Added]) -> Added | str | None:
    """What is added to a node's result; None where nothing is, or what takes it out.

    Raises _UnknownError where it is not known.
    """
    if node.target is operator.getitem:
        return _item(node, states)
    if getattr(node.target, "_opname", "").endswith("_"):
        raise _UnknownError
    step = STEPS.get(name_of(node))
    if step is None:
        raise _UnknownError
    return step(node, arguments_of(node), states)


def _item(node: fx.Node, states: Mapping[fx.Node, Added]) -> Added | None:
    source, number = node.args
    assert isinstance(source, fx.Node) and isinstance(number, int)
    added = states[source]
    if name_of(source) == "unbind":
        return added
    dim = _dim(arguments_of(source).get("dim", 0), source.args[0])
    if added.part is None or added.part[0] != dim:
        return added
    start, stop = _parts(source)[number]
    if added.part[2] <= start or added.part[1] >= stop:
        return None
    return Added(added.uniform)


def _aligned(value: Any, ndim: int, states: Mapping[fx.Node, Added]) -> Added:
    """What is added to an operand, seen in a result to which it is broadcast."""
    added, shape = states[value], value.meta["val"].shape
    before = ndim - len(shape)
    uniform = {d + before for d, size in enumerate(shape) if size == 1 or d in added.uniform} | set(range(before))
    part = None if added.part is None else (added.part[0] + before, *added.part[1:])
    return Added(frozenset(uniform), part)


def _together(several: Sequence[Added]) -> Added:
    if len(several) == 1:
        return several[0]
    return Added(frozenset.intersection(*(added.uniform for added in several)))


def _sum(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    ndim = node.meta["val"].ndim
    return _together([_aligned(v, ndim, states) for n in ("self", "other") if (v := given[n]) in states])


def _scaled(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    """A product with what does not vary along a dimension leaves what does not vary along it."""
    ndim = node.meta["val"].ndim
    one, other = given["self"], given["other"]
    if name_of(node) == "mul" and one not in states:
        one, other = other, one
    if one not in states or other in states:
        raise _UnknownError
    added = _aligned(one, ndim, states)
    shape = other.meta["val"].shape if isinstance(other, fx.Node) else ()
    varies = {d + ndim - len(shape) for d, size in enumerate(shape) if size > 1}
    return Added(added.uniform - varies, added.part)


def _same(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    if not node.meta["val"].is_floating_point():
        raise _UnknownError
    return states[node.args[0]]  # type: ignore[index]


def _split(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    source = node.args[0]
    added = states[source]  # type: ignore[index]
    if name_of(node) == "unbind":
        dim = _dim(given.get("dim", 0), source)
        return Added(frozenset(d - (d > dim) for d in added.uniform if d != dim))
    return added


def _kept(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    source = node.args[0]
    order = dimensions_kept(node, source.meta["val"].shape)  # type: ignore[union-attr]
    if order is None:
        raise _UnknownError
    added = states[source]  # type: ignore[index]
    return Added(frozenset(new for new, old in enumerate(order) if old is None or old in added.uniform))


def _select(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    dim = _dim(given["dim"], node.args[0])
    return Added(frozenset(d - (d > dim) for d in states[given["self"]].uniform if d != dim))


def _slice(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    return Added(states[given["self"]].uniform)


def _expand(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    return Added(_aligned(given["self"], node.meta["val"].ndim, states).uniform)


def _view(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    added = states[source]  # type: ignore[index]
    if math.prod(before) == 0:
        raise _UnknownError
    uniform: set[int] = set()
    part = None
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while True:  # the shortest runs of dimensions that hold the same indices
            if a <= b and i < len(before) and (not left or a < b):
                a, i = a * before[i], i + 1
                left.append(i - 1)
            elif j < len(after) and (not right or b < a):
                b, j = b * after[j], j + 1
                right.append(j - 1)
            elif i < len(before) and a < b:
                a, i = a * before[i], i + 1
                left.append(i - 1)
            else:
                break
        if a != b:
            raise _UnknownError
        if all(d in added.uniform or before[d] == 1 for d in left):
            uniform.update(right)
        if added.part is not None and left == [added.part[0]] and len(right) == 1:
            part = (right[0], *added.part[1:])
    return Added(frozenset(uniform), part)


def _matrices(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    """Of a product of matrices the rows are the first one's, and the columns the second one's."""
    ndim = node.meta["val"].ndim
    names = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2")}[name_of(node)]
    left, right = (given[name] for name in names)
    if left in states and right in states:
        raise _UnknownError
    found = []
    if left in states:
        found.append(Added(frozenset((ndim - 2,)) if ndim - 2 in states[left].uniform else frozenset()))
    if right in states:
        found.append(Added(frozenset((ndim - 1,)) if ndim - 1 in states[right].uniform else frozenset()))
    if name_of(node) == "addmm" and given["self"] in states:
        found.append(_aligned(given["self"], ndim, states))
    return _together(found)


def _embedding(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    if given["weight"] not in states:
        raise _UnknownError
    ndim, added = node.meta["val"].ndim, states[given["weight"]]
    uniform = {ndim - 1} if 1 in added.uniform else set()
    return Added(frozenset(uniform | (set(range(ndim - 1)) if 0 in added.uniform else set())))


def _softmax(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> str:
    if _dim(given["dim"], node.args[0]) not in states[given["self"]].uniform:
        raise _UnknownError
    return f"{node.target} in {node.meta.get('module') or 'the model'}, over what it is the same for"


def _layer_norm(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> str:
    x, last = given["input"], node.args[0].meta["val"].ndim - 1  # type: ignore[union-attr]
    shape = given["normalized_shape"]
    others = (given.get("weight"), given.get("bias"))
    read = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1 and user.users]
    if x not in states or any(v in states for v in others) or len(shape) != 1 or last not in states[x].uniform or read:
        raise _UnknownError
    return f"{node.target} in {node.meta.get('module') or 'the model'}, which takes the mean out"


def _attention(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> str:
    key = given["key"]
    others = [v for name, v in given.items() if name != "key" and isinstance(v, fx.Node) and v in states]
    read = [user for user in node.users if user.target is operator.getitem and user.args[1] != 0 and user.users]
    if key not in states or others or read or key.meta["val"].ndim - 2 not in states[key].uniform:
        raise _UnknownError
    if any(v is key for name, v in given.items() if name != "key"):
        raise _UnknownError
    return f"{node.target} in {node.meta.get('module') or 'the model'}, whose softmax is over the keys"


Step = Callable[[fx.Node, Mapping[str, Any], Mapping[fx.Node, Added]], Added | str]

STEPS: Mapping[str, Step] = {
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("neg", "clone", "detach", "alias", "_to_copy", "contiguous"), _same),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _split),
    **dict.fromkeys(("t", "transpose", "permute", "unsqueeze", "squeeze"), _kept),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    **dict.fromkeys(("mm", "bmm", "addmm"), _matrices),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    "select": _select,
    "slice": _slice,
    "expand": _expand,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_attention_math": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
}
