"""Scratch copies of a network in which weights between networks are run, and their loss on batches.

Running statistics belong to no network between others, so batch normalisation runs by the statistics of the batch, and
all else in evaluation mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from permgraph.networks.batches import (
    Loader,
    Loss,
    batches,
    device_of,
    fitting,
    loss_of,
    require_finite_loss,
    split_labelled,
)
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import StateDict, is_continuous

Perturb: TypeAlias = Callable[[nn.Module, Any], Any]
State: TypeAlias = dict[str, Tensor]
Parts: TypeAlias = Sequence[tuple[float, Mapping[str, Tensor]]]
"""A blended network: coefficients and the tensors that they multiply."""

MIDPOINT = (0.5,)


def scratch_copy(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """A copy of a module at ``state``, without gradients; batch normalisation uses the statistics of the batch."""
    scratch = copy.deepcopy(model).eval().requires_grad_(False)
    scratch.load_state_dict(state)
    for part in scratch.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    return scratch


class Between:
    """A copy of A's network that stands anywhere on the line from A to B.

    Everything that is floating point or complex stands between A and B; integers are A's.

    Attributes:
        model: the copy, on A's device unless another is given; no parameter of it requires a gradient.
        a, b: the state dicts on that device, by canonical names, in the copy's dtypes.
        names: the canonical names of the parameters that the spec moves.
        network: what is called in the place of `model`, of which it may be a wrapper.
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
        self.spec, self.loss = spec, loss
        self.model = scratch_copy(model, a).to(device)
        self.network: Callable[..., Any] = self.model
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._dtypes = {name: tensor.dtype for name, tensor in self._own_state().items()}
        self.a, self.b = self._own(a), self._own(b)
        trainable = {spec.aliases.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False)}
        self.names = tuple(
            name
            for name in spec.axes
            if name in trainable
            and is_continuous(self.a[name])
            and any(occurrence.group in spec.moving for occurrence in spec.occurrences(name))
        )

    def _own_state(self) -> State:
        """The copy's own tensors, asked for anew since a wrapper may have given it others."""
        return {self.spec.aliases.get(name, name): tensor for name, tensor in self.model.state_dict().items()}

    def _own(self, state: StateDict) -> State:
        own = {self.spec.aliases.get(name, name): tensor for name, tensor in reversed(list(state.items()))}
        return {name: tensor.detach().to(self.device, self._dtypes[name]) for name, tensor in own.items()}

    def permuted(self, permutation: Permutation) -> State:
        """B permuted, by canonical names."""
        return permutation.apply(self.b)

    def at(self, b: Mapping[str, Tensor], point: float = 0.5) -> State:
        """New tensors of a state that far from A towards `b`, a permuted B; those that `b` lacks stay A's."""
        return {
            name: tensor.lerp(b[name], point) if name in b and is_continuous(tensor) else tensor.clone()
            for name, tensor in self.a.items()
        }

    def place(self, b: Mapping[str, Tensor], point: float = 0.5) -> None:
        """Bring the copy to that point."""
        targets = self._own_state()
        with torch.no_grad():
            for name, tensor in self.a.items():
                target = targets[name]
                if is_continuous(tensor):
                    torch.lerp(tensor, b[name], point, out=target.detach())
                else:
                    target.copy_(tensor)

    def value(self, batch: Any, number: int, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss on a batch: of the copy as it stands, or of another state, through which gradients then flow."""
        args, kwargs, targets = split_labelled(batch, self.device)
        with fitting(args, kwargs, what=f"the network cannot run on batch {number} of the loader,"):
            if state is None:
                output = self.network(*args, **kwargs)
            else:
                output = torch.func.functional_call(self.model, dict(state), args, kwargs)
        return loss_of(self.loss, output, targets)

    def require_finite(self, value: Tensor, number: int, point: float = 0.5) -> None:
        """Refuse a loss that is NaN or infinite."""
        where = "at the midpoint" if point == 0.5 else f"{point:.3g} of the way from A to B"
        require_finite_loss(value, where, f"batch {number}")

    def totals(
        self,
        loader: Loader,
        permutation: Permutation,
        points: tuple[float, ...] = MIDPOINT,
        limit: int | None = None,
    ) -> tuple[float, int]:
        """The sum over samples, and over points, of the loss on the first `limit` batches, and how many there were."""
        b = self.permuted(permutation)
        with torch.no_grad():
            return self.summed(loader, lambda point: self.place(b, point), points, limit)

    def summed(
        self, loader: Loader, place: Callable[[float], object], points: Sequence[float], limit: int | None = None
    ) -> tuple[float, int]:
        """The same, where `place` brings the copy to a point."""
        total, count = 0.0, 0
        for point in points:
            place(point)
            for number, batch in enumerate(batches(loader), start=1):
                if limit is not None and number > limit:
                    break
                value = self.value(batch, number)
                self.require_finite(value, number, point)
                samples = samples_of(batch)
                total, count = total + float(value) * samples, count + samples
        return total, count


def samples_of(batch: Any) -> int:
    """The number of samples of a batch, as the targets count them."""
    _, _, targets = split_labelled(batch, None)
    return len(targets) if isinstance(targets, Tensor) and targets.ndim else 1


class Workbench:
    """A scratch copy of a module in which blended weights are run; other buffers are those of ``state``.

    Attributes:
        names: the parameters that are blended, by their first name.
    """

    def __init__(
        self, template: nn.Module, state: Mapping[str, Any], loss: Loss, perturb: Perturb | None = None
    ) -> None:
        self.module = scratch_copy(template, state)
        self.loss, self.perturb = loss, perturb
        self.device = device_of(self.module)
        self.names = [name for name, p in self.module.named_parameters() if is_continuous(p)]
        first: dict[int, str] = {}
        every = self.module.named_parameters(remove_duplicate=False)
        self.first_name = {name: first.setdefault(id(parameter), name) for name, parameter in every}

    def parameters_of(self, state: Mapping[str, Tensor], *, free: bool = False) -> State:
        """The parameters among a state dict, to be trained if ``free``; new tensors then, in float32 or better."""
        parameters = {}
        for name in self.names:
            tensor = state[name].detach()
            work = torch.promote_types(tensor.dtype, torch.float32)
            parameters[name] = tensor.to(self.device, work, copy=free).requires_grad_(free)
        return parameters

    def loss_on(self, batch: Any, parts: Parts) -> Tensor:
        """The loss of the blended network on a batch, with a gradient for what is free."""
        state = {
            name: _sum([tensors[name] * coefficient for coefficient, tensors in parts if coefficient])
            for name in self.names
        }
        if self.perturb is not None:
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    if name in state:
                        parameter.copy_(state[name])
            batch = self.perturb(self.module, batch)
        args, kwargs, targets = split_labelled(batch, self.device)
        dtypes = {name: parameter.dtype for name, parameter in self.module.named_parameters()}
        cast: dict[str, Any] = {name: tensor.to(dtypes[name]) for name, tensor in state.items()}
        # Batch normalisation writes to its buffers: give it ones to spoil.
        cast.update({name: buffer.clone() for name, buffer in self.module.named_buffers()})
        with fitting(args, kwargs):
            output = torch.func.functional_call(self.module, cast, args, kwargs)
        value = loss_of(self.loss, output, targets)
        require_finite_loss(value, "on the path")
        return value

    def state_dict(self, parameters: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict with these parameters, and all else as in ``like``; ties, dtypes and devices are kept."""
        result: dict[str, Any] = {}
        for name, value in like.items():
            first = self.first_name.get(name, name)
            if first in parameters and first != name and first in result:
                result[name] = result[first]
            elif first in parameters:
                result[name] = parameters[first].detach().to(value.device, value.dtype, copy=True)
            else:
                result[name] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        return result


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
