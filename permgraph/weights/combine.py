"""Linear combinations of networks' weights: the line between two, and the mean of several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from permgraph.errors import MismatchError
from permgraph.weights.distributed import gathered_state, redistributed_state
from permgraph.weights.identity import SameTensor, are_same
from permgraph.weights.ratios import Ratios, ratios_of
from permgraph.weights.state_dict import Network, as_state_dict, check_same_keys, is_continuous, own_state


def interpolate(a: Network, b: Network, t: Ratios) -> dict[str, Tensor]:
    """Return the state dict at ``t`` on the line from ``a`` (``t = 0``) to ``b`` (``t = 1``).

    ``t`` is a number; or, for ratios by layer, a mapping from patterns of names to numbers, of which the first that
    fits counts, as in ``{"head.*": 0.9, "*": 0.5}``; or a schedule such as ``(0, 0.5, 1)``, which is spread evenly over
    the layers: `permgraph.weights.ratios.ratios_of` says which these are.

    Floating-point and complex tensors are interpolated linearly, in float32 or better, and keep the dtype and device
    that they have in ``a``; the ends are met exactly. Integer and boolean tensors, such as
    ``num_batches_tracked``, are taken from ``a``. Names that share one tensor in ``a`` share one in the result. ``t``
    outside 0 to 1 extrapolates. Sharded tensors (DTensor) are gathered, and returned in the parts that they have in
    ``a``; all processes must call this alike. Neither input is changed.

    Raises:
        MismatchError: a key is missing from one side, two shapes differ, a tensor is on the meta device or quantised,
            or names that are tied in ``a`` hold different values in ``b``. The message names the first such tensor. Or
            a pattern of ``t`` fits no name, or a name no pattern.
        EvaluationError: ``t`` is not finite.

    Example:
        >>> a, b = {"weight": torch.zeros(3)}, {"weight": torch.ones(3)}
        >>> interpolate(a, b, 0.25)["weight"]
        tensor([0.2500, 0.2500, 0.2500])
    """
    given = own_state(a)
    ratios = ratios_of(given, t)
    states = gathered_state(given), as_state_dict(b)
    check_same_keys(*states)
    mixed = _combined(states, lambda key, tensors: _lerp(tensors[0], tensors[1], ratios[key]), ("a", "b"))
    return redistributed_state(mixed, given)


def average(networks: Sequence[Network], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the weighted mean of the networks' state dicts, parameter by parameter: a model soup.

    Floating-point and complex tensors are averaged in float32 or better, and keep the dtype and device that they have
    in the first network. Integer and boolean tensors, such as ``num_batches_tracked``, are taken from the first one.
    Names that share one tensor in the first network share one in the result. Sharded tensors (DTensor) are gathered,
    and returned in the parts that they have in the first; all processes must call this alike. No network is changed.

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
    given = own_state(networks[0])
    states = [gathered_state(given), *map(as_state_dict, networks[1:])]
    names = [f"network {number}" for number in range(len(states))]
    for state, name in zip(states[1:], names[1:], strict=True):
        check_same_keys(states[0], state, (names[0], name))
    return redistributed_state(_combined(states, lambda _, tensors: mean(tensors, shares), names), given)


def blend(states: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> dict[str, Any]:
    """Return a linear combination of state dicts, with the dtypes, devices, ties and integers of the first.

    The shares add up to 1. A state with the whole share is met exactly; one with none may hold anything.
    """
    whole = next((state for state, share in zip(states, shares, strict=True) if share == 1), None)
    if whole is not None:
        return interpolate(states[0], whole, 1.0 if whole is not states[0] else 0.0)
    return _combined(states, lambda _, tensors: mean(tensors, shares))


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


def _combined(
    states: Sequence[Mapping[str, Any]],
    combine: Callable[[str, Sequence[Tensor]], Tensor],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Each name's tensors combined; integers and extra state are the first's, and so is which names are tied.

    Raises MismatchError, where the states have ``names``, if what is tied in the first differs in another.
    """
    result: dict[str, Any] = {}
    same = SameTensor()
    for key, value in states[0].items():
        if not isinstance(value, Tensor):  # a module's extra state
            result[key] = value
            continue
        first = same.first_name(key, value)
        if first != key:
            if names is not None:
                _require_tied(states, names, first, key)
            result[key] = result[first]
        elif is_continuous(value):
            result[key] = combine(key, [value, *(state[key] for state in states[1:])])
        else:
            result[key] = value.detach().clone()
    return result


def _require_tied(states: Sequence[Mapping[str, Any]], names: Sequence[str], first: str, key: str) -> None:
    for state, name in zip(states[1:], names[1:], strict=True):
        x, y = state[first], state[key]
        if not are_same(x, y) and not torch.equal(x, y):
            raise MismatchError(
                f"{first!r} and {key!r} are one tied tensor in {names[0]}, but hold different values in {name}: "
                f"untie them in {names[0]}, or tie them in {name}"
            )


def _lerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    x, y = x.detach(), y.detach()
    if t == 0:
        return x.clone()
    if t == 1:
        return y.to(device=x.device, dtype=x.dtype, copy=True)
    work = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return torch.lerp(x.to(work), y.to(device=x.device, dtype=work), t).to(x.dtype)


def mean(tensors: Iterable[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean of tensors of one shape, in the first one's dtype and on its device.

    Sums are taken in float32 or better, and no more than one tensor is held at a time.
    """
    tensors = iter(tensors)
    first = next(tensors).detach()
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
    for tensor, share in zip(itertools.chain((first,), tensors), shares, strict=True):
        total = total.to(torch.promote_types(total.dtype, tensor.dtype))
        if share:  # what does not count may be NaN
            total.add_(tensor.detach().to(device=first.device, dtype=total.dtype), alpha=share)
    return total.to(first.dtype)
