"""How alike the layers of two networks are, before and after one of them is permuted."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from permgraph.errors import MismatchError
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import STATISTICS

if TYPE_CHECKING:
    import torch

    from permgraph.spec.permutation import Permutation
    from permgraph.spec.spec import PermutationSpec

_PIECE = 1 << 22


@dataclass(frozen=True)
class Similarity:
    """The cosine of the angle between one layer's parameters in A and in B.

    Attributes:
        layer: the path of the module.
        before: with B as given.
        after: with B permuted; None if there is no permutation.
    """

    layer: str
    before: float
    after: float | None


def layer_similarity(
    spec: PermutationSpec,
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, torch.Tensor],
    permutation: Permutation | Transformation | None = None,
) -> tuple[Similarity, ...]:
    """Compare the parameters of each module in two state dicts, a tensor at a time.

    All parameters of a module are taken as one vector; running statistics are left out, as weight matching leaves them
    out. A layer that is zero in either network has the similarity NaN.

    Raises:
        MismatchError: one of the state dicts lacks a parameter, or has it in another shape.

    Example:
        >>> from permgraph.spec import PermutationSpec
        >>> spec = PermutationSpec.parse("fc.weight 2 hidden\\ngroups: hidden 2")
        >>> a, b = {"fc.weight": torch.tensor([1.0, 0.0])}, {"fc.weight": torch.tensor([0.0, 1.0])}
        >>> layer_similarity(spec, a, b)
        (Similarity(layer='fc', before=0.0, after=None),)
    """
    sums: dict[str, list[float]] = {}
    for name, shape in spec.tensors.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in STATISTICS):
            continue
        one, other = (_tensor(state, name, shape, spec, whose) for state, whose in ((a, "A"), (b, "B")))
        if not one.is_floating_point():
            continue
        if other.dtype.itemsize == 1:  # eight-bit floats cannot be indexed everywhere
            other = other.float()
        moved = _moved(permutation, name, other, b, spec)
        layer = sums.setdefault(name.rpartition(".")[0] or name, [0.0, 0.0, 0.0, 0.0, 0.0])
        layer[0] += _inner(one, one)
        layer[1] += _inner(other, other)
        layer[2] += _inner(one, other)
        if moved is not None:
            layer[3] += _inner(one, moved)
            layer[4] += _inner(moved, moved)  # which scales change

    def cosine(inner: float, squares: float) -> float:
        return inner / math.sqrt(squares) if squares > 0 else math.nan

    return tuple(
        Similarity(layer, cosine(before, aa * bb), None if permutation is None else cosine(after, aa * cc))
        for layer, (aa, bb, before, after, cc) in sums.items()
    )


def _moved(
    element: Permutation | Transformation | None,
    name: str,
    tensor: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    spec: PermutationSpec,
) -> torch.Tensor | None:
    if element is None:
        return None
    if name in element.spec.in_stack:
        name, element, _ = element.member(name)
        taken = _tensor(state, name, spec.tensors[name], spec, "B")
        tensor = taken.float() if taken.dtype.itemsize == 1 else taken
    if isinstance(element, Transformation):
        return element.apply_to(name, tensor, state)
    return element.apply_to(name, tensor)


def _tensor(
    state: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], spec: PermutationSpec, whose: str
) -> torch.Tensor:
    same = (name, *(alias for alias, canonical in spec.aliases.items() if canonical == name))
    key = next((key for key in same if key in state), None)
    if key is None:
        raise MismatchError(f"{whose} has no {name!r}, of shape {shape} in the spec")
    tensor = state[key]
    if tuple(tensor.shape) != shape:
        raise MismatchError(f"{key!r} has shape {tuple(tensor.shape)} in {whose}, but {shape} in the spec")
    return tensor.detach()


def _inner(one: torch.Tensor, other: torch.Tensor) -> float:
    """The inner product in float64, which is never made of more than a piece of a tensor."""
    one, other = one.reshape(-1), other.to(one.device).reshape(-1)
    starts = range(0, one.numel(), _PIECE)
    return math.fsum(float(one[at : at + _PIECE].double().dot(other[at : at + _PIECE].double())) for at in starts)
