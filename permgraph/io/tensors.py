"""What the kinds of file that hold tensors have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

Transform = Callable[[str, torch.Tensor], torch.Tensor]
"""Given a key and its tensor, what to write in its place: of the same shape and dtype."""


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """The dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def like(self) -> torch.Tensor:
        """A tensor of this shape and dtype on the meta device, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class TensorFile(Protocol):
    """A file that holds tensors by name and reads them one at a time."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def formats(self) -> Mapping[str, TensorFormat]:
        """What it holds, in the order of the file; known without reading any values."""
        ...

    def read(self, key: str) -> torch.Tensor:
        """The tensor of that name, on the CPU; its memory may be the file's, so it must not be written to."""
        ...
