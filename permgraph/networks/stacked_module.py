"""`StackedModule`: a network whose modules that change places have their tensors in stacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.spec.data import SpecData
from permgraph.spec.stacks import places, unstacked


class StackedModule(nn.Module):
    """A module as a spec with stacks names its tensors: its parameters are the stacks, and forward is the module's own.

    So what runs networks on state dicts of the spec need know nothing of stacks. The module itself is copied neither
    nor changed; it runs on parts of the stacks, through which gradients flow, and into which it writes its buffers.

    Args:
        module: the network.
        spec: its spec, see `PermutationSpec.stacks`.

    Raises:
        MismatchError: tensors of one stack differ in shape or dtype.
    """

    inner: nn.Module

    def __init__(self, module: nn.Module, spec: SpecData) -> None:
        super().__init__()
        object.__setattr__(self, "inner", module)
        self.stacks = dict(spec.stacks)
        trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state = module.state_dict(keep_vars=True)
        firsts = {stack: next(places(names))[1] for stack, names in self.stacks.items()}
        for name, tensor in spec.stacked(state).items():
            own = firsts.get(name, name)
            if isinstance(tensor, Tensor):
                is_parameter = own in trained
                if name in firsts and is_parameter:
                    tensor = nn.Parameter(tensor, requires_grad=state[own].requires_grad)
                _put(self, name.split("."), tensor, is_parameter)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes of the same arguments."""
        own: dict[str, Tensor] = dict(self.named_parameters(remove_duplicate=False))
        own |= dict(self.named_buffers(remove_duplicate=False))
        return torch.func.functional_call(self.inner, unstacked(self.stacks, own), args, kwargs)

    def train(self, mode: bool = True) -> StackedModule:
        """Set the mode of the module that runs."""
        super().train(mode)
        self.inner.train(mode)
        return self

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """Its own parts, which hold tensors, and those of the module that runs."""
        yield from super().modules(*args, **kwargs)
        yield from self.inner.modules(*args, **kwargs)


class _Part(nn.Module):
    """Holds tensors under their names."""


def _put(module: nn.Module, path: list[str], tensor: Tensor, is_parameter: bool) -> None:
    for word in path[:-1]:
        if word not in module._modules:
            module.add_module(word, _Part())
        module = module._modules[word]  # type: ignore[assignment]
    if is_parameter:
        module.register_parameter(path[-1], tensor)  # type: ignore[arg-type]
    else:
        module.register_buffer(path[-1], tensor)
