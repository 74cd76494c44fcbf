"""Tensors that lie in parts on several processes (DTensor, as FSDP-2 and tensor parallelism make them).

A permutation moves indices between parts, so a tensor is put together, permuted, and taken apart as it was. Each of
these is a collective operation: every process of the mesh must do the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a build of torch without torch.distributed
    DTensor = None  # type: ignore[assignment, misc]


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor of which this process has a part."""
    return DTensor is not None and isinstance(value, DTensor)


def whole(value: Any) -> Any:
    """A tensor put together on every process; any other value as it is."""
    return value.detach().full_tensor() if is_sharded(value) else value


def whole_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict with every tensor put together; the same object if none was in parts."""
    if not any(map(is_sharded, state.values())):
        return state
    return {name: whole(value) for name, value in state.items()}


def taken_apart(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """A tensor that every process has, laid out as another is; unchanged if that one is whole."""
    if not is_sharded(like):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
