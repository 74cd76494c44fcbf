"""How a permutation acts on one tensor: from axis expressions to index tensors, and from those to new tensors.

The old coordinate of each new element is found dimension by dimension. A dimension's new coordinate is taken apart into
the coordinates of its leaves; each group is looked up in its array at the *new* coordinates of its parents; and the
results are put together again. So a dimension's old coordinate depends on its own new one, and on those of the
dimensions where its groups' parents and its families' labels stand; nothing else is ever expanded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from permgraph.spec.binding import Group, IntArray, Layout, coordinates
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Path, Product, Ref, Sum, size_of

_STEP = 1 << 14
"""Elements that one step of a Python loop should move at least, so that the loop itself costs nothing."""


@dataclass(frozen=True, slots=True)
class Block:
    """Dimensions whose old coordinates depend on each other's new ones, and on no other dimension's.

    Args:
        dims: the dimensions, in ascending order.
        indices: for each of them its old coordinate, of a shape that broadcasts over ``dims``; None where it is the
            new one.
    """

    dims: tuple[int, ...]
    indices: tuple[IntArray | None, ...]


def blocks(
    layout: Layout,
    groups: Mapping[str, Group],
    arrays: Mapping[str, IntArray],
    still: frozenset[int] = frozenset(),
) -> tuple[Block, ...]:
    """What moves in a tensor, cut into independent blocks of dimensions.

    ``arrays`` holds the permutation of each group that is not at rest; the dimensions in ``still`` stay as they are.
    """
    reader = _Reader(layout, groups, arrays)
    old = {dim: None if dim in still else reader.old(dim) for dim in range(len(layout.axes))}
    moved = {dim: index for dim, index in old.items() if index is not None}
    involved = {dim: {dim, *(at for at, size in enumerate(index.shape) if size > 1)} for dim, index in moved.items()}
    components: list[set[int]] = []
    for dims in involved.values():
        joined = set(dims)
        apart = []
        for component in components:
            if component & joined:
                joined |= component
            else:
                apart.append(component)
        components = [*apart, joined]
    return tuple(
        Block(dims, tuple(_over(moved[dim], dims) if dim in moved else None for dim in dims))
        for dims in sorted(tuple(sorted(component)) for component in components)
    )


def _over(index: IntArray, dims: tuple[int, ...]) -> IntArray:
    return np.array(index).reshape([index.shape[dim] for dim in dims])


class _Reader:
    """Old coordinates, dimension by dimension, as arrays that broadcast over all dimensions."""

    def __init__(self, layout: Layout, groups: Mapping[str, Group], arrays: Mapping[str, IntArray]) -> None:
        self.axes, self.families, self.groups, self.arrays = layout.axes, layout.families, groups, arrays
        self.at = {(occurrence.dim, occurrence.path): occurrence for occurrence in layout.occurrences}

    def old(self, dim: int) -> IntArray | None:
        """The old coordinate of ``dim``, or None where it is always the new one."""
        axis = self.axes[dim]
        if not any(o.dim == dim and o.group in self.arrays for o in self.at.values()) or not size_of(axis, self.groups):
            return None
        return self.read(axis, dim, (), self.along(dim, coordinates(axis, (), self.groups)))

    def along(self, dim: int, vector: IntArray) -> IntArray:
        return vector.reshape([-1 if at == dim else 1 for at in range(len(self.axes))])

    def read(self, axis: Axis, dim: int, path: Path, new: IntArray) -> IntArray | None:
        """The old coordinate of the node at this place, given its new one; None where they are the same.

        Where the node is not there (another part of a sum, another member of a family) the answer is any number.
        """
        match axis:
            case Fixed():
                return None
            case Ref(group):
                array = self.arrays.get(group)
                if array is None:
                    return None
                parents = (
                    self.along(o.dim, np.maximum(coordinates(self.axes[o.dim], o.path, self.groups), 0))
                    for o in self.at[dim, path].parents
                )
                old: IntArray = array[(*parents, new)]
                return old
            case Label(_, expr):
                return self.read(expr, dim, (*path, 0), new)
            case Product(factors):
                return self.product(factors, dim, path, new)
            case Sum(parts):
                return self.concatenation(parts, dim, path, new)
            case Family(_, members):
                return self.family(members, dim, path, new)

    def product(self, factors: tuple[Axis, ...], dim: int, path: Path, new: IntArray) -> IntArray | None:
        total, moved, stride = np.zeros_like(new), False, 1
        for step in reversed(range(len(factors))):
            size = size_of(factors[step], self.groups)
            own = new // stride % size
            old = self.read(factors[step], dim, (*path, step), own)
            moved |= old is not None
            total = total + stride * (own if old is None else old)
            stride *= size
        return total if moved else None

    def concatenation(self, parts: tuple[Axis, ...], dim: int, path: Path, new: IntArray) -> IntArray | None:
        whole, start = None, 0
        for step, part in enumerate(parts):
            size = size_of(part, self.groups)
            old = self.read(part, dim, (*path, step), np.clip(new - start, 0, size - 1)) if size else None
            if old is not None:
                there = (new >= start) & (new < start + size)
                whole = np.where(there, old + start, new if whole is None else whole)
            start += size
        return whole

    def family(self, members: tuple[Axis, ...], dim: int, path: Path, new: IntArray) -> IntArray | None:
        at, labelled = self.families[dim, path]
        whole = None
        for step, member in enumerate(members):
            old = self.read(member, dim, (*path, step), new)
            if old is not None:
                part = self.along(at, coordinates(self.axes[at], (*labelled, step), self.groups))
                whole = np.where(part >= 0, old, new if whole is None else whole)
        return whole


def gather(tensor: torch.Tensor, moved: tuple[Block, ...]) -> torch.Tensor:
    """A new tensor with ``new[..., i, ...] = old[..., index of i, ...]`` for each block; contiguous if any moves."""
    out = tensor
    for block in moved:
        out = _gather_block(out, block)
    return out.clone() if out is tensor else out


def _gather_block(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    dims = block.dims
    if len(dims) == 1:
        (index,) = block.indices
        assert index is not None
        return select(tensor, dims[0], _on(index, tensor))
    if dims[-1] - dims[0] == len(dims) - 1:
        sizes = tensor.shape[dims[0] : dims[-1] + 1]
        flat = tensor.reshape(*tensor.shape[: dims[0]], math.prod(sizes), *tensor.shape[dims[-1] + 1 :])
        moved = select(flat, dims[0], _on(flat_index(block, tuple(sizes)), tensor))
        return moved.reshape(tensor.shape)
    slabs = _by_slabs(tensor, block)
    if slabs is not None:
        return slabs
    order = [*dims, *(dim for dim in range(tensor.ndim) if dim not in dims)]
    front = Block(tuple(range(len(dims))), block.indices)
    back = [order.index(dim) for dim in range(tensor.ndim)]
    return _gather_block(tensor.permute(order), front).permute(back).contiguous()


def flat_index(block: Block, sizes: tuple[int, ...]) -> IntArray:
    """The old row-major index of each element of a block's dimensions, of shape ``(product of sizes,)``."""
    flat = np.zeros((1,) * len(sizes), dtype=np.int64)
    for at, (size, index) in enumerate(zip(sizes, block.indices, strict=True)):
        if index is None:
            index = np.arange(size).reshape([-1 if dim == at else 1 for dim in range(len(sizes))])
        flat = flat * size + index
    return np.broadcast_to(flat, sizes).flatten()


