"""Sharded (DTensor) and offloaded tensors.

A permutation moves indices between the parts of a DTensor (FSDP-2 and tensor parallelism make them), so a tensor is
gathered, permuted, and distributed again as it was. Each of these is a collective operation: every process of the mesh
must do the same, in the same order. Models that accelerate has dispatched keep meta tensors in place of what lies on
the disk or in the host's memory, and hooks that fetch it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def is_distributed(value: Any) -> bool:
    """Whether a value is a DTensor, of which this process may have a part only."""
    kind = _dtensor()
    return kind is not None and isinstance(value, kind)


def _dtensor() -> type | None:
    # Whoever has a DTensor has imported this; to do so here would take a second of everybody else's time.
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def fully_sharded(module: nn.Module) -> str | None:
    """The name of the first module inside that FSDP-2 has sharded; None if there is none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has such a module has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return None
    candidates = ((name, part) for name, part in module.named_modules() if isinstance(part, kind))
    return next((name for name, part in candidates if any(map(_is_sharded, part.parameters()))), None)


def _is_sharded(value: Any) -> bool:
    return is_distributed(value) and value.device_mesh.size() > 1


def gathered(value: Any) -> Any:
    """A DTensor as a whole tensor on every process; any other value as it is."""
    return value.detach().full_tensor() if is_distributed(value) else value


def gathered_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict with every tensor gathered; the same object if none is distributed."""
    if _dtensor() is None or not any(map(is_distributed, state.values())):
        return state
    return {name: gathered(value) for name, value in state.items()}


def redistributed_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """A tensor that every process has, laid out as another is; unchanged if that one is no DTensor."""
    if not is_distributed(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def redistributed_state(state: dict[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with every tensor laid out as the one of its name is; names that share a tensor still do."""
    if _dtensor() is None:
        return state
    done: dict[int, Any] = {}
    return {name: done.setdefault(id(value), redistributed_like(value, like[name])) for name, value in state.items()}


def module_state(module: nn.Module) -> Mapping[str, Any]:
    """A module's state dict, with what accelerate has offloaded fetched where it lies."""
    state: dict[str, Any] = module.state_dict()
    absent = {name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta}
    if not absent:
        return state
    for path, part in module.named_modules():
        hook = vars(part).get("_hf_hook")
        prefix = f"{path}." if path else ""
        for each in getattr(hook, "hooks", (hook,)):
            stored = getattr(each, "weights_map", None)
            if stored is None:
                continue
            for name in [name for name in absent if name.startswith(prefix)]:
                try:
                    state[name] = stored[name[len(prefix) :]]
                except KeyError:
                    continue
                absent.discard(name)
    return state
