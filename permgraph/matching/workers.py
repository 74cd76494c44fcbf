"""Several processes at one match: each reads its share of the parameters, and Gram matrices are added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from permgraph.errors import PermgraphError


@dataclass(frozen=True)
class Workers:
    """The processes of a ``torch.distributed`` group that match together.

    All of them call the matcher with the same arguments; tensors are read only by the process that owns them, so a
    checkpoint may lie on storage that all of them reach. Each returns the same result.

    Args:
        group: the processes; None for all. Its backend may be gloo, or nccl, which sums on the current GPU.

    Example:
        ``torchrun --nproc-per-node 2 match.py``, where match.py begins with
        ``torch.distributed.init_process_group("gloo")``.
    """

    group: Any = None

    def __post_init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise PermgraphError("several workers need torch.distributed: call init_process_group() first, in each")

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def share(self, sizes: Mapping[str, int]) -> frozenset[str]:
        """The names that fall to this process: the largest are dealt out first, each to whoever has least."""
        loads = [0] * self.size
        mine = []
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            owner = loads.index(min(loads))
            loads[owner] += sizes[name]
            if owner == self.rank:
                mine.append(name)
        return frozenset(mine)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes, on each of them."""
        where = tensor.device
        tensor = tensor.cuda() if dist.get_backend(self.group) == "nccl" else tensor.cpu()
        dist.all_reduce(tensor, group=self.group)
        return tensor.to(where)

    def merge(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What all processes have found, each its part; an error in one of them is raised in all."""
        found: list[Any] = [None] * self.size
        try:
            mine: Any = dict(work())
        except Exception as error:
            mine = error
        dist.all_gather_object(found, mine, group=self.group)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return {name: value for one in found for name, value in one.items()}

    def agree(self, value: Any) -> Any:
        """The first process's value, on each: what is decided must be the same everywhere, to the last bit."""
        held = [value]
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(held, src=first, group=self.group)
        return held[0]


def require_each_once(loader: Any) -> None:
    """Refuse a loader that would have several processes see some samples twice.

    accelerate fills up the last batches with samples from the beginning, so that all processes have as many.

    Raises:
        PermgraphError: the loader is accelerate's, and does so.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if type(loader).__name__ == "DataLoaderDispatcher":  # the first process reads for all, and deals out equal parts
        size = int(loader.state.num_processes)
    elif getattr(sampler, "even_batches", False):
        size = int(loader.total_batch_size)
    else:
        return
    try:
        left = loader.total_dataset_length % size
    except TypeError:  # a stream, whose end nobody knows
        left = size
    if left:
        raise PermgraphError(
            "accelerate makes the batches of all processes even by showing some samples twice, which would change the "
            "sums: give Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False)), without "
            f"dispatch_batches, or a number of samples that {size} divides"
        )


@dataclass(frozen=True)
class Share:
    """What one process does of a sum over parameters.

    Attributes:
        workers: all of them.
        names: the parameters that this one reads.
        dtype, device: of the sums.
    """

    workers: Workers
    names: frozenset[str]
    dtype: torch.dtype
    device: torch.device | str

    def sum(self, mine: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
        """The sum over the processes; `mine` is None where this one has nothing to add."""
        if mine is None:
            mine = torch.zeros(math.prod(shape), dtype=self.dtype, device=self.device).view(*shape)
        return self.workers.sum(mine.contiguous())