def _by_slabs(tensor: torch.Tensor, block: Block) -> torch.Tensor | None:
    """The block one slab at a time, where it is made of large slabs that are moved and permuted inside.

    That is so where one dimension, of an expert say, decides alone where each slab comes from, and the others depend on
    it and on themselves. Elsewhere None. It saves the two transpositions that the general way needs.
    """
    for at, outer in enumerate(block.dims):
        index = block.indices[at]
        if tensor.numel() < _STEP * tensor.shape[outer] or (index is not None and index.size != index.shape[at]):
            continue
        inner: list[tuple[int, IntArray]] = []
        for other, found in enumerate(block.indices):
            if other != at and found is not None:
                if any(size > 1 and axis not in (at, other) for axis, size in enumerate(found.shape)):
                    break
                inner.append((block.dims[other], np.moveaxis(found, at, 0).reshape(found.shape[at], -1)))
        else:
            out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            source = None if index is None else index.reshape(-1).tolist()
            for slab in range(tensor.shape[outer]):
                moved = tensor.select(outer, slab if source is None else source[slab])
                for dim, rows in inner:
                    row = rows[slab if len(rows) > 1 else 0]
                    moved = select(moved, dim - (dim > outer), _on(row, tensor))
                out.select(outer, slab).copy_(moved)
            return out
    return None


def select(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """``tensor.index_select(dim, index)``; on the CPU with few threads, the faster way to move short runs."""
    run = math.prod(tensor.shape[dim + 1 :]) * tensor.element_size()
    # PyTorch moves a column at a time, which misses the cache at every element; NumPy moves along each row, two to
    # four times as fast, but in one thread.
    if tensor.device.type == "cpu" and dim > 0 and run <= 16 and torch.get_num_threads() <= 4:
        bits = _BITS.get(tensor.element_size())
        if bits is not None:
            return torch.from_numpy(np.take(tensor.view(bits).numpy(), index.numpy(), axis=dim)).view(tensor.dtype)
    return tensor.index_select(dim, index)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _on(index: IntArray, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(tensor.device)
