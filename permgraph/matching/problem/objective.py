"""What weight matching maximises: a sum of inner products of A's parameters with B's permuted ones."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from permgraph.errors import MismatchError, NonFiniteError, PermgraphError
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import STATISTICS, StateDict

Objective: TypeAlias = Literal["inner", "cosine", "l2"]
Weight: TypeAlias = float | torch.Tensor
Weights: TypeAlias = Mapping[str, Weight] | Callable[[str, torch.Tensor], Weight]


@dataclass(frozen=True)
class Pair:
    """The tensors to compare, on one device and in one dtype, by canonical name.

    Attributes:
        a: A's tensors, weighted; of the shapes in the spec.
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

    def objective(self, b: Mapping[str, torch.Tensor]) -> float:
        """What is reported: higher is better."""
        return self.scale * self.inner(self.a, b) + self.offset


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
    if objective not in ("inner", "cosine", "l2"):
        raise PermgraphError(f"unknown objective {objective!r}; choose 'inner', 'cosine' or 'l2'")
    spec.check(a)
    spec.check(b)
    patterns = tuple(ignore)
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    offset = 0.0
    for name in spec.axes:
        if not any(occurrence.group in spec.moving for occurrence in spec.occurrences(name)):
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        one, other = _tensor(a, name, spec, "A"), _tensor(b, name, spec, "B")
        chosen = dtype or (torch.float64 if {one.dtype, other.dtype} == {torch.float64} else torch.float32)
        one, other = one.to(chosen), other.to(one.device, chosen)
        _require_finite(one, name, "A")
        _require_finite(other, name, "B")
        if objective == "l2":
            offset -= float(torch.sum(one.double().square())) + float(torch.sum(other.double().square()))
        if objective == "cosine":
            norms = float(torch.linalg.vector_norm(one)) * float(torch.linalg.vector_norm(other))
            one = one / norms if norms > 0 else one
        if weights is not None:
            if objective == "l2":
                raise PermgraphError("the objective 'l2' takes no weights; use 'inner'")
            one = one * _weight(weights, name, one)
        ours[name], theirs[name] = one, other
    return Pair(ours, theirs, 2.0 if objective == "l2" else 1.0, offset)


def _tensor(state: StateDict, name: str, spec: PermutationSpec, model: str) -> torch.Tensor:
    keys = [name, *(alias for alias, canonical in spec.aliases.items() if canonical == name)]
    tensor = next(state[key] for key in keys if key in state).detach()
    if not tensor.dtype.is_floating_point or tensor.is_quantized:
        raise MismatchError(
            f"{name!r} of {model} is {tensor.dtype}: matching compares floating-point weights; dequantise it first, "
            f"or name it in ignore="
        )
    if tensor.is_meta:
        raise MismatchError(f"{name!r} of {model} is on the meta device and has no values to match; load the weights")
    return tensor


def _require_finite(tensor: torch.Tensor, name: str, model: str) -> None:
    # A finite sum needs one pass and no second tensor; only a sum that is not finite is worth looking into.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name!r} of {model} holds NaN or infinity in {bad} of its {tensor.numel()} elements; "
            f"repair it, or name it in ignore="
        )


def _weight(weights: Weights, name: str, tensor: torch.Tensor) -> Weight:
    weight = weights(name, tensor) if callable(weights) else weights.get(name, 1.0)
    if isinstance(weight, torch.Tensor):
        if weight.shape not in (torch.Size(()), tensor.shape):
            raise PermgraphError(
                f"the weight of {name!r} has shape {tuple(weight.shape)}; give a number or a tensor of shape "
                f"{tuple(tensor.shape)}"
            )
        weight = weight.to(tensor.device, tensor.dtype)
        _require_finite(weight, name, "the weights")
    return weight
