"""Which tensors are evidence of how well models correspond, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from permgraph.matching import WeightMatching
from permgraph.matching.problem.objective import compared_names
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import STATISTICS, as_real, require_finite

_ROUNDING = 1e-12
"""What is lost in float64 when the inner products of a model are added up, as a share of their magnitude."""


@dataclass(frozen=True)
class Compared:
    """The parameters that count in the sum of inner products over pairs of models.

    Attributes:
        names: for each of them a name under which the state dict has it.
        linear: whether the matcher maximises that sum, and no other objective.
    """

    names: tuple[str, ...]
    linear: bool

    @classmethod
    def of(cls, spec: PermutationSpec, state: Mapping[str, Any], matcher: object = None) -> Compared:
        """What ``matcher`` compares, or else all tensors on which a group acts but running statistics."""
        names = {spec.aliases.get(key, key): key for key in reversed(list(state))}
        linear = isinstance(matcher, WeightMatching) and matcher.weights is None and matcher.objective != "cosine"
        ignore = tuple(matcher.ignore) if isinstance(matcher, WeightMatching) else STATISTICS
        return cls(tuple(names[name] for name in compared_names(spec, ignore)), linear)

    def pairs(self, states: Sequence[Mapping[str, Any]]) -> float:
        """The sum over all pairs of states of their inner products, in float64."""
        return sum_over_pairs(self.names, states)

    def rises(self, others: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Whether the inner product with ``others`` is greater for ``new`` than for ``old``, by more than rounding."""
        gain, size = 0.0, 0.0
        for name in self.names:
            target, before, after = (as_real(state[name]).double() for state in (others, old, new))
            products = target * after - target * before
            gain += float(products.sum())
            size += float(products.abs().sum())
        return gain > _ROUNDING * size


def sum_over_pairs(names: Iterable[str], states: Sequence[Mapping[str, Any]]) -> float:
    """The sum over all pairs of states of the inner products of these tensors, in float64."""
    total = 0.0
    for name in names:
        # The square of a sum holds each product of two different ones twice.
        whole = torch.zeros_like(as_real(states[0][name]), dtype=torch.float64)
        own = 0.0
        for state in states:
            tensor = as_real(state[name]).double()
            whole += tensor
            own += float(tensor.square().sum())
        total += (float(whole.square().sum()) - own) / 2
    return total


def require_all_finite(states: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raise NonFiniteError, naming the model and the parameter, where a compared tensor holds NaN or infinity."""
    for number, state in enumerate(states):
        for name in names:
            require_finite(state[name], name, f"model {number}", ": leave that model out, or repair it")
