"""What weight matching maximises: a sum of inner products of A's parameters with B's permuted ones."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from permgraph.conventions.choices import require_choice
from permgraph.errors import MismatchError, PermgraphError
from permgraph.matching.problem.renumber import act
from permgraph.spec.expressions import Fixed
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import STATISTICS, StateDict, as_real, is_continuous, require_finite

Objective: TypeAlias = Literal["inner", "cosine", "l2"]
Weight: TypeAlias = float | torch.Tensor
ADVICE = "; repair it, or name it in ignore="
"""What to do about a tensor that is not finite."""

Weights: TypeAlias = Mapping[str, Weight] | Callable[[str, torch.Tensor], Weight]


@dataclass(frozen=True)
class Pair:
    """The tensors to compare, on one device and in one dtype, by canonical name.

    A complex tensor is here a real one with one more dimension, of its real and imaginary parts: what is summed is then
    Re<a, conj(b)>, whose maximum is the least distance, as for real tensors.

    Attributes:
        a: A's tensors, weighted; of the shapes in the spec, where they are real.
        b: B's tensors, of the same shapes.
        scale, offset: the reported objective is `scale` times the sum of inner products, plus `offset`.
    """

    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]
    scale: float = 1.0
    offset: float = 0.0

    def inner(self, names: Iterable[str], b: Mapping[str, torch.Tensor]) -> float:
        """The sum of the inner products of the named tensors of A with those of `b`, which may be permuted."""
        return sum(dot(self.a[name], b[name]) for name in names)

    def reported(self, inner: float) -> float:
        """The objective where the inner products sum to this: higher is better."""
        return self.scale * inner + self.offset

    def objective(self, b: Mapping[str, torch.Tensor]) -> float:
        """What is reported of a B that may be permuted."""
        return self.reported(self.inner(self.a, b))

    def spec_of(self, spec: PermutationSpec) -> PermutationSpec:
        """A spec, with one more axis, that stays put, for each of its parameters that is complex."""
        return with_real_parts(spec, (name for name, tensor in self.a.items() if tensor.ndim > len(spec.shapes[name])))

    def objective_at(self, spec: PermutationSpec, arrays: Mapping[str, np.ndarray]) -> float:
        """What is reported of a permutation of B, an element of the spec's group."""
        own = self.spec_of(spec)
        return self.objective({name: act(own, arrays, name, tensor) for name, tensor in self.b.items()})


def with_real_parts(spec: PermutationSpec, names: Iterable[str]) -> PermutationSpec:
    """A spec in which the named parameters have one more dimension, of 2, that stays put; the same if there is none."""
    axes = {name: (*spec.axes[name], Fixed(2)) for name in names}
    return PermutationSpec(spec.groups, {**spec.axes, **axes}, aliases=spec.aliases) if axes else spec


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """The inner product, in the tensors' dtype over short runs, which are then summed in float64."""
    one, other = one.reshape(-1), other.reshape(-1)
    whole = one.numel() // _RUN * _RUN
    total = float(torch.dot(one[whole:], other[whole:]))
    # Some runs at a time, since their products are all written down before they are summed.
    some = _RUN * _RUN
    for left, right in zip(torch.split(one[:whole], some), torch.split(other[:whole], some), strict=True):
        if len(left):
            total += float(torch.linalg.vecdot(left.view(-1, _RUN), right.view(-1, _RUN)).double().sum())
    return total


def variance(tensor: torch.Tensor) -> float:
    """The variance of a tensor's elements."""
    count = max(1, tensor.numel())
    return max(0.0, dot(tensor, tensor) / count - (float(tensor.sum()) / count) ** 2)


_RUN = 1024


