"""Tensors that are not, or not all, in this process's memory: in parts on several processes, or offloaded.

A permutation moves indices between the parts of a DTensor (FSDP-2 and tensor parallelism make them), so a tensor is put
together, permuted, and taken apart as it was. Each of these is a collective operation: every process of the mesh must
do the same, in the same order. Models that accelerate has dispatched keep meta tensors in place of what lies on the
disk or in the host's memory, and hooks that fetch it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor of which this process has a part."""
    # Whoever has a DTensor has imported this; to do so here would take a second of everybody else's time.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def fully_sharded(module: nn.Module) -> str | None:
    """The name of the first module inside that FSDP-2 has parted among processes; None if there is none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has such a module has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return None
    taken = ((name, part) for name, part in module.named_modules() if isinstance(part, kind))
    return next((name for name, part in taken if any(map(_is_parted, part.parameters()))), None)


def _is_parted(value: Any) -> bool:
    return is_sharded(value) and value.device_mesh.size() > 1


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
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def module_state(module: nn.Module) -> Mapping[str, Any]:
    """A module's state dict, with what accelerate has offloaded fetched where it lies."""
    state: dict[str, Any] = module.state_dict()
    absent = {name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta}
    if not absent:
        return state
    for path, part in module.named_modules():
        hook = vars(part).get("_hf_hook")
        prefix = f"{path}." if path else ""
        for one in getattr(hook, "hooks", (hook,)):
            stored = getattr(one, "weights_map", None)
            if stored is None:
                continue
            for name in [name for name in absent if name.startswith(prefix)]:
                try:
                    state[name] = stored[name[len(prefix) :]]
                except KeyError:
                    continue
                absent.discard(name)
    return state
