"""The protocol of merging methods, their results, and the result of `merge`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from permgraph.conventions.displayed import Displayed, plural
from permgraph.conventions.outcomes import Outcome
from permgraph.errors import MismatchError
from permgraph.matching.general.gauge import Written, require_both_real
from permgraph.networks.stacked_module import StackedModule
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.transporting import transport
from permgraph.weights.identity import load_tied
from permgraph.weights.state_dict import STATISTICS


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
    _written: dict[Any, tuple[Written, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.states)

    def stacked(self) -> Models:
        """The same models where the tensors of modules that change places are stacked; itself if there are none."""
        if not self.spec.stacks:
            return self
        ran = None if self.modules is None else tuple(StackedModule(module, self.spec) for module in self.modules)
        return Models(tuple(map(self.spec.stacked, self.states)), self.spec.over_stacks(), ran)

    def written(self, ignore: Iterable[str] = STATISTICS, dtype: torch.dtype | None = None) -> tuple[Written, ...]:
        """Each model without gains and balanced, where the spec has general symmetries; worked out once and kept.

        Args:
            ignore: patterns of names that are no evidence.
            dtype: in which to compute.

        Raises:
            MismatchError: a gain of a model has a zero; or a parameter is complex in some models only.
            NonFiniteError: a weight is NaN or infinite.
        """
        key = tuple(ignore), dtype
        if key not in self._written:
            first = Written(self.spec, self.states[0], "model 0", ignore=key[0], dtype=dtype)
            more = [
                Written(self.spec, s, f"model {n}", ignore=key[0], dtype=first.dtype, like=first.tensors)
                for n, s in enumerate(self.states[1:], start=1)
            ]
            for other in more:
                require_both_real(first, other)
            self._written[key] = (first, *more)
        return self._written[key]


@dataclass(frozen=True)
class Found:
    """The permutation of each model that a method found, and how it went.

    Attributes:
        permutations: for each model, what brings it to the numbering that all come to share.
        outcome, history, runs, notes: as of `Merge`.
        transformations: over general symmetries, for each model the element of which its permutation is a part.
        reference: over these, the model in whose gauge and numbering they all end.
    """

    permutations: tuple[Permutation, ...]
    outcome: Outcome
    history: tuple[Round, ...] = ()
    runs: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    transformations: tuple[Transformation, ...] | None = None
    reference: int = 0

    def over(self, spec: PermutationSpec) -> Found:
        """The same of a spec whose stacks were found as single tensors; see `Models.stacked`."""
        if not spec.stacks:
            return self
        elements = self.transformations
        return replace(
            self,
            permutations=tuple(p.of(spec.permutations()) for p in self.permutations),
            transformations=None if elements is None else tuple(element.of(spec) for element in elements),
        )

    @property
    def elements(self) -> tuple[Permutation, ...] | tuple[Transformation, ...]:
        """What is to be applied to the models: transformations over general symmetries, else permutations."""
        return self.permutations if self.transformations is None else self.transformations


@runtime_checkable
class MergeMethod(Protocol):
    """Anything that can choose a permutation for each of several models so that they correspond.

    One with an attribute `general` that is true takes specs with general symmetries; others are given their
    permutations.
    """

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutations; the models are not changed."""
        ...


@dataclass(frozen=True, repr=False)
class Merge(Displayed):
    """Several models brought into correspondence, and their mean.

    Attributes:
        state_dict: the weighted mean of the permuted models, in the first one's dtypes and on its devices.
        permutations: for each model, what brings it to the numbering that all now share.
        objective: the sum, over all pairs of models, of the inner products of their permuted weights; of the
            parameters on which the spec acts, running statistics excepted. Higher is better. Over general symmetries
            it is that of the weights without gains and balanced, where scales and invertible maps cannot inflate it.
        objective_before: of the models as they were given.
        outcome: "converged": no model gains by another permutation; "sweep limit": ask for more rounds to go on;
            "interrupted": by the keyboard, and this is the best so far.
        history: one record per round.
        runs: the objective that each restart reached.
        weights: how much each model counts in the mean; their sum is 1.
        seed: what all random choices followed from.
        seconds: of wall time.
        notes: what else there is to know, in sentences.
        transformations: over general symmetries, for each model the element that was applied to it, of which its
            permutation is a part: all end in the numbering and the gauge (gains, scales) of the first model, or of the
            reference, whose own is the identity. None over permutations alone.
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
    transformations: tuple[Transformation, ...] | None = None
    _module: nn.Module | None = field(default=None, repr=False)

    @property
    def rounds(self) -> int:
        """How many passes over the models were made."""
        return len(self.history)

    @property
    def elements(self) -> tuple[Permutation, ...] | tuple[Transformation, ...]:
        """What was applied to the models: the transformations over general symmetries, else the permutations."""
        return self.permutations if self.transformations is None else self.transformations

    def pairwise(self, i: int, j: int) -> Any:
        """The permutation that brings model ``j`` to the numbering of model ``i`` as it was given.

        It goes through the numbering that all share, so these agree with each other around every cycle:
        ``pairwise(i, j) @ pairwise(j, k) @ pairwise(k, i)`` is the identity. Over general symmetries it is a
        `Transformation`, to the gauge of model ``i``, and that product is the identity up to rounding in its
        matrices and factors, and exactly in its permutations.

        Raises:
            MismatchError: there is no model of that number.
        """
        for number in (i, j):
            self._require_model(number)
        return self.elements[i].inverse() @ self.elements[j]  # type: ignore[operator]

    def transport(self, number: int, x: Any, **options: Any) -> Any:
        """What goes with one model's weights, moved as these are before the mean; see `permgraph.transport`.

        Args:
            number: of the model, from 0.
            x: what to move.
            options: those of `permgraph.transport`.

        Raises:
            MismatchError: there is no model of that number, or `x` does not fit it.
        """
        self._require_model(number)
        return transport(self.elements[number], x, **options)

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

    def _require_model(self, number: int) -> None:
        if not 0 <= number < len(self.permutations):
            raise MismatchError(f"there is no model {number}: they are 0 to {len(self.permutations) - 1}")

    def __str__(self) -> str:
        done = f"{self.outcome} after {plural(self.rounds, 'round')} in {self.seconds:.2f} s"
        objective = f"objective {self.objective_before:.6g} -> {self.objective:.6g}"
        return "\n".join((f"{len(self.permutations)} models, {done}: {objective}", *self.notes))
