"""The line from A to a moved B, in a gauge in which the group acts linearly: gradients reach every direction.

Where gains are taken up and both models balanced, the group acts on the weights by plain products. The networks between
A and g·B compute there what they compute in A's own gauge, since what brings the one to the other is linear too, and a
symmetry. It follows as well that to move A by h and B by g is to move B alone by h⁻¹ g: nothing is to be gained by
learning at both ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError
from permgraph.matching.general.acting import Element
from permgraph.matching.general.gauge import Gauge
from permgraph.matching.general.weights import as_transformation
from permgraph.networks.batches import Loader, Loss, undisturbed
from permgraph.networks.blended import Between
from permgraph.spec.general import General
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import StateDict, is_continuous


class BalancedLine:
    """A scratch network that stands between A and a moved B, both without gains and balanced.

    Args:
        model: A's module, of which a copy is run.
        a, b: state dicts that fit the spec.
        spec: one with general symmetries, or with permutations alone.
        loss: of an output and targets.
        device: where to run; the module's own by default.

    Attributes:
        spec: the spec as one with general symmetries.
        gauge: how the models were brought to where they are.
        between: the scratch network, and all that does not move.
        targets: for each parameter and buffer on which the group acts the network's own tensor; gradients are left
            there, save with the statistics of batch normalisation.
        a, b: their values in the models, at least in float32.

    Raises:
        MismatchError: a gain has a zero, or cannot be taken up, or a tensor has no values.
        NonFiniteError: a tensor holds NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        a: StateDict,
        b: StateDict,
        spec: PermutationSpec,
        loss: Loss,
        device: torch.device | None = None,
    ) -> None:
        self.given = spec
        self.spec = spec if spec.general is not None else replace(spec, general=General({}))
        if self.spec.gains_that_stay:
            raise MismatchError(
                f"{', '.join(sorted(self.spec.gains_that_stay)[:3])}: matrices act between gains that more reads than "
                "what could take them up, so that no line joins the models without them; match by weights, or take "
                "spec.permutations()"
            )
        integers = [name for name, tensor in a.items() if isinstance(tensor, Tensor) and not is_continuous(tensor)]
        self.gauge = Gauge(self.spec, a, b, ignore=integers)
        self.acting = self.gauge.acting
        ours, theirs = (self._state(state, own) for state, own in ((a, self.gauge.a), (b, self.gauge.b)))
        self.between = Between(model, ours, theirs, self.spec, loss, device)
        self.device = self.between.device
        own = self._own_tensors()
        self.dtype = torch.promote_types(
            torch.float32, max((own[n].dtype for n in self.gauge.a), key=lambda d: d.itemsize, default=torch.float32)
        )
        if self.dtype.is_complex:
            self.dtype = torch.float64 if self.dtype == torch.complex128 else torch.float32
        self.a, self.b = (
            {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
            for tensors in (self.gauge.a, self.gauge.b)
        )
        self.targets = {name: own[name] for name in self.a}
        statistics = {id(b) for m in self.between.model.modules() if _normalises(m) for b in m.buffers(recurse=False)}
        self.learned = [name for name, tensor in self.targets.items() if id(tensor) not in statistics]
        for name in self.learned:
            self.targets[name].requires_grad_()

    def _own_tensors(self) -> dict[str, Tensor]:
        model = self.between.model
        pairs = itertools.chain(
            model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        )
        return {self.spec.aliases.get(name, name): tensor for name, tensor in pairs}

    def _state(self, state: StateDict, balanced: Mapping[str, Tensor]) -> dict[str, Any]:
        """A whole state dict in the gauge."""
        new: dict[str, Any] = {}
        for key, value in state.items():
            name = self.spec.aliases.get(key, key)
            if name in balanced:
                tensor = balanced[name]
                value = torch.view_as_complex(tensor.contiguous()) if tensor.ndim > value.ndim else tensor
            elif name in self.spec.general_gains:
                value = torch.full_like(value, 1 - self.spec.general_gains[name].added)
            new[key] = value
        return new

    # --- elements -----------------------------------------------------------------------------------------------------

    def element(self, found: Permutation | Transformation) -> Element:
        """An element for B's state dict as one for B in this gauge, its scales and invertible maps included."""
        if isinstance(found, Permutation):
            found = as_transformation(Permutation(self.spec.permutations(), found.arrays), self.spec)
        into, out = self.gauge.of_b.transformation(self.spec), self.gauge.of_a.transformation(self.spec)
        return Element.of(out @ found @ into.inverse(), "cpu", torch.float64)

    def found(self, element: Element) -> Permutation | Transformation:
        """The other way: what brings B's state dict to A's, of the spec that was given."""
        transformation = self.gauge.transformation(element)
        if self.given.general is not None:
            return transformation
        return Permutation(self.given, transformation.permutation.arrays)

    def moved(self, element: Element, inverses: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """B's parameters under an element."""
        with torch.no_grad():
            return {name: self.acting.act(name, tensor, element, inverses) for name, tensor in self.b.items()}

    # --- running ------------------------------------------------------------------------------------------------------

    def place(self, moved: Mapping[str, Tensor], point: float) -> None:
        """Bring the network that far from A to the moved B."""
        own = {name: self._as_own(name, tensor) for name, tensor in moved.items()}
        self.between.place({**self.between.b, **own}, point)

    def _as_own(self, name: str, tensor: Tensor) -> Tensor:
        target = self.targets[name]
        if target.is_complex():
            tensor = torch.view_as_complex(tensor.contiguous())
        return tensor.to(target.dtype)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that a backward pass has left, which are taken away."""
        found = {}
        for name in self.learned:
            gradient, self.targets[name].grad = self.targets[name].grad, None
            if gradient is not None:
                found[name] = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).to(self.dtype)
        return found

    def totals(self, measured: Loader, moved: Mapping[str, Tensor], points: Sequence[float]) -> tuple[float, int]:
        """The sum over samples and points of the loss, and how many there were."""
        with undisturbed():
            return self.between.summed(measured, lambda point: self.place(moved, point), points)


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
