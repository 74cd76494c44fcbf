"""Indices that change places along the dimensions of tensors, and where operators carry them.

When modules change places, so do the rows of a router that score them, the parts of a concatenation that they make, and
the columns that read it. Such a move is known where a part is taken or put; along labels and through views it is
carried to all tensors of the dimension, weights among them. What carries a move wrongly is refused by the proof.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from permgraph.inference.modules.reading import Dataflow, whole
from permgraph.rules.call import Call
from permgraph.rules.ledger import Labelled, Rearrangement
from permgraph.rules.typed_tensor import VALUE, TypedTensor, matching_dims

IntArray = npt.NDArray[np.int64]


class Refused(Exception):
    """An exchange that is no symmetry, or is not known to be one: a sentence that says why."""


@dataclass(frozen=True, eq=False)
class Move:
    """Indices of one dimension that change places in pairs.

    Args:
        to: where each index goes; its own inverse.
        side: 1 for indices of the first module, 2 for those of the second, 0 for those that stay.
    """

    to: IntArray
    side: IntArray

    @classmethod
    def exchange(cls, size: int, first: tuple[int, int], second: tuple[int, int]) -> Move:
        """The ranges `first` and `second`, start and end, change places."""
        (a, b), (c, d) = first, second
        if b - a != d - c or not (b <= c or d <= a):
            raise Refused(f"parts {a}:{b} and {c}:{d} of a dimension do not change places")
        to, side = np.arange(size), np.zeros(size, dtype=np.int64)
        to[a:b], to[c:d] = np.arange(c, d), np.arange(a, b)
        side[a:b], side[c:d] = 1, 2
        return cls(to, side)

    def within(self, size: int, start: int) -> Move:
        """The same move of the indices from `start` on of a dimension of this size."""
        to, side = np.arange(size), np.zeros(size, dtype=np.int64)
        end = start + len(self.to)
        to[start:end], side[start:end] = self.to + start, self.side
        return Move(to, side)

    def same(self, other: Move) -> bool:
        return np.array_equal(self.to, other.to) and np.array_equal(self.side, other.side)

    def with_(self, other: Move) -> Move:
        """Both moves at once, of which each may know a part.

        Raises Refused if they contradict each other.
        """
        both = (self.side > 0) & (other.side > 0)
        if len(self.to) != len(other.to) or not (
            np.array_equal(self.to[both], other.to[both]) and np.array_equal(self.side[both], other.side[both])
        ):
            raise Refused("two ways of exchanging the same dimension")
        moved = self.side > 0
        return Move(np.where(moved, self.to, other.to), np.where(moved, self.side, other.side))


class Moves:
    """The moves along dimensions of tensors, each carried wherever operators say that it goes."""

    def __init__(self, flow: Dataflow, twins: dict[int, TypedTensor]) -> None:
        """`twins` has for the `id` of the tensor of a node that changes places the tensor of the other node."""
        self._flow = flow
        self._twins = twins
        self._found: dict[tuple[int, int], Move] = {}
        self.tensors: dict[int, TypedTensor] = {}
        self._queue: dict[tuple[int, int], TypedTensor] = {}  # in the order in which they are met, each once

    def of(self, tensor: TypedTensor) -> dict[int, Move]:
        """The moves along the dimensions of a tensor, and of what its values number (`VALUE`)."""
        tensor = whole(tensor)
        if id(tensor) not in self.tensors:
            return {}
        return {d: m for d in (*range(tensor.ndim), VALUE) if (m := self._found.get((id(tensor), d))) is not None}

    def add(self, tensor: TypedTensor, dim: int, move: Move) -> None:
        """Say that a dimension is moved so.

        Raises Refused where it is moved otherwise, or is one of a result.
        """
        tensor = whole(tensor)
        if self._flow.is_result(tensor):
            raise Refused("the order of the modules is seen in the result")
        key = (id(tensor), dim)
        known = self._found.get(key)
        both = move if known is None else known.with_(move)
        if known is not None and both.same(known):
            return
        self._found[key] = both
        self.tensors[id(tensor)] = tensor
        self._queue[key] = tensor
        twin = self._twins.get(id(tensor))
        if twin is not None:
            self.add(twin, dim, both)

    def carry(self) -> None:
        """Carry all moves as far as they go.

        Raises Refused where that is not known.
        """
        while self._queue:
            (at, dim), tensor = next(iter(self._queue.items()))
            del self._queue[at, dim]
            for call in self._flow.calls_of(tensor):
                for other, along, move in self._through(call, tensor, dim, self._found[at, dim]):
                    self.add(other, along, move)

    def _through(
        self, call: Call, tensor: TypedTensor, dim: int, move: Move
    ) -> Iterator[tuple[TypedTensor, int, Move]]:
        if not self._flow.operators.of(call.node).reads_values:
            return
        told = False
        if self._flow.name(call.node) == "arange" and call.out.value is not None:
            yield from ((call.out, at, move) for at in (0, VALUE))  # each number is at the index of that number
            return
        for relation in call.ledger.relations:
            moved = {
                label: found
                for one in relation.tensors
                if one.tensor is not None and whole(one.tensor) is tensor
                for label, found in by_labels(one, {dim: move}).items()
                if found is not None
            }
            for one in relation.tensors:
                for label in moved.keys() & one.axes.keys() if one.tensor is not None else ():
                    assert one.tensor is not None
                    told = True
                    if self._flow.is_of_node(one.tensor):
                        yield one.tensor, one.where[label], _in_product(one, label, moved[label])
        for a, i, b, j, _ in call.ledger.unified:
            for (end, at), (other, there) in (((a, i), (b, j)), ((b, j), (a, i))):
                if whole(end) is tensor and at == dim:
                    yield other, there, move
        if dim == VALUE and not told and self._flow.operators.of(call.node).acts == "moved":
            for other in (*call.tensors, *call.results):
                if other.value is not None and other.value.size == len(move.to):
                    yield other, VALUE, move
            return
        if self._flow.name(call.node) == "stack":
            yield from _stacked(call, tensor, dim, move)
            return
        for rearranged in call.ledger.rearrangements:
            if not told and any(whole(t) is tensor for t in rearranged.tensors):
                yield from self._rearranged(rearranged, tensor, dim, move)

    def _rearranged(
        self, moved: Rearrangement, tensor: TypedTensor, dim: int, move: Move
    ) -> Iterator[tuple[TypedTensor, int, Move]]:
        *sources, out = (whole(t) for t in moved.tensors)
        kind = moved.how[0]
        if not all(map(self._flow.is_of_node, (*sources, out))):
            raise Refused("a dimension that is exchanged goes through a tensor inside an operator")
        if kind == "view":
            yield from _viewed(sources[0], out, tensor, dim, move)
        elif kind == "take":
            yield from _taken(moved.how, sources[0], out, tensor, dim, move)
        elif kind == "join":
            yield from _joined(moved.how[1], sources, out, tensor, dim, move)
        elif kind == "every" and dim != moved.how[1]:
            yield from ((other, dim, move) for other in (sources[0], out))
        else:
            raise Refused(f"a dimension that is exchanged is part of a {kind}")


def by_labels(one: Labelled, moves: Mapping[int, Move]) -> dict[str, Move | None]:
    """The move of each label of a tensor in a link, of which several may make up one dimension.

    Raises Refused where a dimension is moved otherwise than by one of its labels.
    """
    found: dict[str, Move | None] = dict.fromkeys(one.where)
    for dim, move in moves.items():
        labels = [label for label, at in one.where.items() if at == dim]
        if len(labels) == 1 and one.axes[labels[0]].size == len(move.to):
            found[labels[0]] = move
        elif labels:
            sizes = [one.axes[label].size for label in labels]
            if math.prod(sizes) != len(move.to):
                raise Refused("a dimension that is exchanged is part of a product")
            at, inner = next(_apart(move.to, move.side, range(len(labels)), sizes))
            found[labels[at]] = inner
    return found


def _in_product(one: Labelled, label: str, move: Move) -> Move:
    """The move of a dimension of which one label is moved."""
    labels = [other for other, at in one.where.items() if at == one.where[label]]
    if len(labels) == 1:
        return move
    sizes = [one.axes[other].size for other in labels]
    at = labels.index(label)
    number = np.arange(math.prod(sizes)).reshape(sizes)
    shape = [len(move.to) if i == at else 1 for i in range(len(sizes))]
    side = np.broadcast_to(move.side.reshape(shape), sizes)
    return Move(np.take(number, move.to, axis=at).reshape(-1), side.reshape(-1))


def _viewed(
    source: TypedTensor, out: TypedTensor, tensor: TypedTensor, dim: int, move: Move
) -> Iterator[tuple[TypedTensor, int, Move]]:
    """Through a view: what is known along one dimension, along those that are put together with it or taken apart."""
    forth = tensor is source
    there = out if forth else source
    for left, right in matching_dims(source.shape, out.shape):
        mine, its = (left, right) if forth else (right, left)
        if dim not in mine:
            continue
        sizes = [tensor.shape[d] for d in mine]
        shape = [len(move.to) if d == dim else 1 for d in mine]
        number = np.arange(math.prod(sizes)).reshape(sizes)
        flat = np.take(number, move.to, axis=list(mine).index(dim)).reshape(-1)
        side = np.broadcast_to(move.side.reshape(shape), sizes).reshape(-1)
        yield from ((there, d, found) for d, found in _apart(flat, side, its, [there.shape[d] for d in its]))


def _apart(flat: IntArray, side: IntArray, dims: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, Move]]:
    """A move of flattened dimensions as one of a single dimension among them."""
    for at, d in enumerate(dims):
        grid, sides = np.moveaxis(flat.reshape(sizes), at, 0), np.moveaxis(side.reshape(sizes), at, 0)
        stride = math.prod(sizes[at + 1 :])
        to = (grid.reshape(sizes[at], -1)[:, 0] // stride) % sizes[at]
        number = np.arange(math.prod(sizes)).reshape(sizes)
        expected = np.take(number, to, axis=at)
        own = sides.reshape(sizes[at], -1)[:, 0]
        alike = np.broadcast_to(own.reshape([-1, *(1,) * (len(sizes) - 1)]), sides.shape)
        if np.array_equal(expected.reshape(-1), flat) and np.array_equal(alike, sides):
            yield d, Move(to, own.copy())
            return
    raise Refused("a view cuts a dimension across what is exchanged")


def _taken(
    how: tuple[object, ...], source: TypedTensor, out: TypedTensor, tensor: TypedTensor, dim: int, move: Move
) -> Iterator[tuple[TypedTensor, int, Move]]:
    """Through a part of a dimension; along this dimension itself, to the part if that is exchanged within itself."""
    _, cut, start, keep = how
    assert isinstance(cut, int) and isinstance(start, int)
    back = tensor is out
    at = dim + (back and not keep and dim >= cut)
    if at != cut or (back and not keep):
        there = source if back else out
        yield there, at if back else at - (not keep and at > cut), move
        return
    if not keep:
        return  # what is taken alone is looked at by the proof; where it goes elsewhere is not known from it
    end = start + out.shape[cut]
    if back:
        yield source, cut, move.within(source.shape[cut], start)
        return
    part = move.to[start:end]
    if move.side[start:end].any() and ((part >= start) & (part < end)).all():
        yield out, cut, Move(part - start, move.side[start:end])


def _stacked(call: Call, tensor: TypedTensor, dim: int, move: Move) -> Iterator[tuple[TypedTensor, int, Move]]:
    """Through tensors put side by side along a new dimension: along all others."""
    new = call.get("dim", 0) % call.out.ndim
    if tensor is whole(call.out):
        if dim == new:
            return
        dim -= dim > new
    yield call.out, dim + (dim >= new), move
    yield from ((part, dim, move) for part in call.tensors)


def _joined(
    dim_of_parts: object, sources: Sequence[TypedTensor], out: TypedTensor, tensor: TypedTensor, dim: int, move: Move
) -> Iterator[tuple[TypedTensor, int, Move]]:
    """Through a concatenation: along other dimensions to all, along its own from a part to its place in the whole."""
    if dim != dim_of_parts:
        yield from ((other, dim, move) for other in (*sources, out))
        return
    ends = list(itertools.accumulate(part.shape[dim] for part in sources))
    if tensor is out:
        for at in np.unique(np.searchsorted(ends, np.flatnonzero(move.side), side="right")):
            part, start = sources[at], ends[at] - sources[at].shape[dim]
            inner = move.to[start : ends[at]]
            if ((inner >= start) & (inner < ends[at])).all():
                yield part, dim, Move(inner - start, move.side[start : ends[at]])
        return
    for part, end in zip(sources, ends, strict=True):
        if part is tensor:
            yield out, dim, move.within(ends[-1], end - part.shape[dim])