def compared_names(spec: PermutationSpec, ignore: Iterable[str] = STATISTICS) -> list[str]:
    """The parameters that are evidence: some group acts on them, and no pattern of `ignore` fits their name."""
    patterns = tuple(ignore)
    return [
        name
        for name in spec.axes
        if any(occurrence.group in spec.moving for occurrence in spec.occurrences(name))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def pair(
    a: StateDict,
    b: StateDict,
    spec: PermutationSpec,
    *,
    objective: Objective = "inner",
    weights: Weights | None = None,
    ignore: Iterable[str] = STATISTICS,
    dtype: torch.dtype | None = None,
) -> Pair:
    """Select, check, convert and weigh the tensors on which the objective depends.

    Those are the ones on which some group acts and whose name matches no pattern of `ignore`. Half precision is
    computed in float32; everything in float64 where A and B are float64. `dtype` overrides both. B's tensors go to the
    device of A's.

    Raises:
        MismatchError: a state dict does not fit the spec, or a tensor is not floating point or has no data.
        NonFiniteError: a tensor holds NaN or infinity.
        PermgraphError: an unknown objective, or a weight that does not fit its tensor.
    """
    require_choice("objective", objective, "inner", "cosine", "l2")
    spec.check(a)
    spec.check(b)
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    offset = 0.0
    for name in compared_names(spec, ignore):
        x, y = _tensor(a, name, spec, "A"), _tensor(b, name, spec, "B")
        chosen = dtype or (torch.float64 if {x.dtype, y.dtype} == {torch.float64} else torch.float32)
        x, y = x.to(chosen), y.to(x.device, chosen)
        require_finite(x, name, "A", ADVICE)
        require_finite(y, name, "B", ADVICE)
        if objective == "l2":
            offset -= float(torch.sum(x.double().square())) + float(torch.sum(y.double().square()))
        if objective == "cosine":
            norms = float(torch.linalg.vector_norm(x)) * float(torch.linalg.vector_norm(y))
            x = x / norms if norms > 0 else x
        if weights is not None:
            if objective == "l2":
                raise PermgraphError("the objective 'l2' takes no weights; use 'inner'")
            x = x * weight_of(weights, name, x, spec.shapes[name])
        ours[name], theirs[name] = x, y
    if any(ours[name].ndim != theirs[name].ndim for name in ours):
        name = next(name for name in ours if ours[name].ndim != theirs[name].ndim)
        raise MismatchError(f"{name!r} is complex in one of the models only")
    return Pair(ours, theirs, 2.0 if objective == "l2" else 1.0, offset)


def _tensor(state: StateDict, name: str, spec: PermutationSpec, model: str) -> torch.Tensor:
    keys = [name, *(alias for alias, canonical in spec.aliases.items() if canonical == name)]
    return comparable(next(state[key] for key in keys if key in state), name, model)


def comparable(tensor: torch.Tensor, name: str, model: str) -> torch.Tensor:
    """A tensor as it is compared: without gradients, and real.

    Raises:
        MismatchError: it holds integers, or is quantised, or has no values.
    """
    tensor = tensor.detach()
    if not is_continuous(tensor) or tensor.is_quantized:
        raise MismatchError(
            f"{name!r} of {model} is {tensor.dtype}: matching compares floating-point weights; dequantise it first, "
            f"or name it in ignore="
        )
    if tensor.is_meta:
        raise MismatchError(f"{name!r} of {model} is on the meta device and has no values to match; load the weights")
    return as_real(tensor)


def weight_of(weights: Weights, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> Weight:
    """How much a tensor counts: a number, or a tensor that broadcasts over it.

    Raises:
        PermgraphError: a weight does not fit its tensor.
        NonFiniteError: it holds NaN or infinity.
    """
    is_complex = tensor.ndim > len(shape)
    if callable(weights):
        weight = weights(name, torch.view_as_complex(tensor) if is_complex else tensor)
    else:
        weight = weights.get(name, 1.0)
    if isinstance(weight, torch.Tensor):
        if weight.shape not in (torch.Size(()), shape):
            raise PermgraphError(
                f"the weight of {name!r} has shape {tuple(weight.shape)}; give a number or a tensor of shape {shape}"
            )
        weight = weight.to(tensor.device, tensor.dtype)
        require_finite(weight, name, "the weights", ADVICE)
        weight = weight.unsqueeze(-1) if is_complex and weight.ndim else weight
    return weight
