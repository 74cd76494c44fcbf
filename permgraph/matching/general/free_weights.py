"""Free weights, from which permutations and signs are learned straight through a projection.

Permutations have no slope. So, as in straight-through matching (Ainsworth, Hayase & Srinivasa 2022, section 3.3), a
copy of A's weights takes the steps that the loss asks of the moved B, and now and then B is brought nearest to it
again. Steps are counted in units of each weight's own size, so that one rate serves for all, and for rotations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from permgraph.matching.general.acting import Acting, Element, Place, composed
from permgraph.matching.general.compact import best_element, signs_of

Tensors = Mapping[str, Tensor]


class FreeWeights:
    """Copies of A's parameters in which learned permutations stand.

    Learned are the permutations, with their signs, of groups that no other group is inside: where there is one, what
    two indices are worth to each other hangs on how the inner groups stand there, which the gradient says nothing of.

    Args:
        acting: how the groups act on the parameters.
        a: A's parameters.
        learned: whether there are to be any.
        frozen: groups that keep their permutations.

    Attributes:
        groups: those that are learned.
        weights: the copies, by parameter, divided by `sizes`.
        sizes: of each parameter of A the root of its mean square.
    """

    def __init__(self, acting: Acting, a: Tensors, learned: bool = True, frozen: Collection[str] = ()) -> None:
        self.acting = acting
        above = {parent for group in acting.of_group for parent in acting.spec.groups[group].parents}
        self.groups = [
            group
            for group in acting.of_group
            if learned and group not in above and group not in frozen and not acting.structure(group).linear
        ]
        self.weights: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor] = {}
        for name in acting.touched(self.groups):
            size = a[name].square().mean().sqrt()
            self.sizes[name] = torch.where(size > 0, size, torch.ones_like(size))
            self.weights[name] = (a[name] / self.sizes[name]).requires_grad_()

    def accept(self, gradients: Tensors, factor: float = 1.0) -> None:
        """Give the free weights the gradients, times a factor, by the moved B's."""
        for name, weight in self.weights.items():
            weight.grad = gradients[name] * (self.sizes[name] * factor) if name in gradients else None

    @torch.no_grad()
    def project(self, element: Element, moved: Tensors) -> Element:
        """An element with the permutations, group by group, that bring the moved B nearest to the free weights.

        Args:
            element: which has moved B.
            moved: B as it has been moved.

        Returns:
            A new element; `moved` is not changed.
        """
        b = {name: moved[name] for name in self.weights}
        for group in self.groups:
            structure, grams = self.acting.structure(group), self._grams(group, b)
            step = best_element(structure, grams).step(group)
            touched = [name for name in self.acting.touched([group]) if name in b]
            new = {name: self.acting.act(name, b[name], step) for name in touched}
            # Where a group meets itself in a weight, the best step by the slope may overshoot.
            if self._gain(b, new) > 0:
                b.update(new)
                element = composed(self.acting, step, element)
        return element

    def _gain(self, before: Tensors, after: Tensors) -> float:
        """How much nearer to the free weights parameters have come, as an inner product."""
        return sum(
            float(((new - before[name]) * self.weights[name]).sum() * self.sizes[name]) for name, new in after.items()
        )

    def _grams(self, group: str, b: Tensors) -> dict[tuple[int, ...], Tensor]:
        sums: dict[tuple[int, ...], Tensor] = {}
        for place in self.acting.of_group[group]:
            name = place.block.parameter
            gram = _rows(place, self.weights[name]).mT @ _rows(place, b[name]) * self.sizes[name]
            key = signs_of(place.action)
            sums[key] = sums[key] + gram if key in sums else gram
        return sums


def _rows(place: Place, tensor: Tensor) -> Tensor:
    return place.rows(place.block.view(tensor))
