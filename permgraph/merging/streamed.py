"""Merging models larger than memory: rounds over them, with tensors read as steps need them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from permgraph.matching import tuned
from permgraph.matching.streamed import LoadedOnAccess, StreamedWeightMatching
from permgraph.merging.ascent import Rounds, require_rounds
from permgraph.merging.compared import Compared
from permgraph.merging.result import Found, Models, Progress
from permgraph.spec.permutation import Permutation
from permgraph.weights.state_dict import as_real, is_continuous

NOTE = "models that are streamed are merged over permutations: what else the spec allows stays at rest"
Remember = Callable[[int, Callable[[], Permutation]], Permutation]
"""Given the number of a step and what finds its permutation: that permutation, found now or by an earlier run."""


@dataclass(frozen=True)
class StreamedRounds:
    """`CycleConsistent`, or `MergeMany`, for mappings that load a tensor on access.

    The ascent is theirs: each step matches one model to the mean of others, which raises the sum over all pairs of
    models of the inner products of their permuted weights. In memory are, at a time, the tensors of one parameter in
    all models and their mean, and what `StreamedWeightMatching` holds. Each step reads every model. Of general
    symmetries it takes the permutations, and a note says so.

    Args:
        joining: whether the models first join one after another, as in `CycleConsistent`; else the rounds begin with
            the models as they are given, as in `MergeMany`.
        max_rounds: stop after so many passes over the models.
        matcher: how one model is matched to a mean; its `init` serves while models join, later it is the identity.
        remember: keeps the permutation of each step, so that a run which was stopped goes on after its last step.

    Example:
        >>> spec = pg.PermutationSpec.parse('''
        ... 0.weight  3x1  hidden .
        ... 2.weight  1x3  . hidden
        ... groups: hidden 3
        ... ''')
        >>> a = {"0.weight": torch.tensor([[1.0], [2], [3]]), "2.weight": torch.tensor([[1.0, 0, 0]])}
        >>> models = Models((a, spec.random(1).apply(a), spec.random(2).apply(a)), spec)
        >>> found = StreamedRounds().find(models)
        >>> copies = [p.apply(state) for p, state in zip(found.permutations, models.states)]
        >>> all(torch.equal(copies[0]["0.weight"], copy["0.weight"]) for copy in copies)
        True

    References:
        Crisostomi et al. 2024; Ainsworth, Hayase & Srinivasa 2022, Algorithm 2.
    """

    joining: bool = True
    max_rounds: int = 100
    matcher: StreamedWeightMatching = field(default_factory=StreamedWeightMatching)
    remember: Remember | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_rounds(self.max_rounds)

    def find(self, models: Models, seed: int = 0, progress: Progress | None = None) -> Found:
        """Find the permutation of each model; see `MergeMethod`.

        Raises:
            MismatchError: a model does not fit the spec.
            NonFiniteError: a weight is NaN or infinite.
        """
        notes: tuple[str, ...] = ()
        if models.spec.general is not None:
            models = replace(models, spec=models.spec.permutations())
            notes = (NOTE,)
        run = _Run(self, models, seed)
        try:
            run.climb(progress)
        except KeyboardInterrupt:
            run.stop()
        return Found(tuple(run.permutations), run.outcome, tuple(run.history), (run.objective,), notes)


class _Run(Rounds):
    """A run over models that are read as its steps need them."""

    def __init__(self, settings: StreamedRounds, models: Models, seed: int) -> None:
        super().__init__(models, np.random.default_rng(seed), time.perf_counter())
        self.settings = settings
        self.climbing = replace(settings.matcher, init="identity")
        self.names = Compared.of(models.spec, models.states[0]).names
        self.reached: float | None = None  # the objective, once it is known for the present permutations
        self.given = self.objective
        self.steps = 0

    @property
    def objective(self) -> float:
        """The sum over all pairs of models of the inner products of their permuted weights."""
        if self.reached is None:
            self.reached = self._pairs()
        return self.reached

    def climb(self, progress: Progress | None) -> None:
        """Let the models join, then match each in turn to the mean of the others until none moves."""
        if self.settings.joining:
            self._join()
        self.run_rounds(self.settings.max_rounds, progress)

    def step(self, number: int) -> bool:
        """Match one model to the mean of the others; whether it moved."""
        return self._step(number, [other for other in range(len(self.models)) if other != number], self.climbing)

    def stop(self) -> None:
        """End here, at Ctrl-C, or as the models were given where some have joined, and that is worse."""
        self.outcome = "interrupted"
        self._require_gain()

    def _require_gain(self) -> None:
        if self.objective < self.given:  # better matched as they were given than one after another: begin there
            self.permutations = [self.models.spec.identity()] * len(self.models)
            self.reached = self.given

    def _join(self) -> None:
        first, *rest = self.rng.permutation(len(self.models)).tolist()
        joined = [first]
        for number in rest:
            self._step(number, joined, self.settings.matcher)
            joined.append(number)
        self._require_gain()

    def _step(self, number: int, others: Sequence[int], matcher: StreamedWeightMatching) -> bool:
        """Match one model to the mean of others; whether it moved."""
        seed = int(self.rng.integers(2**31))  # drawn also for steps that are remembered, so that the next are the same
        here = self.permutations[number]

        def search() -> Permutation:
            target = _Mean([self._moved(other) for other in others])
            found = matcher.match(target, self._moved(number), self.models.spec, seed)
            if found.outcome == "interrupted":
                raise KeyboardInterrupt
            # From the identity it ends no lower than it began; equal is not worth a move.
            better = found.objective > found.objective_before
            return found.permutation if better else self.models.spec.identity()

        found = search() if self.settings.remember is None else self.settings.remember(self.steps, search)
        self.steps += 1
        if found.is_identity:
            return False
        self.reached = None
        self.permutations[number] = found @ here
        return True

    def _moved(self, number: int) -> _Moved:
        return _Moved(self.models.states[number], self.permutations[number])

    def _pairs(self) -> float:
        """The sum over all pairs of models of their inner products, in float64, a portion at a time."""
        total = 0.0
        for name in self.names:
            whole = [as_real(self._moved(number)[name]).reshape(-1) for number in range(len(self.models))]
            for start in range(0, whole[0].numel(), tuned.STREAMED_PORTION):
                parts = [tensor[start : start + tuned.STREAMED_PORTION].double() for tensor in whole]
                added = torch.stack(parts).sum(0)
                total += (float(added.square().sum()) - sum(float(part.square().sum()) for part in parts)) / 2
        return total


class _Moved(LoadedOnAccess):
    """A model, renumbered."""

    def __init__(self, state: Mapping[str, Any], permutation: Permutation) -> None:
        super().__init__(state, self._renumbered)
        self.state, self.permutation = state, permutation

    def _renumbered(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.state[name].detach()
        spec = self.permutation.spec
        if name in spec.in_stack:
            source, within, _ = self.permutation.member(name)
            return _Moved(self.state, within)[source]
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)  # exact, and eight-bit floats cannot be indexed everywhere
        known = spec.aliases.get(name, name)
        if known not in spec.axes or self.permutation.is_identity:
            return tensor
        return self.permutation.apply_to(known, tensor)


class _Mean(LoadedOnAccess):
    """The mean of several models, in float32 or better."""

    def __init__(self, models: Sequence[_Moved]) -> None:
        super().__init__(models[0], self._added)
        self.models = models

    def _added(self, name: str) -> torch.Tensor:
        first, *rest = self.models
        total = first[name]
        total = total.to(torch.promote_types(total.dtype, torch.float32), copy=True)
        for model in rest:
            total += model[name].to(total.device)
        return total.div_(len(self.models)) if is_continuous(total) else total
