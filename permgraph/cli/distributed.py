"""One command in several processes: ``torchrun --nproc-per-node 2 -m permgraph align ... --stream``.

The first process does all that a single one would: it says what is going on, keeps the journal, and writes. The others
take part in the matching, each of them reading its share of the parameters, and do nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from permgraph.errors import MismatchError
from permgraph.matching import MatchResult, StreamedWeightMatching, Workers
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec

Tensors = Mapping[str, torch.Tensor]
PATIENCE = timedelta(hours=12)  # that the others wait while the first one writes


@dataclass(frozen=True)
class DistributedRun:
    """The processes of this command."""

    workers: Workers

    @property
    def leads(self) -> bool:
        """Whether this is the first of them."""
        return self.workers.rank == 0

    def match(
        self, matcher: StreamedWeightMatching, a: Tensors, b: Tensors, spec: PermutationSpec, seed: int, progress: Any
    ) -> MatchResult:
        """The first process's part of a match: it tells the others where to begin."""
        init = dict(matcher.init.arrays) if isinstance(matcher.init, Permutation) else matcher.init
        self.workers.agree((init, matcher.done))
        return dataclasses.replace(matcher, workers=self.workers).match(a, b, spec, seed, progress)

    def follow(self, matcher: StreamedWeightMatching, a: Tensors, b: Tensors, spec: PermutationSpec, seed: int) -> None:
        """The other processes' part: to match as often as the first one does."""
        while (told := self.workers.agree(None)) is not None:
            init, done = told
            if isinstance(init, dict):
                init = Permutation(spec, init)
            dataclasses.replace(matcher, init=init, done=done, workers=self.workers).match(a, b, spec, seed)


@contextlib.contextmanager
def distributed_run() -> Iterator[DistributedRun | None]:
    """The processes that a launcher such as torchrun has started with this one; None if there are no others."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    if not dist.is_available():
        raise MismatchError("several processes need a torch with torch.distributed")
    dist.init_process_group("gloo", timeout=PATIENCE)
    found = DistributedRun(Workers())
    try:
        yield found
        if found.leads:
            found.workers.agree(None)
    finally:
        dist.destroy_process_group()
