"""Averages of networks' weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.errors import MismatchError
from permgraph.weights.combine import as_state_dict, check_same_keys

Network = nn.Module | Mapping[str, Any]


def average(networks: Sequence[Network], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the weighted mean of the networks' state dicts, parameter by parameter: a model soup.

    Floating-point and complex tensors are averaged in float32 or better, and keep the dtype and device that they have
    in the first network. Integer and boolean tensors, such as ``num_batches_tracked``, are taken from the first one.
    Names that share one tensor in the first network share one in the result. No network is changed.

    Args:
        networks: modules, or state dicts of the same keys and shapes.
        weights: one number for each network, not negative; they are scaled to a sum of 1. Equal ones by default.

    Raises:
        MismatchError: no network, a key or shape that differs from the first network's, weights that do not fit, or
            names that are tied in the first network but hold different values in another.

    Example:
        >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[1, 3])["w"]
        tensor([0.7500, 0.7500])
    """
    shares = shares_of(weights, len(networks))
    states = [as_state_dict(network) for network in networks]
    for number, state in enumerate(states[1:], start=1):
        check_same_keys(states[0], state, ("network 0", f"network {number}"))
    result: dict[str, Any] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, value in states[0].items():
        if not isinstance(value, Tensor):  # a module's extra state
            result[name] = value
            continue
        earlier = seen.setdefault(_identity(name, value), name)
        if earlier == name:
            result[name] = mean([state[name] for state in states], shares)
            continue
        for number, state in enumerate(states):
            one, other = state[earlier], state[name]
            if one is not other and not torch.equal(one, other):
                raise MismatchError(
                    f"{earlier!r} and {name!r} are one tied tensor in network 0, but hold different values in "
                    f"network {number}: untie them in network 0, or tie them in network {number}"
                )
        result[name] = result[earlier]
    return result


def shares_of(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights of ``count`` networks, scaled to a sum of 1; raises MismatchError where that cannot be done."""
    if count == 0:
        raise MismatchError("there is no network to average: give at least one")
    if weights is None:
        return (1.0 / count,) * count
    given = tuple(float(weight) for weight in weights)
    if len(given) != count:
        raise MismatchError(f"weights has {len(given)} numbers for {count} networks: give one for each")
    for number, weight in enumerate(given):
        if not math.isfinite(weight) or weight < 0:
            raise MismatchError(f"weights[{number}] is {weight}: each must be finite and not negative")
    total = sum(given)
    if total == 0:
        raise MismatchError("weights are all 0: at least one network must count")
    return tuple(weight / total for weight in given)


def _identity(name: str, tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one and the same memory. An empty one has none, and is only itself."""
    if tensor.numel() == 0:
        return (name,)
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def mean(tensors: Iterable[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean of tensors of one shape, in the first one's dtype; of integers, the first.

    Sums are taken in float32 or better, and no more than one tensor is held at a time.
    """
    tensors = iter(tensors)
    first = next(tensors).detach()
    if not (first.is_floating_point() or first.is_complex()):
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
    for tensor, share in zip(itertools.chain((first,), tensors), shares, strict=True):
        total = total.to(torch.promote_types(total.dtype, tensor.dtype))
        if share:  # what does not count may be NaN
            total.add_(tensor.detach().to(device=first.device, dtype=total.dtype), alpha=share)
    return total.to(first.dtype)
