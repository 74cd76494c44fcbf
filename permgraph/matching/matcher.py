"""What a matcher is, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from permgraph.pictures.tables import alignment_table
from permgraph.spec.spec import PermutationSpec

if TYPE_CHECKING:
    from permgraph.spec.permutation import Permutation

Outcome = Literal["converged", "sweep limit", "interrupted"]


@dataclass(frozen=True)
class Sweep:
    """One pass over the groups.

    Attributes:
        number: 1 for the first.
        objective: its value after the pass; higher is better.
        moved: for each group that moved, how many of its indices did, over all indices of its parents.
        gains: for each group, or tree of groups named by its root, what moving it added to the objective; empty for a
            first sweep in which the other groups were unknown.
        seconds: since the start of the run.
    """

    number: int
    objective: float
    moved: Mapping[str, int]
    gains: Mapping[str, float]
    seconds: float


Progress = Callable[[Sweep], object]
"""Called after each sweep."""


def moved_between(before: Permutation, after: Permutation) -> dict[str, int]:
    """For each group that differs between two permutations of a spec, how many of its indices do."""
    counts = {name: int(np.sum(array != before.arrays[name])) for name, array in after.arrays.items()}
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class MatchResult:
    """The permutation of B that a matcher found, and how it went.

    Attributes:
        permutation: to be applied to B.
        objective: of that permutation, as the matcher defines it; higher is better.
        objective_before: of the identity.
        outcome: "converged": no further step helps; "sweep limit": ask for more sweeps to go on; "interrupted": by the
            keyboard, and this is the best so far. Either of the last two can be resumed with `init=permutation`.
        history: one record per sweep, of the best run where there were restarts.
        runs: the objective that each restart reached.
        seed: what all random choices followed from.
        seconds: of wall time.
        notes: what else the user should know, in sentences.
    """

    permutation: Permutation
    objective: float
    objective_before: float
    outcome: Outcome
    history: tuple[Sweep, ...] = ()
    runs: tuple[float, ...] = ()
    seed: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    details: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def sweeps(self) -> int:
        """How many passes the best run made."""
        return len(self.history)

    def _repr_html_(self) -> str:
        return alignment_table(self)


@runtime_checkable
class NeedsModels(Protocol):
    """A matcher that must run the networks; `align` gives it the modules.

    One that runs them only in some of its settings has a property `needs_models` that says whether it does.
    """

    def with_models(self, model_a: nn.Module, model_b: nn.Module) -> Matcher:
        """The same matcher for these two modules, which it will not modify."""
        ...


@runtime_checkable
class Matcher(Protocol):
    """Anything that can choose an element of a spec's group that brings B to A."""

    def match(
        self,
        a: Mapping[str, torch.Tensor],
        b: Mapping[str, torch.Tensor],
        spec: PermutationSpec,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> MatchResult:
        """Find a permutation of B, a state dict, that brings it to A, another; neither is changed."""
        ...
