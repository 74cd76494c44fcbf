"""Which tensors are one and the same: names that share memory, as tied weights do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError


class SameTensor:
    """Tells for each tensor under which name it was first met.

    It holds every tensor that it was shown. An address says nothing once its tensor is gone: where a state dict loads
    each tensor when it is asked for, the next one is often put in the same place.

    Example:
        >>> weight, same = torch.zeros(3), SameTensor()
        >>> same.first_name("embedding", weight), same.first_name("head", weight.detach())
        ('embedding', 'embedding')
    """

    def __init__(self) -> None:
        self._met: dict[Hashable, tuple[str, Tensor]] = {}

    def first_name(self, name: str, tensor: Tensor) -> str:
        """The name under which this very memory, read in the same way, was first met: ``name`` if it is new."""
        return self._met.setdefault(_memory(tensor), (name, tensor))[0]


def are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    return a is b or _memory(a) == _memory(b)


def load_tied(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load weights in a module that may hold one tensor under several names.

    Raises MismatchError if those names have different values, of which but one could be kept.
    """
    same = SameTensor()
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = same.first_name(name, tensor) if isinstance(tensor, Tensor) else name
        if first != name and first in state_dict and name in state_dict:
            x, y = state_dict[first], state_dict[name]
            if not are_same(x, y) and not torch.equal(x, y):
                raise MismatchError(
                    f"{first!r} and {name!r} are one tensor in {type(model).__name__}, but hold different values here: "
                    f"load them in permgraph.untied(model)"
                )
    model.load_state_dict(state_dict)


def _memory(tensor: Tensor) -> Hashable:
    """Equal for two living tensors which are the same memory. One that has none is only itself."""
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
