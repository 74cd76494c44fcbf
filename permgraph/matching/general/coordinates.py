"""Coordinates in which elements are learned: Lie algebras of continuous groups, at the element that stands.

A step of learning needs the slope of the loss along each direction in which the group can move the weights that stand.
No exponential has to be differentiated for it: near the identity g moves a weight W by X W, so the slope along X is the
inner product of the weight's gradient with X W, a Gram matrix of gradient and weight. It costs one matrix product for
each axis, and so does moving the weights; then the coordinates begin at zero again, at the new element.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from permgraph.matching.general.acting import Acting, Element, Place
from permgraph.matching.general.polar import exactly_orthogonal, exactly_paired, of_pairs
from permgraph.structures.pairs import pairs_of

Tensors = Mapping[str, Tensor]


class Coordinates:
    """Coordinates of the continuous part of a group near an element that moves along.

    They are skew matrices for rotations, such that also leave the vector of ones alone where the group does, any
    matrices for invertible maps, logarithms and angles for rotary pairs, and logarithms of scales.

    Args:
        acting: how the groups act on the parameters.
        element: where to begin; what it lacks is at rest.
        frozen: groups that keep their continuous part.
        device, dtype: of all tensors here.

    Attributes:
        element: where the coordinates have brought it.
        leaves: for each group its coordinates: zero, but between a step of the optimizer and `advance`.
        inverses: inverse transposes of the matrices that are no rotations.
    """

    def __init__(
        self,
        acting: Acting,
        element: Element,
        *,
        frozen: Collection[str] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.acting = acting
        self.leaves: dict[str, Tensor] = {}
        self.inverses: dict[str, Tensor] = {}
        self.element = Element(
            {name: array.to(device) for name, array in element.arrays.items()},
            *(
                {name: tensor.to(device, dtype) for name, tensor in kind.items()}
                for kind in (element.matrices, element.scales, element.signs)
            ),
        )
        for group in acting.of_group:
            structure, size = acting.structure(group), acting.spec.groups[group].size
            shape = (*acting.parents(group), size)
            if structure.linear:
                eye = torch.eye(size, dtype=dtype, device=device).expand(*shape, size)
                self.element.matrices.setdefault(group, eye.clone())
                coordinates = (*shape[:-1], size // 2, 2) if structure.is_paired else (*shape, size)
            elif structure.scales:
                self.element.scales.setdefault(group, torch.ones(*shape, structure.scales, dtype=dtype, device=device))
                coordinates = (*shape, structure.scales)
            else:
                continue
            if group not in frozen:
                self.leaves[group] = torch.zeros(coordinates, dtype=dtype, device=device, requires_grad=True)
        for group in self.element.matrices:
            self._invert(group)

    # --- slopes -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pull_back(self, weights: Tensors, gradients: Tensors, factor: float = 1.0) -> None:
        """Leave with each group's coordinates the slope of the loss along them.

        Args:
            weights: the parameters as the element has moved them.
            gradients: the loss's gradients by these; a parameter without one has no influence.
            factor: what all slopes are multiplied with.
        """
        for group, leaf in self.leaves.items():
            slope = torch.zeros_like(leaf)
            for place in self.acting.of_group[group]:
                name = place.block.parameter
                if name in gradients and place.action.powers:
                    self._add_slope(slope, group, place, weights[name], gradients[name])
            leaf.grad = self._tangent(group, slope).mul_(factor)

    def _add_slope(self, slope: Tensor, group: str, place: Place, weight: Tensor, gradient: Tensor) -> None:
        linear, powers = self.acting.structure(group).linear, place.action.powers
        w, g = (place.rows(place.block.view(tensor)) for tensor in (weight, gradient))
        if not linear:
            slope += (w * g).sum(-2)[..., None] * slope.new_tensor(powers)
        elif self.acting.structure(group).is_paired:
            first, second = pairs_of(linear, w.shape[-1])
            along = (g * w).sum(-2)
            slope[..., 0] += (along[..., first] + along[..., second]) * powers[0]
            if linear in ("T", "T2"):
                slope[..., 1] += (g[..., second] * w[..., first] - g[..., first] * w[..., second]).sum(-2)
        elif powers == (1,):
            slope += g.mT @ w
        else:
            slope -= w.mT @ g

    def _tangent(self, group: str, matrices: Tensor) -> Tensor:
        """The part of coordinates that lies in the group's Lie algebra."""
        linear = self.acting.structure(group).linear
        if linear == "O1":
            matrices = matrices - matrices.mean(-1, keepdim=True)
            matrices = matrices - matrices.mean(-2, keepdim=True)
        return (matrices - matrices.mT) / 2 if linear in ("O", "O1") else matrices

    # --- steps --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self) -> None:
        """Move the element to where the coordinates are, which then begin at zero there.

        Rotations move by Cayley's transform, invertible maps by the exponential to second order, all others by the
        exponential itself.
        """
        for group, leaf in self.leaves.items():
            linear = self.acting.structure(group).linear
            if not linear:
                self.element.scales[group] = self.element.scales[group] * leaf.exp()
            else:
                old = self.element.matrices[group]
                x = self._tangent(group, leaf)
                if self.acting.structure(group).is_paired:
                    new = _turns(linear, x, old)
                elif linear == "GL":
                    step = torch.matmul(x, old)
                    new = old + step + torch.matmul(x, step) / 2
                else:
                    half = x / 2
                    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
                    new = torch.linalg.solve(eye - half, old + half @ old)
                self.element.matrices[group] = new
                self._invert(group)
            leaf.zero_()

    def _invert(self, group: str) -> None:
        self.inverses.update(self.acting.inverse_transposes({group: self.element.matrices[group]}))

    @torch.no_grad()
    def settle(self) -> None:
        """Take rounding out of the element: the nearest rotations, and the inverses of what stands."""
        for group, matrix in self.element.matrices.items():
            linear = self.acting.structure(group).linear
            if linear in ("O", "O1"):
                self.element.matrices[group] = exactly_orthogonal(linear, matrix).to(matrix.dtype)
            self._invert(group)

    def exact(self) -> Element:
        """The element in float64, its rotations orthogonal to rounding there."""
        matrices = {}
        for group, matrix in self.element.matrices.items():
            linear = self.acting.structure(group).linear
            rotation = linear in ("O", "O1")
            matrices[group] = exactly_orthogonal(linear, matrix) if rotation else exactly_paired(linear, matrix)
        return Element(
            dict(self.element.arrays),
            matrices,
            {name: scale.double() for name, scale in self.element.scales.items()},
            {name: sign.double().sign() for name, sign in self.element.signs.items()},
        )


def _turns(linear: str, coordinates: Tensor, old: Tensor) -> Tensor:
    """Matrices of pairs after a step: each pair multiplied by the exponential of a logarithm and an angle."""
    eye = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device).expand_as(old)
    size, angle = coordinates[..., 0].exp(), coordinates[..., 1]
    return torch.matmul(of_pairs(linear, size * angle.cos(), size * angle.sin(), eye), old)
