"""How elements given as torch tensors act on parameters, block by block, in a way that can be differentiated.

`Transformation` acts on whole state dicts, exactly and in float64. Matching and learning act thousands of times on a
few parameters, and with factors that carry gradients: here each parameter is seen as its blocks
(`permgraph.spec.blocks`), in which every axis is one group, so that an element acts along an axis by one gather,
product or multiplication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from permgraph.matching.general.polar import exactly_orthogonal, exactly_paired
from permgraph.spec.blocks import Block, Leaf, blocks_of
from permgraph.spec.expressions import Fixed
from permgraph.spec.general import Action
from permgraph.spec.permutation import Permutation, old_parents
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.structures import Structure

Tensors = Mapping[str, Tensor]


@dataclass
class Element:
    """An element of the group of a general spec, as tensors; what is left out is at rest.

    As of a `Transformation`, all is read at the new indices of the parents, and the permutation comes first.

    Attributes:
        arrays: for a group a permutation at each index of its parents: integers (*parents' sizes, size).
        matrices: for a group of matrices one at each index of its parents: (*parents' sizes, size, size).
        scales, signs: factors (*parents' sizes, size, number of factors).
    """

    arrays: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    signs: dict[str, Tensor] = field(default_factory=dict)

    def groups(self) -> set[str]:
        """The groups that are not known to be at rest."""
        return {name for kind in (self.arrays, self.matrices, self.scales, self.signs) for name in kind}

    def to(self, dtype: torch.dtype) -> Element:
        """The same with matrices and factors of another type."""
        kinds = (self.matrices, self.scales, self.signs)
        return Element(self.arrays, *({name: tensor.to(dtype) for name, tensor in kind.items()} for kind in kinds))

    def transformation(self, spec: PermutationSpec) -> Transformation:
        """The same as a `Transformation`, in float64; those in another precision as the nearest that are exact."""
        permutations = spec.permutations()
        matrices = {}
        for name, matrix in self.matrices.items():
            linear, matrix = spec.groups[name].structure.linear, matrix.detach().cpu()
            if matrix.dtype != torch.float64:
                nearest = exactly_orthogonal if linear in ("O", "O1") else exactly_paired
                matrix = nearest(linear, matrix)
            matrices[name] = matrix.double()
        return Transformation(
            spec,
            Permutation(permutations, {name: array.cpu().numpy() for name, array in self.arrays.items()}),
            *(
                {name: tensor.detach().cpu().double().numpy() for name, tensor in kind.items()}
                for kind in (matrices, self.scales, self.signs)
            ),
        )

    @classmethod
    def of(cls, transformation: Transformation, device: torch.device | str, dtype: torch.dtype) -> Element:
        """A `Transformation` as tensors, without what it does to gains."""

        def tensors(kind: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(np.array(array)).to(device, dtype) for name, array in kind.items()}

        linear = {n for n, group in transformation.spec.groups.items() if group.structure.linear}
        arrays = transformation.permutation.arrays
        return cls(
            {n: torch.from_numpy(np.array(array)).to(device) for n, array in arrays.items() if n not in linear},
            tensors(transformation.matrices),
            tensors(transformation.scales),
            tensors(transformation.signs),
        )


@dataclass(frozen=True)
class Place:
    """One axis of one block on which a group acts.

    Attributes:
        block: the block.
        axis: the axis.
        action: how the group's structure acts there.
    """

    block: Block
    axis: int
    action: Action

    @property
    def leaf(self) -> Leaf:
        """What stands along the axis."""
        return self.block.leaves[self.axis]

    def rows(self, view: Tensor) -> Tensor:
        """A block as (*parents' sizes, everything else, size)."""
        k = len(self.leaf.parents)
        front = view.movedim((*self.leaf.parents, self.axis), (*range(k), -1))
        return front.reshape(*front.shape[:k], -1, front.shape[-1])

    def unrowed(self, rows: Tensor, view: Tensor) -> Tensor:
        """What `rows` made, in the order of `view`."""
        k = len(self.leaf.parents)
        like = view.movedim((*self.leaf.parents, self.axis), (*range(k), -1))
        return rows.reshape(like.shape).movedim((*range(k), -1), (*self.leaf.parents, self.axis))

    def spread(self, factors: Tensor, ndim: int) -> Tensor:
        """(*parents' sizes, size) as a tensor that broadcasts over the block, of as many dimensions."""
        axes = (*self.leaf.parents, self.axis)
        order = sorted(range(len(axes)), key=lambda at: axes[at])
        shape = [1] * ndim
        for at in axes:
            shape[at] = self.block.leaves[at].size
        return factors.permute(order).reshape(shape)


class Acting:
    """The blocks of some parameters of a general spec, and how its groups act along their axes.

    Args:
        spec: a spec with general symmetries.
        tensors: the parameters by canonical name; one whose tensor has one dimension more than the spec says, of real
            and imaginary parts, is seen as such.
    """

    def __init__(self, spec: PermutationSpec, tensors: Tensors) -> None:
        assert spec.general is not None
        self.spec = spec
        self.plain = _plain(spec, tensors)
        self.places: dict[str, tuple[Place, ...]] = {}
        self.blocks: dict[str, tuple[Block, ...]] = {}
        for name in tensors:
            self.blocks[name] = blocks_of(self.plain, name)
            actions = spec.general.actions.get(name)
            self.places[name] = tuple(
                Place(block, axis, actions[leaf.occurrence] if actions else Action())
                for block in self.blocks[name]
                for axis, leaf in enumerate(block.leaves)
                if leaf.group in spec.acting
            )
        self.of_group: dict[str, list[Place]] = {}
        for places in self.places.values():
            for place in places:
                assert place.leaf.group is not None
                self.of_group.setdefault(place.leaf.group, []).append(place)

    def action(self, block: Block, axis: int) -> Action:
        """How the group that stands at an axis of a block acts there."""
        actions = self.spec.general.actions.get(block.parameter) if self.spec.general is not None else None
        return actions[block.leaves[axis].occurrence] if actions else Action()

    def structure(self, group: str) -> Structure:
        """The structure of a group."""
        return self.spec.groups[group].structure

    def parents(self, group: str) -> tuple[int, ...]:
        """The sizes of a group's parents."""
        return tuple(self.spec.groups[parent].size for parent in self.spec.groups[group].parents)

    def touched(self, groups: Iterable[str]) -> list[str]:
        """The parameters in which any of these groups stands."""
        return list(dict.fromkeys(p.block.parameter for g in groups for p in self.of_group.get(g, ())))

    def inverse_transposes(self, matrices: Tensors) -> dict[str, Tensor]:
        """The inverse transposes of groups' matrices, where one acts so; of rotations the matrices themselves."""
        found = {}
        for group, matrix in matrices.items():
            if self.structure(group).linear in ("O", "O1"):
                found[group] = matrix
            elif any(place.action.powers == (-1,) for place in self.of_group.get(group, ())):
                found[group] = torch.linalg.inv(matrix).mT
        return found

    # --- acting -------------------------------------------------------------------------------------------------------

    def act(self, name: str, tensor: Tensor, element: Element, inverses: Mapping[str, Tensor] | None = None) -> Tensor:
        """A parameter, without gains (see `folded`), under an element; a new tensor, with the gradients of both.

        Args:
            name: the parameter.
            tensor: its value.
            element: what acts.
            inverses: for groups of matrices the inverse transposes, where they are at hand.
        """
        moving = element.groups()
        concerned = [place for place in self.places[name] if place.leaf.group in moving]
        if not concerned:
            return tensor
        done: list[tuple[Block, Tensor]] = []
        for block in dict.fromkeys(place.block for place in concerned):
            view = block.view(tensor)
            for place in concerned:
                if place.block is block and place.leaf.group in element.arrays:
                    view = _gathered(view, place, element.arrays[place.leaf.group])
            for place in concerned:
                if place.block is block:
                    view = self._acted(view, place, element, inverses or {})
            done.append((block, view))
        if len(self.blocks[name]) == 1:
            return done[0][1].reshape(tensor.shape)
        new = tensor.clone(memory_format=torch.contiguous_format)
        for block, view in done:
            block.view(new).copy_(view)
        return new

    def _acted(self, view: Tensor, place: Place, element: Element, inverses: Mapping[str, Tensor]) -> Tensor:
        group, action = place.leaf.group, place.action
        assert group is not None
        if group in element.matrices and action.powers:
            matrix = element.matrices[group]
            if action.powers == (-1,):
                matrix = inverses[group] if group in inverses else torch.linalg.inv(matrix).mT
            return place.unrowed(place.rows(view) @ matrix.mT, view)
        for factors, exponents in ((element.scales, action.powers), (element.signs, action.signs)):
            if group in factors and any(exponents):
                view = view * place.spread(powered(factors[group], exponents), view.ndim)
        return view

    # --- gains --------------------------------------------------------------------------------------------------------

    def folded(self, name: str, tensor: Tensor, state: Tensors) -> Tensor:
        """A parameter as matrices act on it plainly: divided by the gains between which they act; a new tensor.

        Raises:
            MismatchError: a gain has a zero, which cannot be undone.
        """
        return self._with_gains(name, tensor, state, -1)

    def unfolded(self, name: str, tensor: Tensor, state: Tensors) -> Tensor:
        """What `folded` undoes: the parameter with the gains of this state."""
        return self._with_gains(name, tensor, state, 1)

    def _with_gains(self, name: str, tensor: Tensor, state: Tensors, sign: int) -> Tensor:
        new = tensor
        for place in self.places[name]:
            if place.action.gains:
                if new is tensor:
                    new = tensor.clone(memory_format=torch.contiguous_format)
                gain = product_of_gains(place.action, state).to(tensor.device, tensor.dtype)
                shape = [1] * len(place.block.leaves)
                shape[place.axis] = place.leaf.size
                place.block.view(new).mul_((gain**sign).reshape(shape))
        return new


def product_of_gains(action: Action, state: Tensors) -> Tensor:
    """The diagonal of D in D g D⁻¹, in float64.

    Raises:
        MismatchError: a gain has a zero.
    """
    product = torch.ones((), dtype=torch.float64)
    for gain, power in action.gains:
        product = product * gain.values(state[gain.name]).cpu() ** power
    return product


def powered(factors: Tensor, exponents: tuple[int, ...]) -> Tensor:
    """The product of factors (..., number) to these powers: (...)."""
    out = None
    for at, exponent in enumerate(exponents):
        if exponent:
            one = factors[..., at] if exponent == 1 else factors[..., at] ** exponent
            out = one if out is None else out * one
    assert out is not None
    return out


def _gathered(view: Tensor, place: Place, array: Tensor) -> Tensor:
    if array.ndim == 1:
        return view.index_select(place.axis, array)
    return torch.take_along_dim(view, place.spread(array, view.ndim), place.axis)


def _plain(spec: PermutationSpec, tensors: Tensors) -> PermutationSpec:
    """The same axes, of the given parameters, where all that acts counts as moving."""
    groups = {
        name: type(group)(name, group.size, group.parents, group.fixed and name not in spec.acting)
        for name, group in spec.groups.items()
    }
    axes = {
        name: (*spec.axes[name], *([Fixed(2)] if tensor.ndim > len(spec.shapes[name]) else []))
        for name, tensor in tensors.items()
    }
    return PermutationSpec(groups, axes)


def composed(acting: Acting, after: Element, before: Element) -> Element:
    """The element that acts as `before` and then as `after`."""
    carried, moved = Element(), {name: array.cpu().numpy() for name, array in after.arrays.items()}
    for kind in ("arrays", "matrices", "scales", "signs"):
        for group, tensor in getattr(before, kind).items():
            getattr(carried, kind)[group] = _carried(acting, group, tensor, moved, own=kind != "matrices")
    out = Element(dict(carried.arrays))
    for group, array in after.arrays.items():
        out.arrays.setdefault(group, array)
    for kind in ("matrices", "scales", "signs"):
        first, second = getattr(carried, kind), getattr(after, kind)
        merged = {**first, **second}
        for group in first.keys() & second.keys():
            merged[group] = second[group] @ first[group] if kind == "matrices" else second[group] * first[group]
        setattr(out, kind, merged)
    return out


def _carried(acting: Acting, group: str, tensor: Tensor, after: Mapping[str, np.ndarray], *, own: bool) -> Tensor:
    """What stands at each index of a group's parents, and at each of its own, read where `after` takes them from."""
    mine = after.get(group) if own else None
    if mine is None and not any(parent in after for parent in acting.spec.groups[group].parents):
        return tensor
    index = old_parents(acting.spec.groups, after, group)
    if mine is not None:
        index = [*(at[..., None] for at in index), mine]
    return tensor[tuple(torch.from_numpy(np.array(at)).to(tensor.device) for at in index)]
