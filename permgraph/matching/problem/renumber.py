"""Permutations of a few groups at a time: what a step of matching does many times, without a whole `Permutation`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from permgraph.matching import tuned
from permgraph.spec.action import blocks, gather
from permgraph.spec.spec import PermutationSpec

Arrays = dict[str, np.ndarray]
"""For some groups an integer array as in `Permutation.arrays`; the others are at rest."""


def act(spec: PermutationSpec, arrays: Mapping[str, np.ndarray], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The parameter `name`, whose value is `tensor`, permuted: a new tensor."""
    moved = blocks(spec.layout(spec.axes[name], name), spec.groups, arrays)
    rows = next((block.indices[0] for block in moved if block.dims == (0,)), None)
    if rows is None or len(moved) == 1 or tensor.numel() <= tuned.PORTION:
        return gather(tensor, moved)
    # Each block makes a new tensor: some rows at a time, there are never two whole ones.
    rest = tuple(block for block in moved if block.dims != (0,))
    new = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    some = max(1, len(tensor) * tuned.PORTION // tensor.numel())
    for to, of in zip(torch.split(new, some), torch.split(torch.from_numpy(rows).to(new.device), some), strict=True):
        to.copy_(gather(tensor.index_select(0, of), rest))
    return new
