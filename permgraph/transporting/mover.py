"""`Mover`: how an element of a spec's group acts on what belongs to a parameter and is not its value."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from permgraph.errors import MismatchError, SpecError
from permgraph.spec.elements import AnyElement
from permgraph.spec.expressions import Axis, Fixed
from permgraph.spec.general import Action
from permgraph.spec.transformation import Transformation
from permgraph.structures import Structure

Kind = Literal["weights", "difference", "gradient", "squares", "magnitude", "mask"]
"""What a tensor of a parameter's shape is: its value, a difference of two values, a gradient or a mean of some, squares
of gradients, their magnitudes, or which elements count."""

PERMUTE = "align over permutations alone, with spec.permutations()"


@dataclass(frozen=True)
class Mover:
    """An element, and the weights that it is to be applied to, as far as they are needed.

    Args:
        element: the permutation, or the transformation.
        base: the network's weights before it, by the spec's names: the gains between which matrices act are read there.
    """

    element: AnyElement
    base: Mapping[str, Any] | None = None

    def source(self, name: str) -> tuple[str, Mover]:
        """Whose tensors come to belong to a parameter, by the canonical name, and what they are moved by on the way.

        That is the parameter itself, unless its module changes places with others.
        """
        element = self.element
        name = element.spec.aliases.get(name, name)
        if name not in element.spec.in_stack:
            return element.spec.canonical(name), self
        if name not in self._sources:
            source, within, _ = element.member(name)
            self._sources[name] = source, Mover(within, self.base)
        return self._sources[name]

    @functools.cached_property
    def _sources(self) -> dict[str, tuple[str, Mover]]:
        return {}

    def parameter(self, name: str, tensor: Tensor, kind: Kind, own: Mapping[str, Any] | None = None) -> Tensor:
        """A new tensor: what belongs to a parameter and has its shape, after the element.

        Args:
            name: of the parameter.
            tensor: the tensor.
            kind: what it is.
            own: the others of its kind, by the spec's names.

        Raises:
            MismatchError: the shape is not the parameter's; or over general symmetries this kind does not go along.
        """
        element, name = self.element, self.element.spec.canonical(name)
        if not isinstance(element, Transformation):
            return element.apply_to(name, tensor)
        element.spec.check_entry(name, tensor)
        if kind == "weights":
            return element.apply_to(name, tensor, self._weights(own or {}))
        if kind == "difference":
            return self._difference(element, name, tensor, own or {})
        if kind == "mask":
            self._refuse_matrices(name, "mix the weights that a mask keeps with those that it does not")
            return element.permutation.apply_to(name, tensor)
        self._refuse_gains(name)
        if kind != "gradient":
            self._refuse_matrices(name, f"mix the gradients of which these are the {kind}")
        return self._dual(kind).apply_to(name, tensor, {})

    def mean_squares(self, name: str, tensor: Tensor, over: int, what: str) -> Tensor:
        """A new tensor: means of a gradient's squares over one dimension, moved along the parameter's others.

        A mean is the same in whatever order its terms stand, so that what is left moves by the axes that are left.

        Args:
            name: of the parameter.
            tensor: of its shape without that dimension, or with 1 in its place.
            over: the dimension that the means are over.
            what: what to call the tensor in errors.

        Raises:
            MismatchError: the shape is another; what moves a dimension that is left depends on the one that is not; or
                scales or matrices act, which change single elements before the means are taken.
        """
        spec = self.element.spec
        name = spec.canonical(name)
        shape, axes = spec.shapes[name], list(spec.axes[name])
        if tuple(tensor.shape) == (*shape[:over], *shape[over + 1 :]):
            del axes[over]
        elif tuple(tensor.shape) == (*shape[:over], 1, *shape[over + 1 :]):
            axes[over] = axes[over] if shape[over] == 1 else Fixed(1)
        else:
            raise MismatchError(
                f"{what} has shape {tuple(tensor.shape)}, but means over dimension {over} are due, of a parameter of "
                f"shape {shape}"
            )
        try:
            spec.layout(tuple(axes), what)
        except SpecError as error:
            raise MismatchError(
                f"{what}: what acts on the dimensions that are left depends on dimension {over}, over which these are "
                f"means ({error}), so that they do not go along: begin the optimizer anew"
            ) from None
        element = self.element
        if not isinstance(element, Transformation):
            return element.apply_axes(tuple(axes), tensor)
        self._refuse_gains(name)
        self._refuse_matrices(name, "mix the gradients of whose squares these are means")
        for group, structure, _ in self._acting(name):
            if structure.scales:
                raise MismatchError(
                    f"{what}: {structure} acts on {name!r} by the group {group!r}, and scales the gradients before the "
                    f"means of their squares are taken: {PERMUTE}"
                )
        return element.permutation.apply_axes(tuple(axes), tensor)

    def along(self, name: str, dim: int, tensor: Tensor, at: int, what: str) -> Tensor:
        """A new tensor: one whose dimension ``at`` is an axis of a parameter's, moved along it as the parameter is.

        Args:
            name, dim: the parameter, and which of its dimensions.
            tensor, at: the tensor, and which of its dimensions.
            what: what to call the tensor in errors.

        Raises MismatchError if the sizes differ, or the axis is moved in other ways at each index of another one.
        """
        spec = self.element.spec
        if name in spec.in_stack:
            stack, _ = spec.in_stack[name]
            raise MismatchError(
                f"{what}: the module of {name!r} changes places with others of {stack!r}: a tensor along its dimension "
                f"{dim} goes with that module, not with its name; move one such tensor for each of the modules, with "
                "their group as its first axis, as text"
            )
        name = spec.canonical(name)
        size = spec.shapes[name][dim]
        if not at < tensor.ndim or tensor.shape[at] != size:
            raise MismatchError(
                f"{what} has shape {tuple(tensor.shape)}, but {size} is due in dimension {at}, the size of {name!r} in "
                f"dimension {dim}"
            )
        axes = tuple(spec.axes[name][dim] if d == at else Fixed(n) for d, n in enumerate(tensor.shape))
        try:
            spec.layout(axes, what)
        except SpecError as error:
            raise MismatchError(
                f"{what}: what acts on dimension {dim} of {name!r} depends on its other dimensions ({error}), so that "
                "it cannot act on a tensor with that one alone"
            ) from None
        element = self.element
        if not isinstance(element, Transformation):
            return element.apply_axes(axes, tensor)
        actions = self._actions_along(name, dim)
        if any(action.gains for action in actions):
            return self._as_rows(element, name, dim, tensor, at)
        return element.apply_axes(axes, tensor, actions)

    def axes(self, axes: Sequence[Axis], tensor: Tensor, what: str) -> Tensor:
        """A new tensor: one whose dimensions are these axes; what a matrix acts on is read or written as a stream is.

        Raises MismatchError if the sizes differ, or it is not known in which of several ways a group acts.
        """
        element, axes = self.element, tuple(axes)
        try:
            if not isinstance(element, Transformation):
                return element.apply_axes(axes, tensor)
            actions = []
            for occurrence in element.spec.layout(axes, what).occurrences:
                structure = element.spec.groups[occurrence.group].structure
                if not structure.is_plain and structure.linear not in ("O", "O1"):
                    raise MismatchError(
                        f"{what}: {structure} acts by the group {occurrence.group!r}, in one way on what is written "
                        "and in another on what reads it: name a parameter and its dimension in place of the group"
                    )
                actions.append(Action((1,)) if structure.linear else Action())
            return element.apply_axes(axes, tensor, actions)
        except SpecError as error:
            raise MismatchError(f"{what}: {error}") from None

    def has_structure(self, name: str) -> bool:
        """Whether more than a permutation acts on a parameter."""
        return bool(self._acting(self.element.spec.canonical(name)))

    def refuse_structure(self, name: str, what: str) -> None:
        """Raise MismatchError if more than a permutation acts on a parameter, to which something belongs."""
        for group, structure, _ in self._acting(self.element.spec.canonical(name)):
            raise MismatchError(
                f"{what} goes along with permutations, but {structure} acts on {name!r} by the group {group!r}: "
                f"{PERMUTE}"
            )

    # --- over general symmetries --------------------------------------------------------------------------------------

    def _acting(self, name: str) -> list[tuple[str, Structure, Action]]:
        """What acts on a parameter and changes it, beyond permutations: the group, its structure, and how it acts."""
        element = self.element
        if not isinstance(element, Transformation) or element.spec.general is None:
            return []
        groups, actions = element.spec.groups, element.spec.general.actions.get(name, ())
        return [
            (occurrence.group, groups[occurrence.group].structure, action)
            for occurrence, action in zip(element.spec.occurrences(name) if actions else (), actions, strict=True)
            if action != Action() and (self._moved.get(occurrence.group) or self._changes(action))
        ]

    def _changes(self, action: Action) -> bool:
        assert isinstance(self.element, Transformation)
        return any(gain.name in self.element.gains for gain, _ in action.gains)

    @functools.cached_property
    def _moved(self) -> Mapping[str, int]:
        return self.element.moved()

    @functools.cached_property
    def _gains(self) -> frozenset[str]:
        """The gains that are changed, or between which a matrix acts."""
        assert isinstance(self.element, Transformation) and self.element.spec.general is not None
        acting = (each for name in self.element.spec.general.actions for each in self._acting(name))
        return frozenset(self.element.gains) | {gain.name for _, _, action in acting for gain, _ in action.gains}

    def _refuse_gains(self, name: str) -> None:
        if name in self._gains or any(action.gains for _, _, action in self._acting(name)):
            raise MismatchError(
                f"the gradient of {name!r} depends on gains between which matrices act, and does not go along by "
                f"itself: {PERMUTE}, or begin the optimizer anew"
            )

    def _refuse_matrices(self, name: str, why: str) -> None:
        for group, structure, _ in self._acting(name):
            if structure.linear:
                raise MismatchError(
                    f"{structure} acts on {name!r} by the group {group!r}, and matrices {why}: {PERMUTE}"
                )

    def _actions_along(self, name: str, dim: int) -> list[Action]:
        spec = self.element.spec
        standing = spec.occurrences(name)
        actions = spec.general.actions.get(name) if spec.general is not None else None
        actions = actions or (Action(),) * len(standing)
        return [action for occurrence, action in zip(standing, actions, strict=True) if occurrence.dim == dim]

    def _weights(self, own: Mapping[str, Any]) -> Mapping[str, Any]:
        return _Gains({**(self.base or {}), **own})

    def _difference(self, element: Transformation, name: str, tensor: Tensor, own: Mapping[str, Any]) -> Tensor:
        """T(base + difference) - T(base), which is linear in the difference but where gains differ."""
        if name not in element.gains and not any(action.gains for _, _, action in self._acting(name)):
            return element.apply_to(name, tensor, {})
        before = self._weights({})
        after = _Gains(before)
        for each in (name, *element.gains_of(name)):
            after[each] = before[each].double() + (own[each].double() if each in own else 0)
        after[name] = before[name].double() + tensor.double()
        moved = element.apply_to(name, after[name], after) - element.apply_to(name, before[name].double(), before)
        return moved.to(tensor.dtype)

    def _dual(self, kind: Kind) -> Transformation:
        """What acts on gradients, on their squares or on their magnitudes, where no gains are involved."""
        return self._duals[kind]

    @functools.cached_property
    def _duals(self) -> Mapping[str, Transformation]:
        element = self.element
        assert isinstance(element, Transformation)

        def with_powers(power: int, **more: Any) -> Transformation:
            scales = {name: array**power for name, array in element.scales.items()}
            return Transformation(
                element.spec, element.permutation, more.get("matrices", {}), scales, more.get("signs", {})
            )

        matrices = {name: np.swapaxes(np.linalg.inv(m), -1, -2) for name, m in element.matrices.items()}
        return {
            "gradient": with_powers(-1, matrices=matrices, signs=element.signs),
            "squares": with_powers(-2),
            "magnitude": with_powers(-1),
        }

    def _as_rows(self, element: Transformation, name: str, dim: int, tensor: Tensor, at: int) -> Tensor:
        """A tensor moved along a parameter's axis as rows of that parameter, on whose other axes nothing acts then."""
        shape = element.spec.shapes[name]
        rows = tensor.detach().movedim(at, -1)
        lengths, rows = rows.shape, rows.reshape(-1, shape[dim])
        held = math.prod(shape) // shape[dim]
        others = [size for d, size in enumerate(shape) if d != dim]
        moved = []
        for start in range(0, len(rows), held):
            part = rows[start : start + held]
            block = part.new_zeros(held, shape[dim])
            block[: len(part)] = part
            block = block.reshape(*others, shape[dim]).movedim(-1, dim)
            new = element.apply_to(name, block, self._weights({}), exclude=[d for d in range(len(shape)) if d != dim])
            moved.append(new.movedim(dim, -1).reshape(held, shape[dim])[: len(part)])
        return torch.cat(moved).reshape(lengths).movedim(-1, at).contiguous()


class _Gains(dict[str, Any]):
    """Weights in which gains are looked for."""

    def __missing__(self, name: str) -> NoReturn:
        raise MismatchError(
            f"matrices act between gains such as {name!r}, whose values are needed: give base=, the weights of the "
            "network before it was moved"
        )
