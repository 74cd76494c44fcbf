"""The network on the line between A and a permuted B, and its loss on batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from permgraph.errors import MismatchError, NonFiniteError, PermgraphError
from permgraph.networks.batches import batches, size, split
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import StateDict

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
MakeOptimizer: TypeAlias = Callable[[list[torch.Tensor]], torch.optim.Optimizer]

MIDPOINT = (0.5,)


class Between:
    """A copy of A's network that stands anywhere on the line from A to B.

    It runs in evaluation mode, but batch normalisation with the statistics of the batch, since its running statistics
    are wrong between two networks. Everything that is floating point stands between A and B; integers are A's.

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
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.load_state_dict(a)
        self.model.to(device)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        self.network: Callable[..., Any] = self.model
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._dtypes = {name: tensor.dtype for name, tensor in self._own_state().items()}
        self.a, self.b = self._own(a), self._own(b)
        trainable = {spec.aliases.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False)}
        self.names = tuple(
            name
            for name in spec.axes
            if name in trainable
            and self.a[name].is_floating_point()
            and any(occurrence.group in spec.moving for occurrence in spec.occurrences(name))
        )

    def _own_state(self) -> dict[str, torch.Tensor]:
        """The copy's own tensors, asked for anew since a wrapper may have given it others."""
        return {self.spec.aliases.get(name, name): tensor for name, tensor in self.model.state_dict().items()}

    def _own(self, state: StateDict) -> dict[str, torch.Tensor]:
        own = {self.spec.aliases.get(name, name): tensor for name, tensor in reversed(list(state.items()))}
        return {name: tensor.detach().to(self.device, self._dtypes[name]) for name, tensor in own.items()}

    def permuted(self, permutation: Permutation) -> dict[str, torch.Tensor]:
        """B permuted, by canonical names."""
        return permutation.apply(self.b)

    def at(self, b: Mapping[str, torch.Tensor], point: float = 0.5) -> dict[str, torch.Tensor]:
        """New tensors of a state that far from A towards `b`, a permuted B; those that `b` lacks stay A's."""
        return {
            name: tensor.lerp(b[name], point) if name in b and tensor.is_floating_point() else tensor.clone()
            for name, tensor in self.a.items()
        }

    def place(self, b: Mapping[str, torch.Tensor], point: float = 0.5) -> None:
        """Bring the copy to that point."""
        targets = self._own_state()
        with torch.no_grad():
            for name, tensor in self.a.items():
                target = targets[name]
                if tensor.is_floating_point():
                    torch.lerp(tensor, b[name], point, out=target.detach())
                else:
                    target.copy_(tensor)

    def value(self, batch: Any, number: int, state: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The loss on a batch: of the copy as it stands, or of another state, through which gradients then flow."""
        args, kwargs, targets = split(batch, self.device, number)
        try:
            if state is None:
                output = self.network(*args, **kwargs)
            else:
                output = torch.func.functional_call(self.model, dict(state), args, kwargs)
            value = self.loss(output if isinstance(output, torch.Tensor) else output.logits, targets)
        except Exception as error:
            shape = tuple(getattr(args[0] if args else next(iter(kwargs.values()), None), "shape", ()))
            raise MismatchError(
                f"the network or the loss cannot run on batch {number} of the loader, of shape {shape}, with targets "
                f"of shape {tuple(getattr(targets, 'shape', ()))}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise PermgraphError("loss must return one number as a tensor: the mean over the batch")
        return value

    def require_finite(self, value: torch.Tensor, number: int, point: float = 0.5) -> None:
        """Refuse a loss that is NaN or infinite."""
        if not bool(torch.isfinite(value)):
            where = "at the midpoint" if point == 0.5 else f"{point:.3g} of the way from A to B"
            raise NonFiniteError(
                f"the loss {where} is {value.item()} on batch {number}; check the data and the weights"
            )

    def totals(
        self,
        loader: Iterable[Any],
        what: str,
        permutation: Permutation,
        points: tuple[float, ...] = MIDPOINT,
        limit: int | None = None,
    ) -> tuple[float, int]:
        """The sum over samples, and over points, of the loss on the first `limit` batches, and how many there were."""
        total, count = 0.0, 0
        b = self.permuted(permutation)
        with torch.no_grad():
            for point in points:
                self.place(b, point)
                for number, batch in batches(loader, what):
                    if limit is not None and number > limit:
                        break
                    value = self.value(batch, number)
                    self.require_finite(value, number, point)
                    total += float(value) * size(batch)
                    count += size(batch)
        return total, count
