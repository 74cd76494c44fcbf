"""B at the present permutation of a run, within a number of bytes.

What fits is held, and written to as groups move. Any other tensor is gathered from the caller's when a step asks for
it, which costs a pass over it where a held one costs nothing. The values are the same, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from permgraph.matching.problem.renumber import Arrays, act
from permgraph.spec.blocks import Block
from permgraph.spec.spec import PermutationSpec


class PermutedModel(Mapping[str, torch.Tensor]):
    """B's compared tensors, permuted; not to be written to, but for those that `writable` returns.

    Attributes:
        arrays: how the groups stand, for those that have moved.
    """

    def __init__(self, spec: PermutationSpec, b: Mapping[str, torch.Tensor], size: int) -> None:
        self.spec, self.b, self.size = spec, b, size
        self.groups = {name: frozenset(o.group for o in spec.occurrences(name)) for name in b}
        self.reset({})

    def reset(self, arrays: Arrays) -> None:
        """Go to these arrays, and let go of all tensors."""
        self.arrays, self.held, self.free_bytes = arrays, dict[str, torch.Tensor](), self.size
        self.last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.held:
            return self.held[name]
        if not self.groups[name] & self.arrays.keys():
            return self.b[name]
        if self.last is not None and self.last[0] == name:
            return self.last[1]
        self.drop_temporary()
        tensor = act(self.spec, self.arrays, name, self.b[name])
        if not self._hold(name, tensor):
            self.last = name, tensor  # the next block of the same parameter may want it
        return tensor

    def select(self, block: Block, axis: int, indices: torch.Tensor) -> torch.Tensor:
        """Some indices of a block along one of its axes, for which alone they are gathered if that can be."""
        name, leaves = block.parameter, block.leaves
        known = name in self.held or (self.last is not None and self.last[0] == name)
        if known or any(leaf.parents for leaf in leaves) or not self.groups[name] & self.arrays.keys():
            return block.view(self[name]).index_select(axis, indices)
        stand = {x: self.arrays[leaf.group] for x, leaf in enumerate(leaves) if leaf.group in self.arrays}
        part = block.view(self.b[name])
        if axis in stand:
            indices = torch.tensor(stand.pop(axis), device=indices.device)[indices]
        part = part.index_select(axis, indices)
        for other, array in stand.items():
            part = part.index_select(other, torch.tensor(array, device=indices.device))
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self.b)

    def __len__(self) -> int:
        return len(self.b)

    def writable(self, name: str) -> torch.Tensor | None:
        """The tensor, to be changed as the groups are about to move; None if it is not held."""
        if name not in self.held and self.b[name].nbytes <= self.free_bytes:
            tensor = self[name]
            if name not in self.held:
                self._hold(name, tensor.clone())
        return self.held.get(name)

    def moved(self, arrays: Arrays, new: Mapping[str, torch.Tensor]) -> None:
        """Groups have moved: what is held of their parameters has been written to, or is in `new`."""
        self.arrays = arrays
        self.drop_temporary()
        for name, tensor in new.items():
            if name in self.held:
                self.held[name] = tensor
            else:
                self._hold(name, tensor)

    def drop_temporary(self) -> None:
        """Let go of the tensor that was gathered for one step only."""
        self.last = None

    def _hold(self, name: str, tensor: torch.Tensor) -> bool:
        if tensor.nbytes > self.free_bytes:
            return False
        self.free_bytes -= tensor.nbytes
        self.held[name] = tensor
        return True
