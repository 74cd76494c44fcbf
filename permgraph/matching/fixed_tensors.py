"""Tensors that are fixed, and the same in every network: masks, bins, tables that no training changes.

A network that was made asymmetric on purpose has masks as buffers, each network the same. To renumber units along with
such a tensor changes no function, but the average of a mask and the renumbered mask is no mask. So where networks agree
on a tensor that is not trained, and its elements tell units apart, these units stay put.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.spec.blocks import blocks_of
from permgraph.spec.spec import PermutationSpec

_SHOWN = 3  #: names in a note


def with_fixed_held(
    spec: PermutationSpec, networks: Sequence[Any], states: Sequence[Mapping[str, Any]]
) -> tuple[PermutationSpec, tuple[str, ...]]:
    """The spec with those groups at rest that would renumber a fixed tensor which all networks share, and a note.

    Fixed are buffers, and parameters that no network trains; which these are, modules alone say.

    Args:
        spec: of all of them.
        networks: modules, and state dicts, of which nothing is known.
        states: the state dict of each.
    """
    modules = [network for network in networks if isinstance(network, nn.Module)]
    if not modules or len(states) < 2 or spec.general is not None:
        return spec, ()
    held: dict[str, None] = {}
    because: list[str] = []
    for name in spec.axes:
        if all(_is_fixed(module, name) for module in modules) and _equal([state.get(name) for state in states]):
            found = _told_apart(spec, name, states[0][name])
            if found:
                held |= dict.fromkeys(found)
                because.append(name)
    if not held:
        return spec, ()
    groups = {
        name: replace(group, fixed=True, parents=()) if name in held else group for name, group in spec.groups.items()
    }
    more = f" and {len(because) - _SHOWN} more" if len(because) > _SHOWN else ""
    what = "group stays" if len(held) == 1 else "groups stay"
    note = f"fixed and the same in all networks: {', '.join(because[:_SHOWN])}{more}; {len(held)} {what} put"
    return replace(spec, groups=groups), (note,)


def _is_fixed(module: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    if attribute in owner._buffers:
        return True
    parameter = owner._parameters.get(attribute)
    return parameter is not None and not parameter.requires_grad


def _equal(tensors: Sequence[Any]) -> bool:
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta:
        return False
    return all(
        isinstance(one, Tensor) and one.shape == first.shape and torch.equal(one.to(first.device, first.dtype), first)
        for one in tensors[1:]
    )


def _told_apart(spec: PermutationSpec, name: str, tensor: Tensor) -> list[str]:
    """The groups along whose axes the elements of a tensor differ."""
    found: dict[str, None] = {}
    for block in blocks_of(spec, name):
        view = block.view(tensor)
        for axis, leaf in enumerate(block.leaves):
            moves = leaf.group is not None and not spec.groups[leaf.group].fixed
            if moves and leaf.group is not None and not torch.equal(view, view.narrow(axis, 0, 1).expand_as(view)):
                found[leaf.group] = None
    return list(found)
