"""`Transformation`: an element of the group of a spec with general symmetries, and how it acts on state dicts.

It is a permutation, and after that a matrix or factors for each index of each group, at each index of its parents:
``new = g · old[p]``. What it holds is read at the *new* indices, as a permutation's arrays are.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch

from permgraph.errors import MismatchError, SpecError
from permgraph.io.files import write_atomically
from permgraph.spec.binding import IntArray, Layout, Occurrence, coordinates
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Fixed, Ref, refs, substitute
from permgraph.spec.general import Action, General
from permgraph.spec.permutation import Permutation, old_parents
from permgraph.structures import random_element
from permgraph.structures.lattice import factors, is_member
from permgraph.weights.distributed import gathered, redistributed_like

if TYPE_CHECKING:
    from permgraph.spec.spec import PermutationSpec

FORMAT = "permgraph.transformation"
VERSION = "1"
WORST = 1e-12
"""The inverse of the condition number from which on a matrix counts as singular."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class Transformation:
    """One element of the group of a spec whose groups have structures beyond permutations.

    Args:
        spec: the spec to whose groups this belongs.
        permutation: what permutes the indices; of a group of matrices, the identity.
        matrices: for each group of matrices (GL, O, O1, T, T2) an array of shape ``(*parents' sizes, size, size)``.
        scales: for each group with positive factors an array of shape ``(*parents' sizes, size, factors)``.
        signs: the same for signs, all of them ±1; the last ones are common signs, which do not vary along the size.
        gains: for gains between which matrices act (see `PermutationSpec.general_gains`) the factors, none of them
            zero, by which each is multiplied; what reads its axis is divided by them. So one network can be given the
            gains of another.

    A group, or a gain, that is left out is at rest.

    Raises:
        SpecError: the spec has permutations alone.
        MismatchError: an array has another shape, or other values, than the structure asks for.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> spec = pg.auto_spec(net, symmetry="general")
        >>> g = spec.random(seed=0)
        >>> net.load_state_dict((g @ g.inverse()).apply(net.state_dict()))
        <All keys matched successfully>
    """

    spec: PermutationSpec
    permutation: Permutation
    matrices: Mapping[str, Array]
    scales: Mapping[str, Array]
    signs: Mapping[str, Array]
    gains: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.spec
        if spec.general is None:
            raise SpecError("the spec has permutations alone: its elements are of the class Permutation")
        complete: dict[str, dict[str, Array]] = {"matrices": {}, "scales": {}, "signs": {}}
        for kind in complete:
            for name in getattr(self, kind):
                if name not in spec.acting or _shapes(spec, name)[kind] is None:
                    raise MismatchError(f"group {name!r} has no {kind} in this spec")
        for name in spec.acting:
            for kind, shape in _shapes(spec, name).items():
                if shape is not None:
                    complete[kind][name] = _checked(spec, name, kind, shape, getattr(self, kind).get(name))
        for name, array in self.permutation.arrays.items():
            if spec.groups[name].structure.linear and bool((array != np.arange(array.shape[-1])).any()):
                raise MismatchError(f"group {name!r} is moved by a matrix, so the permutation must leave it alone")
        complete["gains"] = {name: _checked_gain(spec, name, factors) for name, factors in self.gains.items()}
        for kind, arrays in complete.items():
            object.__setattr__(self, kind, MappingProxyType(arrays))

    def __reduce__(self) -> tuple[Any, ...]:
        return Transformation, (
            self.spec, self.permutation, dict(self.matrices), dict(self.scales), dict(self.signs), dict(self.gains)
        )  # fmt: skip

    # --- making -------------------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, spec: PermutationSpec) -> Transformation:
        """The element that changes nothing."""
        return cls(spec, Permutation.identity(spec.permutations()), {}, {}, {})

    @classmethod
    def random(
        cls,
        spec: PermutationSpec,
        seed: int | np.random.Generator | torch.Generator,
        *,
        every_group: bool = False,
    ) -> Transformation:
        """A random element: permutations are uniform, and matrices have singular values within [1/2, 2]; so have gains.

        Args:
            spec: whose groups to draw from.
            seed: an integer, or a generator of NumPy or PyTorch, which is advanced.
            every_group: draw permutations again until they move something.
        """
        if isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
        generator = np.random.default_rng(seed)
        linear = [name for name in spec.acting if spec.groups[name].structure.linear]
        moved = Permutation.random(spec.permutations(), generator, every_group=every_group)
        moved = moved.restricted_to(name for name in moved.arrays if name not in linear)
        matrices, scales, signs = {}, {}, {}
        for name in spec.acting:
            structure, shapes = spec.groups[name].structure, _shapes(spec, name)
            if (shape := shapes["matrices"]) is not None:
                drawn = [random_element(structure.linear, shape[-1], generator) for _ in range(math.prod(shape[:-2]))]
                matrices[name] = np.array(drawn).reshape(shape)
            if (shape := shapes["scales"]) is not None:
                scales[name] = factors(shape, generator)
            if (shape := shapes["signs"]) is not None:
                signs[name] = generator.choice((-1.0, 1.0), shape)
                signs[name][..., structure.signs :] = signs[name][..., :1, structure.signs :]
        gains = {
            name: factors((max(spec.shapes[name]),), generator) * generator.choice((-1.0, 1.0), max(spec.shapes[name]))
            for name in spec.general_gains
        }
        return cls(spec, moved, matrices, scales, signs, gains)

    # --- the group ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        names = ", ".join(f"{name} {self.spec.groups[name].structure}" for name in list(self.spec.acting)[:4])
        more = len(self.spec.acting) - 4
        return f"<Transformation of {names}{f' and {more} more' if more > 0 else ''}>"

    def moved(self) -> dict[str, int]:
        """For each group, how many of its indices it moves or changes, over all indices of its parents."""
        counts = {}
        for name in self.spec.acting:
            if name in self.matrices:
                away = (self.matrices[name] != np.eye(self.matrices[name].shape[-1])).any(-1)
            else:
                order = self.permutation.arrays.get(name)
                away = np.zeros(_sizes(self.spec, name), bool) if order is None else order != np.arange(order.shape[-1])
                for arrays in (self.scales, self.signs):
                    if name in arrays:
                        away = away | (arrays[name] != 1).any(-1)
            counts[name] = int(away.sum())
        return counts

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes at all, not even by rounding."""
        still = self._at_rest == frozenset(self.spec.acting) and self.permutation.is_identity
        return still and all(bool((factors == 1).all()) for factors in self.gains.values())

    def __matmul__(self, other: Transformation) -> Transformation:
        """This element after ``other``: ``(g @ h).apply(x)`` is ``g.apply(h.apply(x))``, up to rounding.

        Raises MismatchError if the two belong to different specs.
        """
        if not isinstance(other, Transformation):
            return NotImplemented
        if self.spec.fingerprint != other.spec.fingerprint:
            raise MismatchError("the transformations belong to different specs")
        first = _carried(self.spec, self.permutation, other)
        return Transformation(
            self.spec,
            self.permutation @ other.permutation,
            {name: matrix @ first["matrices"][name] for name, matrix in self.matrices.items()},
            {name: array * first["scales"][name] for name, array in self.scales.items()},
            {name: array * first["signs"][name] for name, array in self.signs.items()},
            {
                name: np.asarray(self.gains.get(name, 1.0)) * np.asarray(other.gains.get(name, 1.0))
                for name in (*self.gains, *other.gains)
            },
        )

    def inverse(self) -> Transformation:
        """The element that undoes this one, up to rounding."""
        back = self.permutation.inverse()
        carried = _carried(self.spec, back, self)
        return Transformation(
            self.spec,
            back,
            {name: np.asarray(np.linalg.inv(m), dtype=np.float64) for name, m in carried["matrices"].items()},
            {name: 1 / array for name, array in carried["scales"].items()},
            carried["signs"],
            {name: 1 / factors for name, factors in self.gains.items()},
        )

    def restricted_to(self, groups: Iterable[str]) -> Transformation:
        """The same on ``groups``, and the identity on all others and on gains."""
        keep = set(groups)

        def kept(arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {name: array for name, array in arrays.items() if name in keep}

        moved = self.permutation.restricted_to(keep.intersection(self.permutation.spec.groups))
        return Transformation(self.spec, moved, kept(self.matrices), kept(self.scales), kept(self.signs))

    # --- acting -------------------------------------------------------------------------------------------------------

    def apply(self, state_dict: Mapping[str, Any], *, exclude: Collection[tuple[str, int]] = ()) -> dict[str, Any]:
        """A new state dict with this element applied; the input is not changed.

        It is computed in float64, and given in each tensor's own type. Keys, ties and what is no tensor are treated as
        `Permutation.apply` does. Where the spec is that of a model with its weights untied (``auto_spec(model,
        symmetry="general", untie=True)``), the result has a tensor of its own under each name; load it in a model whose
        weights are untied, such as `untied` makes.

        Args:
            state_dict: name to tensor.
            exclude: parameter and dimension of axes to leave as they are. The result is then no longer the same
                network: this is for controls.

        Raises:
            SpecError: ``exclude`` names a parameter or dimension that the spec does not know.
            MismatchError: the state dict does not fit the spec, or a gain that a matrix acts between has a zero.
        """
        assert self.spec.general is not None
        if not isinstance(state_dict, Mapping):
            kind = type(state_dict).__name__
            raise MismatchError(f"apply() takes a state dict, not a {kind}: call it with .state_dict()")
        state_dict = self.spec.general.untie(state_dict)
        moved = self.permutation.apply(state_dict, exclude=exclude)
        known = {self.spec.aliases.get(key, key): value for key, value in state_dict.items()}
        done: dict[int, torch.Tensor] = {}
        out = {}
        still_in: dict[str, set[int]] = {}
        for name, dim in exclude:
            still_in.setdefault(self.spec.canonical(name), set()).add(dim)
        for key, value in moved.items():
            name = self.spec.aliases.get(key, key)
            if name in self.spec.in_stack and isinstance(value, torch.Tensor):
                stack, _ = self.spec.in_stack[name]
                source, within, kept = self.member(name, exclude=still_in.get(stack, ()))
                out[key] = within._acted(source, value, known, frozenset(kept))
            elif isinstance(value, torch.Tensor) and (name in self._acting or name in self.gains):
                if id(value) not in done:
                    done[id(value)] = self._acted(name, value, known, frozenset(still_in.get(name, ())))
                out[key] = done[id(value)]
            else:
                out[key] = value
        return out

    def of(self, spec: PermutationSpec) -> Transformation:
        """The same element, of a spec with the same groups.

        Raises MismatchError if its groups are others.
        """
        moved = Permutation(spec.permutations(), dict(self.permutation.arrays))
        return Transformation(spec, moved, self.matrices, self.scales, self.signs, self.gains)

    def member(self, name: str, *, exclude: Collection[int] = ()) -> tuple[str, Transformation, tuple[int, ...]]:
        """Where a tensor of a module that changes places comes from, and what is done to it; see `Permutation.member`.

        The element that is returned is of a spec with the tensors of that stack, and the gains between which matrices
        act on them.
        """
        source, moved, kept = self.permutation.member(name, exclude=exclude)
        stack, place = self.spec.in_stack[name]
        if stack not in self._inner:
            self._inner[stack] = self._inside(stack)
        spec = self._inner[stack]
        above = {
            axis.group: at for axis, at in zip(self.spec.axes[stack], place, strict=False) if isinstance(axis, Ref)
        }

        def there(arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {
                group: array[tuple(above.get(parent, slice(None)) for parent in self.spec.groups[group].parents)]
                for group, array in arrays.items()
                if group in spec.acting
            }

        own = {group: array for group, array in moved.arrays.items() if group in spec.permutations().moving}
        within = Transformation(
            spec,
            Permutation(spec.permutations(), own),
            there(self.matrices),
            there(self.scales),
            there(self.signs),
            {gain: factors for gain, factors in self.gains.items() if gain in spec.general_gains},
        )
        return source, within, kept

    @functools.cached_property
    def _inner(self) -> dict[str, PermutationSpec]:
        return {}

    def _inside(self, stack: str) -> PermutationSpec:
        """The spec of the tensors of a stack, each by itself, and of the gains between which matrices act on them."""
        whole, general = self.spec, self.spec.general
        assert general is not None
        names, (_, place) = whole.tensors_of(stack), whole.in_stack[whole.tensors_of(stack)[0]]
        actions = general.actions.get(stack, ())[len(place) :]
        modules = {axis.group for axis in whole.axes[stack][: len(place)] if isinstance(axis, Ref)}
        axes = dict.fromkeys(names, whole.axes[stack][len(place) :])
        axes |= {gain.name: whole.axes[gain.name] for action in actions for gain, _ in action.gains}
        standing = {group for own in axes.values() for axis in own for group in refs(axis)}
        standing |= {parent for group in standing for parent in whole.groups[group].parents}
        groups = {
            name: replace(group, parents=tuple(parent for parent in group.parents if parent not in modules))
            for name, group in whole.groups.items()
            if name in standing - modules
        }
        own = dict.fromkeys(names, actions) if actions else {}
        stay = tuple(gain for gain in general.gains_that_stay if gain in axes)
        return type(whole)(groups, axes, general=General(own, gains_that_stay=stay))

    def apply_to(
        self, name: str, tensor: torch.Tensor, state_dict: Mapping[str, Any], *, exclude: Collection[int] = ()
    ) -> torch.Tensor:
        """A new tensor: the parameter or buffer ``name`` under this element; gains are read in ``state_dict``."""
        name = self.spec.canonical(name)
        moved = self.permutation.apply_to(name, tensor, exclude=exclude)
        concerned = name in self._acting or name in self.gains
        return self._acted(name, moved, state_dict, frozenset(exclude)) if concerned else moved

    def apply_axes(self, axes: tuple[Axis, ...], tensor: torch.Tensor, actions: Sequence[Action] = ()) -> torch.Tensor:
        """A new tensor: ``tensor``, whose dimensions are ``axes``, with these actions, none of them between gains."""
        paired = {name: g.size for name, g in self.spec.groups.items() if g.structure.is_paired}
        permuted = tuple(substitute(a, lambda n: Fixed(paired[n]) if n in paired else Ref(n)) for a in axes)
        moved = self.permutation.apply_axes(permuted, tensor)
        layout = self.spec.layout(axes)
        return self._acted_by(layout, actions or [Action()] * len(layout.occurrences), moved, {}, frozenset())

    def gains_of(self, name: str) -> tuple[str, ...]:
        """The gains between which this element acts on a parameter: what `apply_to` reads besides it."""
        return tuple(dict.fromkeys(gain.name for action in self._acting.get(name, ()) for gain, _ in action.gains))

    @functools.cached_property
    def _at_rest(self) -> frozenset[str]:
        """The groups whose matrices and factors change nothing."""
        moved = {n for n, m in self.matrices.items() if (m != np.eye(m.shape[-1])).any()}
        moved |= {n for arrays in (self.scales, self.signs) for n, a in arrays.items() if (a != 1).any()}
        return frozenset(self.spec.acting) - moved

    @property
    def _acting(self) -> Mapping[str, tuple[Action, ...]]:
        assert self.spec.general is not None
        return self.spec.general.actions

    def _acted(
        self, name: str, tensor: torch.Tensor, state_dict: Mapping[str, Any], still: frozenset[int]
    ) -> torch.Tensor:
        if name in self.gains and not still:
            added = self.spec.general_gains[name].added
            factors = torch.from_numpy(np.array(self.gains[name])).to(tensor.device).reshape(tensor.shape)
            return redistributed_like(((gathered(tensor).double() + added) * factors - added).to(tensor.dtype), tensor)
        if name not in self._acting:
            return tensor
        return self._acted_by(self.spec.layout(self.spec.axes[name]), self._acting[name], tensor, state_dict, still)

    def _acted_by(
        self,
        layout: Layout,
        actions: Sequence[Action],
        tensor: torch.Tensor,
        state_dict: Mapping[str, Any],
        still: frozenset[int],
    ) -> torch.Tensor:
        acting = [
            (occurrence, action)
            for occurrence, action in zip(layout.occurrences, actions, strict=True)
            if action != Action() and occurrence.dim not in still and not self._rests(occurrence.group, action)
        ]
        if not acting:
            return tensor
        if not tensor.is_floating_point():
            groups = ", ".join(f"{o.group} ({self.spec.groups[o.group].structure})" for o, _ in acting)
            raise MismatchError(
                f"a tensor of type {tensor.dtype} cannot be scaled or mixed, as {groups} would; give real numbers, or "
                f"take spec.permutations() for this network"
            )
        sample, tensor = tensor, gathered(tensor)
        new = tensor.to(torch.float64, copy=True)
        for occurrence, action in acting:
            structure = self.spec.groups[occurrence.group].structure
            where = Where(self.spec, layout, occurrence)
            if structure.linear:
                matrices = self.matrices[occurrence.group]
                if action.powers == (-1,):
                    matrices = np.swapaxes(np.linalg.inv(matrices), -1, -2)
                where.multiply(new, matrices, *self._gain(action, state_dict, new))
            else:
                new *= torch.from_numpy(where.spread(self._factor(occurrence.group, action))).to(new.device)
        return redistributed_like(new.to(tensor.dtype), sample)

    def _factor(self, group: str, action: Action) -> Array:
        """What each index is multiplied with, of shape ``(*parents' sizes, size)``."""
        product = np.ones(_sizes(self.spec, group))
        for kind, exponents in (("scales", action.powers), ("signs", action.signs)):
            if any(exponents):
                product = product * np.prod(
                    getattr(self, kind)[group] ** np.array(exponents, dtype=np.float64), axis=-1
                )
        return product

    def _rests(self, group: str, action: Action) -> bool:
        return group in self._at_rest and not any(gain.name in self.gains for gain, _ in action.gains)

    def _gain(
        self, action: Action, state_dict: Mapping[str, Any], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """The gains that a matrix acts between: by what is divided before it, and multiplied after it."""
        gain = new = None
        for factor, power in action.gains:
            values = factor.values(gathered(state_dict[factor.name])).to(like.device)
            changed = values
            if factor.name in self.gains:
                changed = values * torch.from_numpy(np.array(self.gains[factor.name])).to(values.device)
            gain = values**power if gain is None else gain * values**power
            new = changed**power if new is None else new * changed**power
        return (None, None) if gain is None or new is None else (gain, new)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the element to ``path`` as safetensors, with the spec's fingerprint, in one step."""
        metadata = {"format": FORMAT, "version": VERSION, "fingerprint": self.spec.fingerprint}
        if self.spec.stacks:
            metadata["modules"] = "yes"  # as in the file of a permutation
        write_atomically(path, safetensors.numpy.save(self.as_arrays(), metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], spec: PermutationSpec) -> Transformation:
        """Read an element of ``spec``'s group that `save` wrote.

        Raises MismatchError, naming the file, if it is none, or belongs to another spec.
        """
        where = os.fspath(path)
        try:
            content = FilePath(path).read_bytes()
            arrays = safetensors.numpy.load(content)
            with safetensors.safe_open(where, "np") as opened:
                metadata = opened.metadata() or {}
        except safetensors.SafetensorError as error:
            raise MismatchError(f"{where}: not a safetensors file: {error}") from None
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise MismatchError(f"{where}: not a transformation of version {VERSION}")
        if metadata.get("fingerprint") != spec.fingerprint:
            raise MismatchError(f"{where}: this transformation belongs to another spec than the one given")
        return cls.from_arrays(arrays, spec)

    def as_arrays(self) -> dict[str, Any]:
        """The element as arrays, each named by its kind and its group or gain."""
        arrays: dict[str, Any] = {f"permutation/{n}": np.array(a) for n, a in self.permutation.arrays.items()}
        for kind in ("matrices", "scales", "signs", "gains"):
            arrays |= {f"{kind}/{name}": np.ascontiguousarray(a) for name, a in getattr(self, kind).items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], spec: PermutationSpec) -> Transformation:
        """The element of which `as_arrays` gave the arrays.

        Raises MismatchError if they do not fit the spec.
        """
        parts: dict[str, dict[str, Any]] = {
            kind: {} for kind in ("permutation", "matrices", "scales", "signs", "gains")
        }
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            if kind not in parts:
                raise MismatchError(f"{key!r} is no part of a transformation")
            parts[kind][name] = array
        return cls(spec, Permutation(spec.permutations(), parts.pop("permutation")), **parts)


class Where:
    """The coordinates of one occurrence in a tensor, of its parents, and of what must hold for it to be there."""

    def __init__(self, spec: SpecData, layout: Layout, occurrence: Occurrence) -> None:
        self.ndim, self.dim = len(layout.axes), occurrence.dim
        self.size = spec.groups[occurrence.group].size
        axes, groups = layout.axes, spec.groups
        self.own = coordinates(axes[occurrence.dim], occurrence.path, groups)
        self.parents = [(o.dim, coordinates(axes[o.dim], o.path, groups)) for o in occurrence.parents]
        self.guards = [(d, coordinates(axes[d], (*path, part), groups) >= 0) for d, path, part in occurrence.guards]
        self.parent_sizes = tuple(groups[o.group].size for o in occurrence.parents)

    def _along(self, dim: int, vector: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return vector.reshape([-1 if at == dim else 1 for at in range(self.ndim)])

    def spread(self, factor: Array) -> Array:
        """A factor for each index, of shape ``(*parents' sizes, size)``, as one that broadcasts over the tensor."""
        index = [self._along(dim, np.maximum(c, 0)) for dim, c in self.parents]
        spread = factor[(*index, self._along(self.dim, np.maximum(self.own, 0)))]
        there = self._along(self.dim, self.own >= 0)
        for dim, mask in self.guards:
            there = there & self._along(dim, mask)
        return np.where(there, spread, 1.0)

    def multiply(
        self, tensor: torch.Tensor, matrices: Array, gain: torch.Tensor | None = None, after: torch.Tensor | None = None
    ) -> None:
        """Multiply a tensor, in place, along this occurrence by the matrix for each index of its parents.

        Before it, the tensor is divided by `gain`, and after it multiplied by `after`.
        """
        for at in np.ndindex(*self.parent_sizes):
            chosen = [np.ones(n, dtype=bool) for n in tensor.shape]
            chosen[self.dim] &= self.own >= 0
            for dim, mask in self.guards:
                chosen[dim] &= mask
            for (dim, coordinate), value in zip(self.parents, at, strict=True):
                chosen[dim] &= coordinate == value
            places = [np.flatnonzero(mask) for mask in chosen]
            if not all(len(place) for place in places):
                continue
            own = self.own[places[self.dim]]
            stride = self._stride()
            # Positions that differ in this coordinate alone stand in one row, in its order.
            rows = places[self.dim][np.lexsort((own, places[self.dim] - own * stride))].reshape(-1, self.size)
            places[self.dim] = rows.reshape(-1)
            index = torch.meshgrid(*(torch.from_numpy(p).to(tensor.device) for p in places), indexing="ij")
            block = tensor[index].movedim(self.dim, -1)
            block = block.reshape(*block.shape[:-1], -1, self.size)
            if gain is not None:
                block = block / gain
            block = block @ torch.from_numpy(np.array(matrices[at].T)).to(tensor.device)
            if after is not None:
                block = block * after
            tensor[index] = block.flatten(-2).movedim(-1, self.dim)

    def at_first_parents(self, matrix: Array) -> Array:
        """This matrix at the first index of each parent, and the identity at all others."""
        matrices = np.broadcast_to(np.eye(self.size), (*self.parent_sizes, self.size, self.size)).copy()
        matrices[tuple(0 for _ in self.parent_sizes)] = matrix
        return matrices

    def _stride(self) -> int:
        if self.size == 1:
            return 1
        return int((self.own == 1).argmax() - (self.own == 0).argmax())


def _sizes(spec: SpecData, name: str) -> tuple[int, ...]:
    group = spec.groups[name]
    return (*(spec.groups[parent].size for parent in group.parents), group.size)


def _shapes(spec: SpecData, name: str) -> dict[str, tuple[int, ...] | None]:
    """The shapes of what an element holds for a group; None for what it does not."""
    structure, sizes = spec.groups[name].structure, _sizes(spec, name)
    signs = structure.signs + structure.flips
    return {
        "matrices": (*sizes, sizes[-1]) if structure.linear else None,
        "scales": (*sizes, structure.scales) if structure.scales else None,
        "signs": (*sizes, signs) if signs else None,
    }


def _checked(spec: SpecData, name: str, kind: str, shape: tuple[int, ...], given: Any) -> Array:
    if given is None:
        rest = np.broadcast_to(np.eye(shape[-1]), shape) if kind == "matrices" else np.ones(shape)
        return np.array(rest)
    array = np.array(given, dtype=np.float64)
    structure = spec.groups[name].structure
    if array.shape != shape:
        raise MismatchError(f"group {name!r}: {kind} of shape {array.shape}, but {shape} is due")
    if not np.isfinite(array).all():
        raise MismatchError(f"group {name!r}: {kind} that are not finite")
    if kind == "matrices":
        fits = bool(np.all(is_member(structure.linear, array, 1e-6 if structure.linear != "GL" else WORST)))
    elif kind == "scales":
        fits = bool((array > 0).all())
    else:
        fits = bool((np.abs(array) == 1).all())
        common = array[..., structure.signs :]
        fits &= bool((common == common[..., :1, :]).all())
    if not fits:
        singular = f": singular, or with a condition number of {1 / WORST:.0e} or more" if kind == "matrices" else ""
        raise MismatchError(
            f"group {name!r} has the structure {structure}, to which these {kind} do not belong{singular}"
        )
    return array


def _checked_gain(spec: SpecData, name: str, given: Any) -> Array:
    if name not in spec.general_gains:
        raise MismatchError(f"{name!r} is no gain that the matrices of this spec act between")
    factors = np.array(given, dtype=np.float64).reshape(-1)
    size = max(spec.shapes[name])
    if factors.shape != (size,) or not np.isfinite(factors).all() or (factors == 0).any():
        raise MismatchError(f"the gain {name!r} takes {size} factors, finite and other than zero")
    return factors


def _carried(spec: SpecData, permutation: Permutation, element: Transformation) -> dict[str, dict[str, Array]]:
    """What an element holds, read at the indices to which a permutation that comes after it takes them."""
    found: dict[str, dict[str, Array]] = {}
    for kind in ("matrices", "scales", "signs"):
        found[kind] = {}
        for name, array in getattr(element, kind).items():
            old: list[IntArray] = old_parents(spec.groups, permutation.arrays, name)
            if kind == "matrices":
                found[kind][name] = array[tuple(old)] if old else array
            else:
                own = permutation.arrays[name]
                found[kind][name] = array[(*(index[..., None] for index in old), own)]
    return found
