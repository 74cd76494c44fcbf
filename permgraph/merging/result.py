"""The protocol of merging methods, their results, and the result of `merge`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from permgraph.conventions.outcomes import Outcome
from permgraph.errors import MismatchError
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.identity import load_tied


@dataclass(frozen=True)
class Round:
    """One pass over the models.

    Attributes:
        number: 1 for the first.
        objective: the sum, over all pairs of models, of the inner products of their permuted weights, after the pass.
        moved: the models that were given another permutation.
        seconds: since the start of the run.
    """

    number: int
    objective: float
    moved: tuple[int, ...]
    seconds: float


Progress = Callable[[Round], object]
"""Called after each round."""


@dataclass(frozen=True)
class Models:
    """The models that a method is to bring together.

    Attributes:
        states: one state dict for each, on the device of the first, in float32 or better.
        spec: the group, and where it acts.
        modules: the modules that they came from, where all of them are modules.
    """

    states: tuple[Mapping[str, Any], ...]
    spec: PermutationSpec
    modules: tuple[nn.Module, ...] | None = None

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Found:
    """The permutation of each model that a method found, and how it went."""

    permutations: tuple[Permutation, ...]
    outcome: Outcome
    history: tuple[Round, ...] = ()
    runs: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


@runtime_checkable
class MergeMethod(Protocol):
    """Anything that can choose a permutation for each of several models so that they correspond."""

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutations; the models are not changed."""
        ...


@dataclass(frozen=True)
class Merge:
    """Several models brought into correspondence, and their mean.

    Attributes:
        state_dict: the weighted mean of the permuted models, in the first one's dtypes and on its devices.
        permutations: for each model, what brings it to the numbering that all now share.
        objective: the sum, over all pairs of models, of the inner products of their permuted weights; of the
            parameters on which the spec acts, running statistics excepted. Higher is better.
        objective_before: of the models as they were given.
        outcome: "converged": no model gains by another permutation; "sweep limit": ask for more rounds to go on;
            "interrupted": by the keyboard, and this is the best so far.
        history: one record per round.
        runs: the objective that each restart reached.
        weights: how much each model counts in the mean; their sum is 1.
        seed: what all random choices followed from.
        seconds: of wall time.
        notes: what else there is to know, in sentences.
    """

    state_dict: dict[str, Any] = field(repr=False)
    permutations: tuple[Permutation, ...]
    objective: float
    objective_before: float
    outcome: Outcome
    history: tuple[Round, ...]
    runs: tuple[float, ...]
    weights: tuple[float, ...]
    seed: int
    seconds: float
    notes: tuple[str, ...] = ()
    _module: nn.Module | None = field(default=None, repr=False)

    @property
    def rounds(self) -> int:
        """How many passes over the models were made."""
        return len(self.history)

    def pairwise(self, i: int, j: int) -> Permutation:
        """The permutation that brings model ``j`` to the numbering of model ``i`` as it was given.

        It goes through the numbering that all share, so these agree with each other around every cycle:
        ``pairwise(i, j) @ pairwise(j, k) @ pairwise(k, i)`` is the identity.

        Raises:
            MismatchError: there is no model of that number.
        """
        for number in (i, j):
            if not 0 <= number < len(self.permutations):
                raise MismatchError(f"there is no model {number}: they are 0 to {len(self.permutations) - 1}")
        return self.permutations[i].inverse() @ self.permutations[j]

    def model(self) -> nn.Module:
        """A copy of the first module with the merged weights, in its mode.

        BatchNorm's running statistics are averaged with the rest and belong to no network: recalibrate them
        (`recalibrate_batchnorm`), or `repair` the model.

        Raises:
            MismatchError: `merge` was given a state dict first, so that there is no module to copy; or weights that are
                tied in it hold different values.
        """
        if self._module is None:
            raise MismatchError(
                "merge() was given state dicts, so it has no module to return: load .state_dict into one of your own"
            )
        model = copy.deepcopy(self._module)
        load_tied(model, self.state_dict)
        return model

    def __str__(self) -> str:
        return (
            f"{len(self.permutations)} models, {self.outcome} after {self.rounds} rounds in {self.seconds:.2f} s: "
            f"objective {self.objective_before:.6g} -> {self.objective:.6g}"
            + "".join(f"\n{note}" for note in self.notes)
        )
