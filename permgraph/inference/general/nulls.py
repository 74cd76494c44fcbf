"""Null directions: what can be added to a parameter without any effect, because something takes it out again.

A bias of keys adds one number to all logits of a query, which the softmax over them takes out; so is any vector added
to all logits of a router; and what is the same for all channels of a stream is taken out by the mean that LayerNorm
subtracts. All of these are one thing: an addition that *does not vary along a dimension*, on its way through linear
operators, until one takes out what does not vary along it. So for each parameter and dimension an addition is followed
through the graph; it must be taken out on every way that leads from it. Where an operator is not known here, or the
addition reaches an output, there is no null direction.

A part of which nothing is read is one too: a layer whose result is dropped, or one of the parts into which it is split.
What is cut off by a slice is none, since the next input may be longer.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from permgraph.inference.operators import arguments_of, dimensions_kept, name_of
from permgraph.inference.solution import Solution
from permgraph.spec.general import NullDirection

Part = tuple[int, int, int]
UNREAD = "want of anything that reads it"
VIEWS = ("view", "_unsafe_view", "reshape")
PRODUCTS = ("mm", "bmm", "addmm", "mul")
MOST_PARTS = 8
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
    """The null directions of the parameters of a graph, each of one parameter alone."""
    paths = _Paths(solution)
    found = []
    for node in solution.nodes:
        if node.op != "placeholder" or node.meta["kind"] != "parameter" or not node.users:
            continue
        val = node.meta["val"]
        if not isinstance(val, Tensor) or val.ndim == 0 or not val.is_floating_point() or 0 in val.shape:
            continue
        for added in paths.candidates(node, tuple(val.shape)):
            reason = paths.taken_out(node, added)
            if reason is not None:
                name = node.meta["names"][0]
                found.append(NullDirection(name, tuple(sorted(added.uniform)), added.part, reason))
                if not added.uniform and added.part is None:
                    break  # all others are part of it
    return tuple(found)


class _Paths:
    """Follows additions through one graph."""

    def __init__(self, solution: Solution) -> None:
        self.nodes = solution.nodes
        self.at = {node: number for number, node in enumerate(self.nodes)}
        self.written = solution.facts.memory.written
        self.live = solution.facts.live
        self.left = {node for one in self.nodes for node in one.meta.get("left", ())}
        self.zeros = solution.facts.zeros
        self.siblings = bool(solution.stand_ins)  # what no pass reached, and may be read by another
        self.cuts = _cuts(self.nodes)

    def candidates(self, node: fx.Node, shape: tuple[int, ...]) -> Iterator[Added]:
        """What could be added: anything, to all of it or to a part of its rows, or the same along one dimension."""
        yield Added(frozenset())
        for start, stop in self.cuts.get(shape[0], ()):
            yield Added(frozenset(), (0, start, stop))
        yield from (Added(frozenset((dim,))) for dim, size in enumerate(shape) if size > 1)

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
                if user not in seen:
                    seen.add(user)
                    if user in self.live or user in self.left or user in self.written:
                        heapq.heappush(waiting, (self.at[user], user))
                    elif self.siblings:
                        raise _UnknownError
                    else:
                        reasons.setdefault(UNREAD)
                        wait(user)

        try:
            wait(start)
        except (_UnknownError, RecursionError):
            return None
        steps = 0
        while waiting:
            _, node = heapq.heappop(waiting)
            steps += 1
            if steps > MOST_STEPS or node.op != "call_function" or node in self.written or node in self.left:
                return None
            try:
                _require_real(node)
                after = self._after(node, states)
                if isinstance(after, str):
                    reasons.setdefault(after)
                elif after is not None:
                    states[node] = after
                    wait(node)
            except (_UnknownError, RecursionError):
                return None
        return ", ".join(reasons) or None

    def _after(self, node: fx.Node, states: Mapping[fx.Node, Added]) -> Added | str | None:
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
        given = arguments_of(node)
        zeros = [name for name, v in given.items() if isinstance(v, fx.Node) and v in self.zeros]
        added = [name for name, v in given.items() if isinstance(v, fx.Node) and v in states]
        if zeros and name_of(node) in PRODUCTS and not (name_of(node) == "addmm" and {"self"} & {*zeros, *added}):
            return f"{node.target} in {node.meta.get('module') or 'the model'}, with zeros"
        return step(node, given, states)


def _require_real(node: fx.Node) -> None:
    """Raise _UnknownError where an operator makes other than real numbers of what is added to, or reads its bits."""
    made = [val for val in _tensors(node.meta.get("val")) if val.is_floating_point()]
    if not made or node.target is torch.ops.aten.view.dtype:
        raise _UnknownError


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, Tensor)]


def _cuts(nodes: Sequence[fx.Node]) -> Mapping[int, Sequence[tuple[int, int]]]:
    """For each size at which a last dimension is split, or seen as several parts, the parts."""
    cuts: dict[int, dict[tuple[int, int], None]] = {}
    for node in nodes:
        if name_of(node) in VIEWS and isinstance(node.args[0], fx.Node):
            before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
            dim = len(before) - 1
            if dim >= 0 and len(after) > dim and tuple(after[:dim]) == tuple(before[:dim]):
                parts, size = after[dim], before[dim]
                if 1 < parts <= MOST_PARTS and parts < size:
                    each = size // parts
                    cuts.setdefault(size, {}).update({(i * each, (i + 1) * each): None for i in range(parts)})
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


def _item(node: fx.Node, states: Mapping[fx.Node, Added]) -> Added | None:
    source, number = node.args
    assert isinstance(source, fx.Node) and isinstance(number, int)
    added = states[source]
    dim = _dim(arguments_of(source).get("dim", 0), source.args[0])
    if name_of(source) == "unbind":
        return _at(dim, number, added)
    if added.part is None or added.part[0] != dim:
        return added
    start, stop = _parts(source)[number]
    if added.part[2] <= start or added.part[1] >= stop:
        return None
    return Added(added.uniform, (dim, max(added.part[1] - start, 0), min(added.part[2], stop) - start))


def _at(dim: int, number: int, added: Added) -> Added | None:
    """What is left at one index of a dimension, which is gone then."""
    part = added.part
    if part is not None and part[0] == dim:
        if not part[1] <= number < part[2]:
            return None
        part = None
    elif part is not None:
        part = (part[0] - (part[0] > dim), *part[1:])
    return Added(frozenset(d - (d > dim) for d in added.uniform if d != dim), part)


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


def _sum(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added | str:
    ndim = node.meta["val"].ndim
    if _takes_mean_out(node, given, states):
        return f"{node.target} in {node.meta.get('module') or 'the model'}, which takes the mean out"
    return _together([_aligned(v, ndim, states) for n in ("self", "other") if (v := given[n]) in states])


def _takes_mean_out(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> bool:
    """Whether a mean is subtracted that holds what is added as each element does, since it does not vary along it."""
    one, mean = given["self"], given["other"]
    if name_of(node) != "sub" or given.get("alpha", 1) != 1 or not isinstance(mean, fx.Node) or one not in states:
        return False
    is_mean = name_of(mean) == "mean" and mean.args[0] is one and bool(arguments_of(mean).get("keepdim"))
    return is_mean and states[one].part is None and _reduced(mean) <= states[one].uniform


def _scaled(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    """A product with what does not vary along a dimension leaves what does not vary along it."""
    ndim = node.meta["val"].ndim
    one, other = given["self"], given["other"]
    if given.get("rounding_mode") is not None:
        raise _UnknownError
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
    return states[node.args[0]]  # type: ignore[index]  # what of it is in each part is said there


def _kept(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    source = node.args[0]
    order = dimensions_kept(node, source.meta["val"].shape)  # type: ignore[union-attr]
    if order is None:
        raise _UnknownError
    added = states[source]  # type: ignore[index]
    part = None
    if added.part is not None and added.part[0] in order:
        part = (order.index(added.part[0]), *added.part[1:])
    return Added(frozenset(new for new, old in enumerate(order) if old is None or old in added.uniform), part)


def _select(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added | None:
    dim = _dim(given["dim"], node.args[0])
    return _at(dim, given["index"] % node.args[0].meta["val"].shape[dim], states[given["self"]])  # type: ignore[union-attr]


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
        if added.part is not None and added.part[0] in left and len(left) > 0 and len(right) > 0:
            part = _part_seen(added.part, left, right, before, after)
    return Added(frozenset(uniform), part)


def _part_seen(part: Part, left: Sequence[int], right: Sequence[int], before: Any, after: Any) -> Part | None:
    """A part of one dimension where these dimensions are seen as those; None where it is no part of one of them."""
    dim, start, stop = part
    if any(before[d] != 1 for d in left if d < dim):
        return None
    inner = math.prod(before[d] for d in left if d > dim)
    start, stop = start * inner, stop * inner
    for at in right:
        rest = math.prod(after[d] for d in right if d > at)
        if after[at] == 1:
            continue
        return (at, start // rest, stop // rest) if start % rest == 0 and stop % rest == 0 else None
    return None


def _matrices(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    """Of a product of matrices the rows are the first one's, and the columns the second one's."""
    ndim = node.meta["val"].ndim
    names = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2")}[name_of(node)]
    left, right = (given[name] for name in names)
    if left in states and right in states:
        raise _UnknownError
    found = []
    for factor, kept in ((left, ndim - 2), (right, ndim - 1)):
        if factor in states:
            part = states[factor].part
            uniform = frozenset((kept,)) if kept in states[factor].uniform else frozenset()
            found.append(Added(uniform, part if part is not None and part[0] == kept else None))
    if name_of(node) == "addmm" and given["self"] in states:
        found.append(_aligned(given["self"], ndim, states))
    return _together(found)


def _embedding(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    if given["weight"] not in states:
        raise _UnknownError
    ndim, added = node.meta["val"].ndim, states[given["weight"]]
    uniform = {ndim - 1} if 1 in added.uniform else set()
    return Added(frozenset(uniform | (set(range(ndim - 1)) if 0 in added.uniform else set())))


def _reduced(node: fx.Node) -> frozenset[int]:
    """The dimensions over which a sum, mean or variance goes."""
    ndim = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    given = arguments_of(node).get("dim")
    dims = range(ndim) if given is None or given == [] else [given] if isinstance(given, int) else given
    return frozenset(d % max(ndim, 1) for d in dims)


def _reduction(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    """A sum or mean leaves what does not vary along the other dimensions."""
    added, gone = states[given["self"]], _reduced(node)
    if given.get("keepdim"):
        return Added(added.uniform | gone)
    return Added(frozenset(d - sum(g < d for g in gone) for d in added.uniform - gone))


def _variance(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> str:
    if not _reduced(node) <= states[given["self"]].uniform:
        raise _UnknownError
    return f"{node.target} in {node.meta.get('module') or 'the model'}, which takes the mean out"


def _convolution(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> Added:
    """The same in all kernels is the same in all channels of the result; a bias is the same everywhere but there."""
    ndim = node.meta["val"].ndim
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if x in states and weight in states:
        raise _UnknownError
    found = []
    if weight in states:
        same = 0 in states[weight].uniform and given.get("groups") == 1 and not given.get("transposed")
        found.append(Added(frozenset((1,)) if same else frozenset()))
    if x in states:
        found.append(Added(states[x].uniform & {0}))
    if bias is not None and bias in states:
        everywhere = {0, *range(2, ndim)}
        found.append(Added(frozenset(everywhere | {1} if 0 in states[bias].uniform else everywhere)))
    return _together(found)


def _group_norm(node: fx.Node, given: Mapping[str, Any], states: Mapping[fx.Node, Added]) -> str:
    x = given["input"]
    groups = given.get("num_groups", given.get("group"))
    others = [v for name, v in given.items() if name != "input" and isinstance(v, fx.Node) and v in states]
    read = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1 and user.users]
    if x not in states or others or read:
        raise _UnknownError
    shape = x.meta["val"].shape
    needed = {*range(2, len(shape)), *(() if groups == shape[1] else (1,))}
    if not needed <= {d for d in range(len(shape)) if d in states[x].uniform or shape[d] == 1}:
        raise _UnknownError
    return f"{node.target} in {node.meta.get('module') or 'the model'}, which takes the mean out"


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


Step = Callable[[fx.Node, Mapping[str, Any], Mapping[fx.Node, Added]], Added | str | None]

STEPS: Mapping[str, Step] = {
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("neg", "clone", "detach", "alias", "_to_copy", "contiguous"), _same),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _split),
    **dict.fromkeys(("t", "transpose", "permute", "unsqueeze", "squeeze"), _kept),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(("mm", "bmm", "addmm"), _matrices),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    **dict.fromkeys(("sum", "mean"), _reduction),
    **dict.fromkeys(("var", "std"), _variance),
    "convolution": _convolution,
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
