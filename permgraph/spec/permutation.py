"""`Permutation`: an element of a spec's group, and how it acts on state dicts.

The convention, stated once in the architecture: ``new[i] = old[p[i]]``, and ``p @ q`` is p after q.
"""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from permgraph.errors import MismatchError, SpecError
from permgraph.io.files import write_atomically
from permgraph.spec.action import Block, blocks, gather
from permgraph.spec.binding import Group, IntArray
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Ref, refs, size_of
from permgraph.spec.stacks import places
from permgraph.weights.distributed import gathered, redistributed_like
from permgraph.weights.identity import SameTensor

FORMAT = "permgraph.permutation"
VERSION = "1"


@dataclass(frozen=True, eq=False, repr=False)
class Permutation:
    """One permutation for each group of a spec, and for a fibred group one at each index of its parents.

    Args:
        spec: the spec to whose groups this belongs.
        arrays: for each moving group an integer array of shape ``(*parents' sizes, size)`` whose last axis holds
            permutations; a group that is left out is at rest. The array is read at the *new* index of each parent:
            ``new[i, j] = old[p_h[i], p_d[i, j]]`` for a group d over h.

    Raises:
        SpecError: the spec has no such group, or the group is fixed and the array would move it.
        MismatchError: an array has another shape than the group asks for, or a row of it is not a permutation.

    Example:
        >>> spec = pg.PermutationSpec.parse('''
        ... weight  3x2  hidden .
        ... groups: hidden 3
        ... ''')
        >>> p = Permutation(spec, {"hidden": np.array([2, 0, 1])})
        >>> p.apply({"weight": torch.tensor([[0, 0], [1, 1], [2, 2]])})["weight"].tolist()
        [[2, 2], [0, 0], [1, 1]]
        >>> (p @ p.inverse()).is_identity
        True
    """

    spec: SpecData
    arrays: Mapping[str, IntArray]
    _plans: dict[Any, tuple[Block, ...]] = field(default_factory=dict, init=False, repr=False)
    _inner: dict[str, SpecData] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.spec.general is not None:
            raise SpecError(
                "this spec has general symmetries, of which permutations are a part: take spec.permutations() for "
                "whatever knows permutations alone, or an element of the whole group, a Transformation"
            )
        for name, array in self.arrays.items():
            if name not in self.spec.groups:
                raise SpecError(f"no group {name!r} in the spec; it has {', '.join(self.spec.groups) or 'none'}")
            checked = _checked(self.spec, name, array)
            if name not in self.spec.moving and not np.array_equal(checked, _rest(self.spec, name)):
                raise SpecError(f"group {name!r} is fixed or stands in no parameter: only the identity acts on it")
        complete: dict[str, IntArray] = {}
        for name in self.spec.moving:
            array = _checked(self.spec, name, self.arrays[name]) if name in self.arrays else _rest(self.spec, name)
            array.flags.writeable = False
            complete[name] = array
        object.__setattr__(self, "arrays", MappingProxyType(complete))

    def __reduce__(self) -> tuple[Any, ...]:
        return Permutation, (self.spec, dict(self.arrays))

    # --- making -------------------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, spec: SpecData) -> Permutation:
        """The permutation of ``spec`` that moves nothing."""
        return cls(spec, {})

    @classmethod
    def random(
        cls,
        spec: SpecData,
        seed: int | np.random.Generator | torch.Generator,
        *,
        every_group: bool = False,
    ) -> Permutation:
        """A uniformly random permutation of ``spec``.

        Args:
            spec: whose groups to draw from.
            seed: an integer, or a generator of NumPy or PyTorch, which is advanced.
            every_group: draw each group again until it moves, so that no group is at rest by chance.
        """
        if isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
        generator = np.random.default_rng(seed)
        arrays = {}
        for name in spec.moving:
            rest = _rest(spec, name)
            arrays[name] = generator.permuted(rest, axis=-1)
            while every_group and np.array_equal(arrays[name], rest):
                arrays[name] = generator.permuted(rest, axis=-1)
        return cls(spec, arrays)

    # --- the group ----------------------------------------------------------------------------------------------------

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return not self._moved

    def __repr__(self) -> str:
        moved = sum(self.moved().values())
        of = sum(array.size for array in self.arrays.values())
        return f"<Permutation of {len(self.spec.moving)} groups: {moved} of {of} indices move>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"

    def moved(self) -> dict[str, int]:
        """For each group, how many of its indices move, over all indices of its parents."""
        return {name: int((array != np.arange(array.shape[-1])).sum()) for name, array in self.arrays.items()}

    @functools.cached_property
    def _moved(self) -> Mapping[str, IntArray]:
        return {name: self.arrays[name] for name, count in self.moved().items() if count}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Permutation):
            return NotImplemented
        return self.spec.fingerprint == other.spec.fingerprint and all(
            np.array_equal(array, other.arrays[name]) for name, array in self.arrays.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __matmul__(self, other: Permutation) -> Permutation:
        """This permutation after ``other``: ``(p @ q).apply(x) == p.apply(q.apply(x))``.

        Raises MismatchError if the two belong to different specs.
        """
        if not isinstance(other, Permutation):
            return NotImplemented
        if self.spec.fingerprint != other.spec.fingerprint:
            differences = self.spec.diff(other.spec)
            raise MismatchError(f"the permutations belong to different specs: {differences[0]}")
        return Permutation(self.spec, compose(self.spec, self.arrays, other.arrays))

    def inverse(self) -> Permutation:
        """The permutation that undoes this one."""
        arrays = {}
        for name, array in self.arrays.items():
            undone = np.empty_like(array)
            old = (index[..., None] for index in old_parents(self.spec.groups, self.arrays, name))
            undone[(*old, array)] = np.arange(array.shape[-1])
            arrays[name] = undone
        return Permutation(self.spec, arrays)

    def restricted_to(self, groups: Iterable[str]) -> Permutation:
        """The same on ``groups``, and the identity on all others.

        Raises SpecError if the spec has no such group.
        """
        keep = set(groups)
        for name in sorted(keep - set(self.spec.groups)):
            raise SpecError(f"no group {name!r} in the spec; it has {', '.join(self.spec.groups) or 'none'}")
        return Permutation(self.spec, {name: array for name, array in self.arrays.items() if name in keep})

    def of(self, spec: SpecData) -> Permutation:
        """The same permutation, of a spec with the same groups.

        Raises SpecError or MismatchError if its groups are others.
        """
        return Permutation(spec, dict(self.arrays))

    # --- acting -------------------------------------------------------------------------------------------------------

    def apply(self, state_dict: Mapping[str, Any], *, exclude: Collection[tuple[str, int]] = ()) -> dict[str, Any]:
        """A new state dict with its parameters and buffers permuted; the input is not changed.

        Keys keep their order. Every tensor is a new one, also where nothing moves; names that share a tensor share
        the new one. Entries that are not tensors, such as extra state, are passed on as they are.

        Args:
            state_dict: name to tensor, on any device and of any dtype, contiguous or not. A tensor in parts on several
                processes (DTensor) is returned in the same parts; all processes must call this alike.
            exclude: parameter and dimension of axes to leave unmoved. The result is then no longer the same network:
                this is for controls.

        Raises:
            SpecError: ``exclude`` names a parameter or dimension that the spec does not know.
            MismatchError: the state dict does not fit the spec (see `PermutationSpec.check`), or a tensor has no
                values to move (meta, fake, uninitialised), or is quantised or sparse.
        """
        if not isinstance(state_dict, Mapping):
            kind = type(state_dict).__name__
            raise MismatchError(f"apply() takes a state dict, not a {kind}: call it with .state_dict()")
        self.spec.check(state_dict)
        still: dict[str, set[int]] = {}
        for name, dim in exclude:
            self._require_dimension(name, dim)
            still.setdefault(self.spec.canonical(name), set()).add(dim)
        out: dict[str, Any] = {}
        done: dict[tuple[str, str], torch.Tensor] = {}
        tied, same = frozenset(self.spec.aliases.values()), SameTensor()
        for key, value in state_dict.items():
            if not isinstance(value, torch.Tensor):
                out[key] = value
                continue
            if key in self.spec.in_stack:
                stack, _ = self.spec.in_stack[key]
                source, within, kept = self.member(key, exclude=still.get(stack, ()))
                out[key] = within.apply_to(source, state_dict[source], exclude=kept)
                continue
            sample, value = value, gathered(value)
            require_values(key, value)
            name = self.spec.aliases.get(key, key)
            identity = (name, same.first_name(key, value) if name in tied else key)
            if identity not in done:
                axes = self.spec.axes.get(name)
                plan = () if axes is None else self._plan(axes, frozenset(still.get(name, ())))
                done[identity] = redistributed_like(gather(value.detach(), plan), sample)
            out[key] = done[identity]
        return out

    def apply_to(self, name: str, tensor: torch.Tensor, *, exclude: Collection[int] = ()) -> torch.Tensor:
        """A new tensor: the parameter or buffer ``name``, permuted; ``exclude`` lists dimensions to leave unmoved.

        Raises SpecError if the spec does not know the name or a dimension, and MismatchError if the shape differs or
        there are no values to move.
        """
        name = self.spec.canonical(name)
        for dim in exclude:
            self._require_dimension(name, dim)
        self.spec.check_entry(name, tensor)
        sample, tensor = tensor, gathered(tensor)
        require_values(name, tensor)
        plan = self._plan(self.spec.axes[name], frozenset(exclude))
        return redistributed_like(gather(tensor.detach(), plan), sample)

    def member(self, name: str, *, exclude: Collection[int] = ()) -> tuple[str, Permutation, tuple[int, ...]]:
        """Where a tensor of a module that changes places comes from, and what is done to it on the way.

        Args:
            name: of a tensor in a stack, see `PermutationSpec.stacks`.
            exclude: dimensions of the stack to leave unmoved.

        Returns:
            The name of the tensor that takes its place; a permutation of a spec that has such tensors alone; and which
            of its dimensions are to be left unmoved.

        Raises SpecError if no stack has the name.
        """
        if name not in self.spec.in_stack:
            raise SpecError(f"{name!r} is in no stack of the spec")
        stack, place = self.spec.in_stack[name]
        axes, groups = self.spec.axes[stack], self.spec.groups
        depth = len(place)
        above = {axis.group: at for axis, at in zip(axes, place, strict=False) if isinstance(axis, Ref)}
        old = []
        for dim, (group, at) in enumerate(above.items()):
            array = None if dim in exclude else self.arrays.get(group)
            over = tuple(above[parent] for parent in groups[group].parents)
            old.append(at if array is None else int(array[(*over, at)]))
        source: Any = self.spec.stacks[stack]
        for at in old:
            source = source[at]
        if stack not in self._inner:
            inside: dict[str, Group] = {}
            for axis in axes[depth:]:
                for own in refs(axis):
                    inside |= {own: groups[own]} | {parent: groups[parent] for parent in groups[own].parents}
            own_groups = {
                group: replace(given, parents=tuple(p for p in given.parents if p not in above))
                for group, given in inside.items()
                if group not in above
            }
            members = [member for _, member in places(self.spec.stacks[stack])]
            self._inner[stack] = type(self.spec)(own_groups, dict.fromkeys(members, axes[depth:]))
        spec = self._inner[stack]
        arrays = {
            group: array[tuple(above.get(p, slice(None)) for p in groups[group].parents)]
            for group, array in self.arrays.items()
            if group in spec.groups
        }
        return source, Permutation(spec, arrays), tuple(dim - depth for dim in exclude if dim >= depth)

    def apply_axes(self, axes: tuple[Axis, ...], tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor: ``tensor``, whose dimensions are ``axes``, permuted; for activations, say.

        Raises SpecError if the axes do not make sense in the spec, and MismatchError if their sizes are not the
        tensor's, or there are no values to move.
        """
        sizes = tuple(size_of(axis, self.spec.groups) for axis in axes)
        if sizes != tuple(tensor.shape):
            raise MismatchError(f"a tensor of shape {tuple(tensor.shape)} for axes of sizes {sizes}")
        require_values("the tensor", tensor)
        return gather(tensor.detach(), self._plan(axes, frozenset()))

    def local_index(self, name: str, dim: int) -> torch.Tensor:
        """The old coordinate along ``dim`` of each element of the parameter ``name``.

        Shape ``(size,)`` if it depends on no other dimension; else one that broadcasts over the parameter's shape,
        with size 1 in each dimension on which it does not depend.

        Raises SpecError if the spec does not know the name or the dimension.
        """
        name = self.spec.canonical(name)
        shape = self.spec.shapes[name]
        self._require_dimension(name, dim)
        for block in self._plan(self.spec.axes[name], frozenset()):
            if dim in block.dims:
                index = block.indices[block.dims.index(dim)]
                if index is None:
                    break
                if index.size == index.shape[block.dims.index(dim)]:
                    return torch.from_numpy(index.reshape(-1).copy())
                sizes = dict(zip(block.dims, index.shape, strict=True))
                return torch.from_numpy(index.reshape([sizes.get(at, 1) for at in range(len(shape))]).copy())
        return torch.arange(shape[dim])

    def _require_dimension(self, name: str, dim: int) -> None:
        shape = self.spec.shapes[self.spec.canonical(name)]
        if not 0 <= dim < len(shape):
            raise SpecError(f"{name!r} has shape {shape}: there is no dimension {dim}")

    def _plan(self, axes: tuple[Axis, ...], still: frozenset[int]) -> tuple[Block, ...]:
        key = (axes, still)
        if key not in self._plans:
            self._plans[key] = blocks(self.spec.layout(axes), self.spec.groups, self._moved, still)
        return self._plans[key]

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays to ``path`` as safetensors, with the spec's fingerprint, in one step."""
        metadata = {"format": FORMAT, "version": VERSION, "fingerprint": self.spec.fingerprint}
        if self.spec.stacks:
            metadata["modules"] = "yes"  # that its groups exchange, which whoever infers the spec again must ask for
        content = safetensors.numpy.save({name: np.array(a) for name, a in self.arrays.items()}, metadata)
        write_atomically(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], spec: SpecData) -> Permutation:
        """Read a permutation of ``spec`` that `save` wrote.

        Raises SpecError if the file is malformed or of another version, and MismatchError if it belongs to another
        spec.
        """
        where = os.fspath(path)
        if not FilePath(path).is_file():
            raise FileNotFoundError(where)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise SpecError(f"{where}: not a permutation: {error}") from None
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise SpecError(
                f"{where}: format {metadata.get('format')!r}, version {metadata.get('version')!r}; "
                f"this permgraph reads {FORMAT!r}, version {VERSION}"
            )
        if metadata.get("fingerprint") != spec.fingerprint:
            raise MismatchError(f"{where}: this permutation belongs to another spec than the one given")
        return cls(spec, arrays)


def old_parents(
    groups: Mapping[str, Group], arrays: Mapping[str, IntArray], name: str, sizes: tuple[int, ...] | None = None
) -> list[IntArray]:
    """For each parent of a group, its old index at the new indices of all of them, of shape parents' sizes.

    A group that ``arrays`` lacks stays put. ``sizes`` are the first so many indices of each parent; all by default.
    """
    parents = groups[name].parents
    sizes = tuple(groups[parent].size for parent in parents) if sizes is None else sizes
    new = dict(zip(parents, np.indices(sizes, sparse=True), strict=True))
    old = []
    for parent in parents:
        array = arrays.get(parent)
        above = (new[over] for over in groups[parent].parents)
        old.append(np.broadcast_to(new[parent] if array is None else array[(*above, new[parent])], sizes))
    return old


def compose(spec: SpecData, after: Mapping[str, IntArray], before: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """`after` following `before`, for those groups whose array that changes; a group that either lacks stays put."""
    out: dict[str, IntArray] = {}
    for name in spec.moving:
        if name not in after and (name not in before or not any(p in after for p in spec.groups[name].parents)):
            continue
        sizes = _sizes(spec, name)
        rest = np.broadcast_to(np.arange(sizes[-1]), sizes)
        old = (index[..., None] for index in old_parents(spec.groups, after, name))
        out[name] = before.get(name, rest)[(*old, after.get(name, rest))]
    return out


def _sizes(spec: SpecData, name: str) -> tuple[int, ...]:
    group: Group = spec.groups[name]
    return (*(spec.groups[parent].size for parent in group.parents), group.size)


def _rest(spec: SpecData, name: str) -> IntArray:
    sizes = _sizes(spec, name)
    return np.broadcast_to(np.arange(sizes[-1], dtype=np.int64), sizes).copy()


def _checked(spec: SpecData, name: str, given: Any) -> IntArray:
    array = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given)
    group, sizes = spec.groups[name], _sizes(spec, name)
    if array.dtype.kind not in "iu":
        raise MismatchError(f"group {name!r}: a permutation holds integers, not {array.dtype}")
    if array.shape != sizes:
        over = f" (a permutation of {group.size} for each index of {', '.join(group.parents)})" if group.parents else ""
        raise MismatchError(f"group {name!r} has an array of shape {array.shape}, but {sizes} is due{over}")
    array = array.astype(np.int64)
    wrong = (np.sort(array, axis=-1) != np.arange(sizes[-1])).any(axis=-1)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        row = f", row {at}" if at else ""
        raise MismatchError(
            f"group {name!r}{row}: not a permutation of 0 to {group.size - 1}: {array[at].tolist()[:12]}"
        )
    return array


def require_values(name: str, tensor: torch.Tensor) -> None:
    """Raise MismatchError unless ``tensor`` is an ordinary dense tensor with values in memory."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        kind = "fake" if isinstance(tensor, FakeTensor) else "on the meta device"
        raise MismatchError(f"{name!r} is {kind}: it has a shape but no values to permute; load the weights first")
    if tensor.is_quantized:
        raise MismatchError(f"{name!r} is quantised ({tensor.dtype}): permute the weights before they are quantised")
    if tensor.layout is not torch.strided:
        raise MismatchError(f"{name!r} is {tensor.layout}: make it dense first")
    if is_traceable_wrapper_subclass(tensor):
        raise MismatchError(
            f"{name!r} is a {type(tensor).__name__}, whose values lie in other tensors: gather or unwrap it first"
        )
